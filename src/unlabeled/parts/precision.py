"""Losses in full precision, whatever the network runs in."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function of tensors outside autocast, half-precision arguments (and lists) as float32.

    exp(1 / 0.07) overflows float16, and sums over thousands of entries lose bfloat16's 8 bits.
    float64 stays float64, so that tests can compare with a literal transcription.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        flat = [b for a in args for b in (a if isinstance(a, list | tuple) else [a])]
        device = next((a.device.type for a in flat if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(
                *(_raise(a) for a in args),  # type: ignore[arg-type]
                **{name: _raise(a) for name, a in kwargs.items()},  # type: ignore[arg-type]
            )

    return wrapped


def raised(x: Tensor) -> Tensor:
    """Half-precision numbers as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _raise(x: object) -> object:
    if isinstance(x, Tensor):
        return raised(x)
    if isinstance(x, list | tuple):
        return [_raise(item) for item in x]
    return x
