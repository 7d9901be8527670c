"""Checks the overrides of a command line against the config tree, before Hydra merges them.

Hydra stops at the first mistake and names no near miss; here every mistake is a line.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from unlabeled import config
from unlabeled.explain import Explanation
from unlabeled.tree import composed, options, parsed

MOST_JOBS = 64  # combinations of choices of a sweep that are all composed


def mistakes(
    conf: Path,
    name: str,
    lines: Sequence[str],
    *,
    sweep: bool = False,
    targets: bool = True,
    more: str | None = None,
) -> list[str]:
    """What is wrong with a command line, over all jobs of a sweep.

    Args:
        conf: the folder of the config tree.
        name: the root config in it.
        lines: overrides as they were typed.
        sweep: whether several values of a key are several jobs. They also are where the config
            says `hydra.mode: MULTIRUN`, and a sweep's jobs are also those of its
            `hydra.sweeper.params`.
        targets: import the targets too and compare their arguments.
        more: another folder of configs beside `conf`.
    """
    with initialize_config_dir(str(conf.absolute()), version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        if more is not None:
            path = f"file://{Path(more).absolute()}"
            loader.config_search_path.prepend("command-line", path, SearchPathQuery("schema", None))
            loader.repository.initialize_sources(loader.config_search_path)
        first = _first(loader, name, lines)
        hydra = {} if first is None else first.hydra
        sweep = sweep or hydra.get("mode") == RunMode.MULTIRUN
        if sweep:
            lines = [*_of_sweeper(hydra, lines), *lines]
        read = [parse(line, sweep=sweep, loader=loader) for line in lines]
        found = [problem for override, problem in read if override is None]
        overrides = [override for override, _ in read if override is not None]
        swept = {o.get_key_element() for o in overrides if o.is_sweep_override()}
        todo = list(jobs(loader, overrides))
        same = first if not sweep and not found else None  # the only job, composed already
        where: dict[str, list[str]] = {}  # mistake -> the jobs that have it
        for job in todo:
            label = " ".join(str(o.input_line) for o in job if o.get_key_element() in swept)
            for line in _of_job(loader, name, job, targets=targets, cfg=same):
                where.setdefault(line, []).append(label)
    common = len(todo)
    found += [m if len(at) == common else f"{m} (with {at[0]})" for m, at in where.items()]
    return list(dict.fromkeys(found))


def _first(loader: ConfigLoader, name: str, lines: Sequence[str]) -> DictConfig | None:
    """The config of the first job on a command line, if there is one: it may ask for a sweep."""
    read = [parse(line, sweep=True, loader=loader)[0] for line in lines]
    try:
        return composed(name, next(jobs(loader, [o for o in read if o is not None])))
    except Exception:  # told later, with all other mistakes
        return None


def _of_sweeper(hydra: Any, lines: Sequence[str]) -> list[str]:
    """What `hydra.sweeper.params` sweeps over, as overrides; the command line's win."""
    params = hydra.get("sweeper", {}).get("params") or {}
    typed = {line.lstrip("+").partition("=")[0] for line in lines}
    return [f"{key}={value}" for key, value in params.items() if key.lstrip("+") not in typed]


def _of_job(
    loader: ConfigLoader,
    name: str,
    job: Sequence[Override],
    *,
    targets: bool,
    cfg: DictConfig | None,
) -> list[str]:
    found: list[str] = []
    try:
        cfg = cfg or composed(name, job)
    except Exception as error:  # one mistake, and perhaps not the only one
        explanation = Explanation(loader, name)
        cfg = explanation.of(job, error)
        found = explanation.found
    if cfg is not None and targets:
        with open_dict(cfg):
            cfg.pop("hydra", None)
        found += config.mistakes(cfg)
    return list(dict.fromkeys(found))


def parse(line: str, *, sweep: bool, loader: ConfigLoader) -> tuple[Override | None, str]:
    """An override, or what is wrong with its form."""
    try:
        override = OverridesParser.create(config_loader=loader).parse_overrides([line])[0]
    except Exception as error:
        reason = [r for r in str(error).splitlines() if not r.startswith(("See ", "Error parsing"))]
        return None, f"`{line}`: not an override like key=value ({' '.join(reason)})"
    if not override.key_or_group:
        return None, f"`{line}`: not an override like key=value (there is no key)"
    if override.is_sweep_override() and not sweep:
        key, value = override.get_key_element(), override.get_value_string()
        return None, f"`{line}`: several values need -m; one list is `{key}=[{value}]`"
    return override, ""


def jobs(loader: ConfigLoader, overrides: Sequence[Override]) -> Iterator[list[Override]]:
    """Overrides of every combination of choices, and of every kind of value once.

    Beyond MOST_JOBS combinations, each choice comes once beside the first of the others.
    """
    values = [_values(loader, o) for o in overrides]
    is_group = [bool(options(loader, o.key_or_group)) for o in overrides]
    groups = [v if g else v[:1] for v, g in zip(values, is_group, strict=True)]
    if math.prod(map(len, groups)) <= MOST_JOBS:
        yield from map(list, itertools.product(*groups))
    else:
        yield from _one_by_one(groups)
    swept = [v[:1] if g else v for v, g in zip(values, is_group, strict=True)]
    yield from itertools.islice(_one_by_one(swept), 1, None)  # without the first, done above


def _one_by_one(choices: Sequence[list[Override]]) -> Iterator[list[Override]]:
    """The first of each, then every other one beside the first of the rest."""
    first = [several[0] for several in choices]
    yield first
    for i, several in enumerate(choices):
        yield from ([*first[:i], one, *first[i + 1 :]] for one in several[1:])


def _values(loader: ConfigLoader, override: Override) -> list[Override]:
    """A swept override as single ones; numbers of one type count as one."""
    if not override.is_sweep_override():
        return [override]
    if override.is_discrete_sweep():
        values = list(override.sweep_string_iterator())
    else:
        values = [str(override.value().start)]  # type: ignore[union-attr]
    single = [parsed(f"{override.get_key_element()}={value}") for value in values]
    if options(loader, override.key_or_group):
        return single
    kinds: dict[Any, Override] = {}
    for one in single:
        value = one.value()
        kinds.setdefault(type(value) if isinstance(value, (int, float)) else str(value), one)
    return list(kinds.values())
