"""Backbones from a node of configuration that may come from someone else's file."""

from collections.abc import Mapping
from importlib import import_module
from inspect import isclass, isfunction, signature
from typing import Any

from torch import nn

PACKAGE = "unlabeled.backbones"
NOT_BACKBONES = (f"{PACKAGE}.build", f"{PACKAGE}.load")  # these read files and build others


def build(config: Mapping[str, Any]) -> Any:
    """What a node with `_target_` describes, nested nodes first.

    Only public classes and functions of `unlabeled.backbones` are called, because the node may
    come from a file that someone else made.
    """
    target = config.get("_target_")
    made = _resolve(target)
    ignored = ("_target_", "_convert_", "_recursive_")
    arguments = {key: _build_value(v) for key, v in config.items() if key not in ignored}
    try:
        signature(made).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{target}: {error}") from error
    return made(**arguments)


def _resolve(target: Any) -> Any:
    module, _, name = str(target).rpartition(".")
    if module.rpartition(".")[0] == PACKAGE and not name.startswith("_"):
        try:
            made = getattr(import_module(module), name, None)
        except ImportError:
            made = None
        # What a module merely imports (`torch`, `Path`) is not its own.
        fits = isfunction(made) or (isclass(made) and issubclass(made, nn.Module))
        if fits and made.__module__ == module and module not in NOT_BACKBONES:
            return made
    raise ValueError(f"a backbone's _target_ must be a class or function of {PACKAGE}.*: {target}")


def _build_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value)
        return {key: _build_value(v) for key, v in value.items()}
    return [_build_value(v) for v in value] if isinstance(value, (list, tuple)) else value
