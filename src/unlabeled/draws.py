"""Random numbers as a function of (seed, purpose, step, sample), and of nothing else.

A run that stops and goes on, has more workers or is spread over more processes draws the same
numbers for the same images, because nothing here depends on what was drawn before.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def seed_of(*key: int | str) -> int:
    """A well-mixed 63-bit seed for a key, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """Random numbers for the rows of one global batch.

    Every call draws for the rows of all processes and returns those of this one (processes
    hold contiguous slices in order of rank), so the numbers of an image do not depend on how
    many processes share the batch. Numbers are drawn on the CPU: whoever needs to know on the
    host which rows were chosen knows it without waiting for the device. `to` moves them.

    Args:
        key: names the draw, e.g. (seed, "augment", step).
        rows: rows of this process, B.
        rank: this process.
        world: number of processes, each with `rows` rows.
    """

    def __init__(self, *key: int | str, rows: int = 1, rank: int = 0, world: int = 1) -> None:
        self.key, self.rows, self.rank, self.world = key, rows, rank, world
        self.generator = torch.Generator().manual_seed(seed_of(*key))

    def fork(self, name: int | str) -> "Draws":
        """Independent draws for a part (a view, an op): adding one part does not move others."""
        return Draws(*self.key, name, rows=self.rows, rank=self.rank, world=self.world)

    def times(self, parts: int) -> "Draws":
        """Draws for rows that have `parts` parts each (tiles, frames), row-major: B * parts."""
        return Draws(*self.key, "parts", rows=self.rows * parts, rank=self.rank, world=self.world)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(rows, *shape) float32 in [low, high)."""
        u = torch.rand(self.rows * self.world, *shape, generator=self.generator)
        return self._mine(low + (high - low) * u)

    def normal(self, *shape: int) -> Tensor:
        """(rows, *shape) float32, standard normal."""
        return self._mine(torch.randn(self.rows * self.world, *shape, generator=self.generator))

    def chance(self, p: float) -> Tensor:
        """(rows,) bool, true with probability p."""
        return self.uniform() < p

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        """(rows, *shape) int64 in [low, high)."""
        size = (self.rows * self.world, *shape)
        return self._mine(torch.randint(low, high, size, generator=self.generator))

    def permutations(self, n: int) -> Tensor:
        """(rows, n) int64: one random order of n things for each row."""
        return self.uniform(n).argsort(1)

    def _mine(self, x: Tensor) -> Tensor:
        return x[self.rank * self.rows : (self.rank + 1) * self.rows]


def to(x: Tensor, device: torch.device | str) -> Tensor:
    """A small tensor of draws on `device`, copied without waiting where that needs a copy."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def where(flags: Tensor) -> Tensor:
    """Positions (int64) of the true entries of a flag per row, on the CPU."""
    return flags.nonzero().flatten()


def shuffled(n: int, *key: int | str) -> Tensor:
    """A random order of range(n) under a key (n,) int64."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*key)))


def subset(labels: Sequence[int] | None, n: int, limit: int, *key: int | str) -> Tensor:
    """Sorted positions of `limit` of n samples, balanced over classes where there are labels.

    Classes take turns in order of their number until the limit is reached, so class counts
    differ by at most one as long as no class runs out.
    """
    order = shuffled(n, *key)
    if labels is not None:
        y = torch.as_tensor(labels)[order]
        by_class = y.argsort(stable=True)
        counts = y.bincount(minlength=1)
        starts = counts.cumsum(0) - counts
        turn = torch.empty(n, dtype=torch.int64)  # an image's place within its class
        turn[by_class] = torch.arange(n) - starts[y[by_class]]
        order = order[(turn * (int(y.max()) + 1) + y).argsort(stable=True)]
    return order[:limit].sort().values
