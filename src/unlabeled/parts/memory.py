"""Memories of past embeddings. They are buffers, so a checkpoint brings them back.

Writes are in place: a bank of ImageNet's size costs 0.3 s to copy. A loss reads copies (rows by
index, a snapshot of the queue), so autograd never meets a tensor that has changed.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.dist import gather
from unlabeled.draws import Draws


class Queue(nn.Module):
    """The last `size` embeddings (size, dim), first in, first out (He et al., 2019).

    Any batch size is allowed: the write position wraps inside a batch too.
    """

    alike = True  # every process makes the same updates: DDP need not send it around
    keys: Tensor
    head: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue holds at least one embedding, got size {size}")
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("head", torch.zeros((), dtype=torch.int64))

    def fill(self, draws: Draws) -> None:
        """Random unit vectors, before the first batch."""
        noise = torch.randn(self.keys.shape, generator=draws.generator)
        self.keys.copy_(F.normalize(noise, dim=1))

    def snapshot(self) -> Tensor:
        """A copy of all keys (size, dim), for the loss: it may be pushed to before backward."""
        return self.keys.clone()

    @torch.no_grad()
    def push(self, keys: Tensor, rows: Sequence[int] | None = None) -> None:
        """Overwrites the oldest rows with the keys (B, dim) of every process, in order of rank.

        Args:
            keys: this process's.
            rows: how many each process has, where these differ: see `gather`.
        """
        keys = gather(keys, rows)[-len(self.keys) :].to(self.keys.dtype)
        place = (self.head + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys.index_copy_(0, place, keys)
        self.head.add_(len(keys)).remainder_(len(self.keys))


class MemoryBank(nn.Module):
    """One unit embedding per training image (size, dim), a moving average (Wu et al., 2018).

    m_i <- norm(momentum * m_i + (1 - momentum) * v_i)
    """

    alike = True
    bank: Tensor

    def __init__(self, size: int, dim: int, momentum: float = 0.5) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.momentum = momentum
        self.register_buffer("bank", torch.zeros(size, dim))

    def fill(self, draws: Draws, *, unit: bool = True) -> None:
        """Random unit vectors, the same in every process.

        Without `unit` rows are uniform in a cube, of mean squared norm 1 (the official code).
        """
        if unit:
            noise = torch.randn(self.bank.shape, generator=draws.generator)
            self.bank.copy_(F.normalize(noise, dim=1))
        else:
            half = math.sqrt(3 / self.bank.shape[1])
            noise = torch.rand(self.bank.shape, generator=draws.generator)
            self.bank.copy_((2 * noise - 1) * half)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Copies of rows (..., dim)."""
        return F.embedding(index, self.bank)

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor, rows: Sequence[int] | None = None) -> None:
        """Moves the rows `index` (B,) towards the embeddings z (B, dim) of every process.

        Of an image that is met twice, the last embedding in order of rank counts alone, so that
        all processes keep the same bank.

        Args:
            index: of the images of this process.
            z: their embeddings.
            rows: how many each process has, where these differ: see `gather`.
        """
        index, z = gather(index, rows), gather(z, rows).to(self.bank.dtype)
        ordered, order = index.sort(stable=True)
        last = order[torch.searchsorted(ordered, index, right=True) - 1]  # of the same image
        mixed = torch.lerp(z[last], self.bank[index], self.momentum)
        self.bank.index_copy_(0, index, F.normalize(mixed, dim=1))
