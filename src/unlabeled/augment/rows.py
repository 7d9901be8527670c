"""Ops that treat every row of a batch differently, without waiting for the device."""

from collections.abc import Callable

from torch import Tensor

from unlabeled.draws import to


def spread(values: Tensor, x: Tensor) -> Tensor:
    """One number per row (B,), on x's device and shaped to be multiplied with x (B, ...)."""
    return to(values, x.device).view(-1, *[1] * (x.ndim - 1))


def on_rows(x: Tensor, rows: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x with `change` applied to some of its rows, written into x.

    Args:
        x: (B, ...).
        rows: their positions, int64, on the CPU: indices, unlike boolean masks, have a size
            that the host knows.
        change: (n, ...) -> (n, ...).
    """
    if not len(rows):
        return x
    index = to(rows, x.device)
    return x.index_copy_(0, index, change(x.index_select(0, index)))


def share(value: float, name: str) -> float:
    """The value, if it is a probability."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability, in [0, 1], got {value}")
    return float(value)
