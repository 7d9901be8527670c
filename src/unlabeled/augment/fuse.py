"""Small operations on pixels as one kernel, by torch.compile, where an augmentation asks for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps

import torch
from torch import Tensor

Function = Callable[..., Tensor]
_asked: ContextVar[bool] = ContextVar("fused", default=False)


@contextmanager
def fused(on: bool) -> Iterator[None]:
    """Within it, what is `fusible` runs compiled, if `on`."""
    before = _asked.set(on)
    try:
        yield
    finally:
        _asked.reset(before)


def fusible(*, writes: bool) -> Callable[[Function], Function]:
    """For a function of tensors alone, with neither draws nor waiting, that `fused` may compile.

    Whole augmentations are not compiled: what they draw is another number of rows at every step.
    Here sizes are symbols, so that a kernel is made once.

    Args:
        writes: whether it writes its result into its first argument.
    """

    def decorate(function: Function) -> Function:
        @wraps(function)
        def call(*tensors: Tensor) -> Tensor:
            if not _asked.get():
                return function(*tensors)
            if not writes:
                return compiled(function)(*tensors)
            # Into a copy: kernels of PyTorch 2.14 write wrong numbers into a tensor that begins
            # in the middle of its memory, as some rows of a batch do.
            x, *rest = tensors
            return x.copy_(compiled(function)(x.clone(), *rest))

        return call

    return decorate


@cache
def compiled(function: Function) -> Function:
    """The function's kernel, which is made when it is first called."""
    return torch.compile(function, dynamic=True)
