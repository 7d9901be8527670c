"""Why a job's overrides do not compose: every reason, each with what was probably meant."""

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from unlabeled.annotations import listed, near_miss, nearest, shown
from unlabeled.config import join
from unlabeled.tree import composed, options, parsed


class Explanation:
    """Goes through the overrides of a job one by one, mending those with a near miss."""

    def __init__(self, loader: ConfigLoader, name: str) -> None:
        self.loader, self.name = loader, name
        self.found: list[str] = []
        self.unread: set[str] = set()  # packages whose choice is unknown; so are their keys

    def of(self, job: Sequence[Override], error: Exception) -> DictConfig | None:
        """The mended job's config, if it can be composed; `found` has the mistakes.

        Args:
            job: overrides.
            error: what Hydra says, for a mistake that is not understood here.
        """
        cfg = None
        try:
            choices, keys = [], []
            for override in self._with_known_groups(job):
                if isinstance(override.value(), dict) or not self._options(override):
                    keys.append(override)
                elif (choice := self._known_option(override)) is not None:
                    choices.append(choice)
            cfg = self._chosen(choices)
            for override in keys:
                if override.key_or_group.partition(".")[0] not in self.unread:
                    self.found += set_key(cfg, override)
        except Exception as other:  # a mistake in the tree itself
            error = other
            cfg = None
        if cfg is None or not self.found:
            text = f"{error} {error.__cause__ or ''}".partition("\nConfig search path")[0]
            self.found.append(" ".join(text.split()))
        return cfg

    def _options(self, override: Override) -> list[str]:
        return options(self.loader, override.key_or_group)

    def _meant(self, override: Override, key: str, value: str | None = None) -> Override:
        """The override with another key or value, after saying that this was meant."""
        was, given = override.get_key_element(), override.get_value_string()
        if value is None:
            self.found.append(f"`{was}`: did you mean `{key}`?")
        else:
            self.found.append(f"`{was}={given}`: did you mean `{key}={value}`?")
        return parsed(f"{key}={given if value is None else value}")

    def _with_known_groups(self, job: Sequence[Override]) -> Iterator[Override]:
        """The overrides, with names of groups mended where nothing else can be meant."""
        cfg = self._bare = composed(self.name, [])
        groups = {str(key).partition("@")[0] for key in cfg.hydra.runtime.choices}
        for override in job:
            key = override.key_or_group
            near = None if "." in key or key in cfg else nearest(key, groups)
            choice = isinstance(override.value(), (str, list)) and not override.is_delete()
            if near and choice and not self._options(override):
                yield self._meant(override, override.get_key_element().replace(key, near, 1))
            else:
                yield override

    def _known_option(self, override: Override) -> Override | None:
        """The choice, perhaps mended, or nothing if it cannot be guessed."""
        key, value, known = override.get_key_element(), override.value(), self._options(override)
        if override.is_delete():
            return override
        names = value if isinstance(value, list) else [override.get_value_string()]
        near = {n: nearest(str(n), known) for n in names if n not in known}
        lost = [n for n, better in near.items() if better is None]
        if not near:
            return override
        if lost:
            known = listed(sorted(known))
            self.found += [f"`{key}={n}`: there is no such choice; there are {known}" for n in lost]
            self.unread.add((override.package or override.key_or_group).partition(".")[0])
            return None
        mended = [str(near.get(n, n)) for n in names]
        meant = f"[{','.join(mended)}]" if isinstance(value, list) else mended[0]
        return self._meant(override, key, meant)

    def _chosen(self, choices: Sequence[Override]) -> DictConfig:
        """Composes choices step by step: one may bring the groups that another chooses from."""
        done = [o for o in choices if o.is_add() or o.is_delete()]
        waiting = [o for o in choices if o not in done]
        while True:
            cfg = composed(self.name, done) if done else self._bare
            known = [str(key) for key in cfg.hydra.runtime.choices]
            ready = [o for o in waiting if o.get_key_element() in known or self._several(done, o)]
            if not ready:
                ready = [m for o in waiting if (m := self._misplaced(o, known)) is not None]
                waiting = []
            if not ready:
                return cfg
            done += ready
            waiting = [o for o in waiting if o not in ready]

    def _several(self, done: Sequence[Override], override: Override) -> bool:
        """Whether several options are chosen where that is possible: Hydra lists no such places."""
        if not isinstance(override.value(), list):
            return False
        try:
            composed(self.name, [*done, override])
        except Exception:  # there is no such place, or not yet
            return False
        return True

    def _misplaced(self, override: Override, known: Sequence[str]) -> Override | None:
        """A choice at a place where this config has none to make."""
        key, group = override.get_key_element(), override.key_or_group
        same = [k for k in known if k.partition("@")[0] == group]
        if near := nearest(key, same) or (same[0] if len(same) == 1 else None):
            return self._meant(override, near)
        places = same or [k for k in known if not k.startswith("hydra/")]
        self.found.append(f"`{key}`: nothing to choose here; choices are {listed(places)}")
        if override.package is None:
            self.unread.add(group)
        return None


def set_key(cfg: DictConfig, override: Override) -> list[str]:
    """Sets a key, or the one that was probably meant; what is wrong with it."""
    key, value = override.key_or_group, override.value()
    if override.package is not None or "/" in key:
        return [f"`{override.get_key_element()}`: there is no such group to choose from"]
    grows = override.is_add() or override.is_force_add()
    if isinstance(value, dict) and not grows and isinstance(OmegaConf.select(cfg, key), DictConfig):
        found = [_set(cfg, join(key, k), v, override, grows) for k, v in value.items()]
        return [line for lines in found for line in lines]
    return _set(cfg, key, value, override, grows)


def _set(cfg: DictConfig, key: str, value: Any, override: Override, grows: bool) -> list[str]:
    meant, problem = _key(cfg, key.split("."), grows=grows)
    if problem:
        return [f"`{key}`: {problem}"]
    taken = override.is_add() and OmegaConf.select(cfg, meant) is not None
    if taken and not isinstance(value, (dict, list)):
        return [f"`+{key}`: there is one already; write `{key}={shown(value)}`"]
    found = [] if meant == key else [near_miss(key, meant)]
    try:
        if override.is_delete():
            parent, _, last = meant.rpartition(".")
            with open_dict(cfg):
                (OmegaConf.select(cfg, parent) if parent else cfg).pop(last)
        else:
            OmegaConf.update(cfg, meant, value, merge=True, force_add=grows)
    except OmegaConfBaseException as error:
        found.append(f"`{key}={shown(value)}`: {str(error).splitlines()[0]}")
    return found


def _key(cfg: DictConfig, parts: Sequence[str], *, grows: bool) -> tuple[str, str]:
    """The key that a dotted path means, or what is wrong with it."""
    node: Any = cfg
    path = ""
    for i, part in enumerate(parts):
        keys = [str(k) for k in node] if isinstance(node, DictConfig) else []
        if isinstance(node, ListConfig):
            keys = [str(k) for k in range(len(node))]
        if part not in keys:
            if grows and isinstance(node, DictConfig):
                return ".".join([*filter(None, [path]), *parts[i:]]), ""
            if not (near := nearest(part, keys)):
                return "", _unknown(cfg, path, node, keys, parts[-1])
            part = near
        place: Any = int(part) if isinstance(node, ListConfig) else part
        path, rest = f"{path}.{part}".lstrip("."), ".".join(parts[i + 1 :])
        if rest and OmegaConf.is_interpolation(node, place):
            raw = OmegaConf.to_container(node, resolve=False)[place]  # type: ignore[index]
            return "", f"`{path}` is {raw}; write `{raw[2:-1]}.{rest}`"
        if rest and OmegaConf.is_missing(node, place):
            return "", f"`{path}` has no value yet"
        node = None if OmegaConf.is_missing(node, place) or not rest else node[place]
    return path, ""


def _unknown(cfg: DictConfig, path: str, node: Any, keys: Sequence[str], last: str) -> str:
    if path and not isinstance(node, (DictConfig, ListConfig)):
        return f"`{path}` is {shown(node)} and has no keys"
    elsewhere = [] if path else list(_places(cfg, last, ""))[:3]
    if elsewhere:
        return f"did you mean {listed([f'`{p}`' for p in elsewhere], 'or')}?"
    own = [k for k in keys if k != "hydra" and not k.startswith("_")]
    return f"there is no such key; {f'`{path}` has' if path else 'there are'} {listed(own)}"


def _places(node: Any, last: str, path: str) -> Iterator[str]:
    """Where a key of this name stands, outside Hydra's own part."""
    if not isinstance(node, DictConfig) or path == "hydra":
        return
    for key in map(str, node):
        if key == last:
            yield join(path, key)
        if not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)):
            yield from _places(node[key], last, join(path, key))
