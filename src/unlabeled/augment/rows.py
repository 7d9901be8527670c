"""Ops that treat every row of a batch differently, without waiting for the device."""

from collections.abc import Callable, Iterator

from torch import Tensor

from unlabeled.draws import to

CACHED = 1 << 18  # numbers of a part on a CPU, 1 MB


def spread(values: Tensor, x: Tensor) -> Tensor:
    """One number per row (B,), on x's device and shaped to be multiplied with x (B, ...)."""
    return to(values, x.device).view(-1, *[1] * (x.ndim - 1))


def parts(x: Tensor) -> Iterator[slice]:
    """Runs of rows of x (B, ...) whose temporary copies stay in a CPU's cache.

    Fresh memory costs a CPU more than arithmetic. On other devices there is one part: all rows.
    """
    step = max(1, CACHED * len(x) // max(1, x.numel())) if x.device.type == "cpu" else len(x)
    for start in range(0, len(x), max(1, step)):
        yield slice(start, start + step)


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
