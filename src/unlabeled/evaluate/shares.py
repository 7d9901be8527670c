"""Work on images that processes share out, and whose results all of them get."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from unlabeled import dist

T = TypeVar("T")


class Share(NamedTuple):
    """This process's part of n items in a row: those from `start` to `stop`.

    Where there are fewer items than processes, those without one work on the first, since what
    they hand in must have its shape, and hand in none of its rows (`spare`).
    """

    start: int
    stop: int
    spare: bool

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """The items themselves."""
        return items[self.start : self.stop]

    def all(self, rows: Tensor, device: torch.device | str) -> Tensor:
        """Rows (N, ...) of all processes in order, on the CPU, from this process's (n, ...).

        Every process must call.
        """
        if dist.world_size() == 1:
            return rows
        here = (rows[:0] if self.spare else rows).detach().to(device)
        return dist.gather(here, rows=dist.all_rows(here)).cpu()


def share(n: int) -> Share:
    """The part of n items that is this process's."""
    start, stop = (n * r // dist.world_size() for r in (dist.rank(), dist.rank() + 1))
    return Share(start, stop, False) if stop > start else Share(0, min(1, n), True)
