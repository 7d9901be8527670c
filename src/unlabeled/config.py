"""Finds every mistake in a config before anything is built, and says all of them at once."""

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from unlabeled.annotations import listed, mistake, nearest, plain, shown
from unlabeled.errors import InputError

WORDS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}  # not arguments
ROOT = {  # what belongs to no target
    "seed": int,
    "debug": bool,
    "resume": str | None,
    "baselines": bool,
    "keep_features": bool,
    "features": str | None,
    "feature_dtype": Literal["float32", "float16", "bfloat16"],
    "objective": str | None,
    "compare": list[str],
}
OURS = {"pytorch_lightning.Trainer": {"precision": "auto"}}  # train.py chooses one


def check(cfg: DictConfig) -> None:
    """Imports every target of a composed config and compares it with what it is given.

    Raises:
        InputError: naming every missing value, wrong argument, wrong type, broken reference
            and every target that cannot be imported.
    """
    if found := mistakes(cfg):
        raise InputError(summary(found))


def summary(found: Sequence[str]) -> str:
    """One message for several mistakes, a line each."""
    head = "a mistake in the config" if len(found) == 1 else f"{len(found)} mistakes in the config"
    return "\n  ".join([f"{head}:", *found])


def mistakes(cfg: DictConfig) -> list[str]:
    """A line for each thing that is wrong, in the order of the config."""
    root = [
        line
        for key, annotation in ROOT.items()
        if key in cfg and (line := _type_mistake(cfg, key, key, annotation, ours=True))
    ]
    return list(dict.fromkeys([*root, *_of_node(cfg, "")]))


def join(path: str, key: Any) -> str:
    """`key` below `path`, as it is written on the command line."""
    return f"{path}[{key}]" if isinstance(key, int) else f"{path}.{key}".lstrip(".")


def _of_node(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, DictConfig):
        keys: list[Any] = list(node.keys())
        if "_target_" in keys:
            yield from _of_call(node, path)
        for key in keys:
            hidden = str(key).startswith("_") and key not in WORDS
            if hidden and (near := nearest(key, WORDS)):
                yield f"`{join(path, key)}`: did you mean `{join(path, near)}`?"
    elif isinstance(node, ListConfig):
        keys = list(range(len(node)))
    else:
        return
    for key in keys:
        yield from _of_child(node, key, join(path, key))


def _of_child(parent: DictConfig | ListConfig, key: Any, path: str) -> Iterator[str]:
    if OmegaConf.is_missing(parent, key):
        yield f"`{path}`: no value given"
    elif not OmegaConf.is_interpolation(parent, key):
        yield from _of_node(parent[key], path)
    else:  # what it refers to is checked where it stands
        raw: Any = OmegaConf.to_container(parent, resolve=False)
        try:
            parent[key]
        except InterpolationToMissingValueError:
            pass  # named where it is missing
        except OmegaConfBaseException as error:
            if "${hydra:" not in raw[key]:  # those exist only while a job runs
                reason = str(error).splitlines()[0].replace("raised while resolving ", "")
                yield f"`{path}`: cannot resolve {raw[key]} ({reason})"


def _of_call(node: DictConfig, path: str) -> Iterator[str]:
    if OmegaConf.is_missing(node, "_target_"):
        return
    name = str(node["_target_"])
    target, problem = _locate(name)
    if target is None:
        yield f"`{join(path, '_target_')}`: {problem}"
        return
    try:
        signature = inspect.signature(target).parameters
    except ValueError:  # written in C, without a signature
        return
    short = name.rpartition(".")[2]
    given = [str(key) for key in node if key not in WORDS]
    any_name = any(p.kind is p.VAR_KEYWORD for p in signature.values())
    named = {n: p for n, p in signature.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for key in given if not any_name else []:
        if key not in named:
            near = nearest(key, named.keys() - set(given)) or nearest(key, named)
            hint = f"did you mean `{join(path, near)}`?" if near else f"it takes {listed(named)}"
            yield f"`{join(path, key)}`: {short} takes no `{key}`; {hint}"
    if not node.get("_partial_") and "_args_" not in node:
        for key, parameter in named.items():
            if parameter.default is parameter.empty and key not in given:
                yield f"`{join(path, key)}`: no value given ({short} needs `{key}`)"
    hints = _annotations(target, named)
    for key in given:
        if key in hints and OURS.get(name, {}).get(key) != str(node._get_node(key)):
            ours = name.startswith("unlabeled.")
            if line := _type_mistake(node, key, join(path, key), hints[key], ours=ours):
                yield line


def _locate(name: str) -> tuple[Callable[..., Any] | None, str]:
    """The object at a dotted path, or None and what is wrong with the path."""
    parts = name.split(".")
    found: Any = None
    for i, part in enumerate(parts):
        path = ".".join(parts[: i + 1])
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path and not isinstance(found, type):
                return None, f"cannot import {name}: {error}"
            names = set(dir(found)) if found is not None else set()
            names |= {m.name for m in pkgutil.iter_modules(getattr(found, "__path__", []))}
            near = nearest(part, names)
            better = ".".join([*parts[:i], near or "", *parts[i + 1 :]])
            hint = f"; did you mean {better}?" if near else ""
            return None, f"there is no {path}{hint}"
        except Exception as error:  # whatever a module does while it is imported
            return None, f"cannot import {name}: {type(error).__name__}: {error}"
    return (found, "") if callable(found) else (None, f"{name} is not callable")


def _annotations(target: Callable[..., Any], named: Mapping[str, inspect.Parameter]) -> Any:
    function = target.__init__ if isinstance(target, type) else target
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # a name that exists only for type checkers
        hints = {n: p.annotation for n, p in named.items() if not isinstance(p.annotation, str)}
    return {n: hints[n] for n, p in named.items() if hints.get(n, p.empty) is not p.empty}


def _type_mistake(node: DictConfig, key: str, path: str, annotation: Any, *, ours: bool) -> str:
    """What is wrong with a plain value under an annotation; empty if nothing is."""
    if OmegaConf.is_missing(node, key) or not (ours or plain(annotation)):
        return ""  # others' annotations may say less than they accept
    try:
        value = node[key]
        if _builds(value):
            return ""
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        return ""  # reported as missing or unresolvable
    if problem := mistake(value, annotation):
        return f"`{path}={shown(value)}`: {problem}"
    return ""


def _builds(value: Any) -> bool:
    """Whether a value is, or holds, something that Hydra will build."""
    if isinstance(value, DictConfig):
        return "_target_" in value or any(_builds(value[key]) for key in value)
    return isinstance(value, ListConfig) and any(_builds(item) for item in value)
