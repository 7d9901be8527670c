"""Memories of past embeddings. They are buffers, so a checkpoint brings them back.

Writes are in place: a bank of ImageNet's size costs 0.3 s to copy. A loss reads copies (rows by
index, a snapshot of the queue), so autograd never meets a tensor that has changed. Kept in half
precision they take half the room, and losses and moving averages are still computed in float32:
bfloat16 keeps 8 bits of a number and float16, whose range unit vectors never leave, 11.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.dist import gather
from unlabeled.draws import Draws

Kept = Literal["float32", "bfloat16", "float16"]
KEPT = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = 1 << 16  # that are drawn at once


class Memory(nn.Module):
    """Keeps its buffers in a chosen format, whatever the module that holds it is cast to.

    (But for float32 that is cast to float64.) A checkpoint in another format is refused, as a
    cast would change what was saved.
    """

    alike = True  # every process makes the same updates: DDP need not send it around

    def __init__(self, dtype: Kept) -> None:
        super().__init__()
        if dtype not in KEPT:
            raise ValueError(f"a memory's dtype must be one of {', '.join(KEPT)}, got {dtype!r}")
        self.dtype = KEPT[dtype]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(x: Tensor) -> Tensor:
            like = fn(x.new_empty(0))
            wider = like.dtype == torch.float64 and self.dtype == torch.float32
            return fn(x) if like.dtype == x.dtype or wider else x.to(like.device)

        return super()._apply(keep, recurse)

    def refuse_other(self, key: str, saved: Tensor, shape: Sequence[int]) -> None:
        """Raises ValueError where a checkpoint holds a memory of another size or format."""
        if tuple(saved.shape) != tuple(shape):
            raise ValueError(
                f"{key} has shape {tuple(saved.shape)} in the checkpoint and {tuple(shape)} here: "
                "it was made with other data or widths"
            )
        double = saved.dtype == torch.float64 and self.dtype == torch.float32  # 64-true
        if saved.dtype != self.dtype and not double:
            raise ValueError(
                f"{key} is kept in {saved.dtype} in the checkpoint and in {self.dtype} here: set "
                "the memory's dtype to what it was, or begin anew"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, x in self.named_buffers(prefix=prefix.removesuffix(".")):
            if name in state_dict and x.is_floating_point():
                self.refuse_other(name, state_dict[name], x.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Queue(Memory):
    """The last `size` embeddings (size, dim), first in, first out (He et al., 2019).

    Any batch size is allowed: the write position wraps inside a batch too.
    """

    keys: Tensor
    head: Tensor

    def __init__(self, size: int, dim: int, *, dtype: Kept = "float32") -> None:
        super().__init__(dtype)
        if size < 1:
            raise ValueError(f"a queue holds at least one embedding, got size {size}")
        self.register_buffer("keys", torch.zeros(size, dim, dtype=self.dtype))
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


class MemoryBank(Memory):
    """One unit embedding per training image (size, dim), a moving average (Wu et al., 2018).

    m_i <- norm(momentum * m_i + (1 - momentum) * v_i)
    """

    bank: Tensor

    def __init__(
        self, size: int, dim: int, momentum: float = 0.5, *, dtype: Kept = "float32"
    ) -> None:
        super().__init__(dtype)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.size, self.momentum = size, momentum
        self.register_buffer("bank", torch.zeros(size, dim, dtype=self.dtype))

    def fill(self, draws: Draws, *, unit: bool = True) -> None:
        """Random unit vectors, the same in every process.

        Without `unit` rows are uniform in a cube, of mean squared norm 1 (the official code).
        """
        for start, rows in first_rows(self.size, self.bank.shape[1], draws, unit=unit):
            self.bank[start : start + len(rows)] = rows

    def __getitem__(self, index: Tensor) -> Tensor:
        """Copies of rows (..., dim)."""
        return F.embedding(index, self.bank)

    def shared(self, index: Tensor) -> Tensor:
        """Copies of rows of an index that is the same in every process (negatives)."""
        return self[index]

    def everything(self) -> Tensor:
        """A copy of all rows (size, dim)."""
        return self.bank.clone()

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
        index, z = gather(index, rows), gather(z, rows)
        self.bank.index_copy_(0, index, moved(self.bank[index], index, z, self.momentum))


def moved(old: Tensor, index: Tensor, z: Tensor, momentum: float) -> Tensor:
    """What rows `old` (B, dim) of images `index` (B,) become by their embeddings z (B, dim)."""
    ordered, order = index.sort(stable=True)
    last = order[torch.searchsorted(ordered, index, right=True) - 1]  # of the same image
    exact = torch.promote_types(old.dtype, torch.float32)
    mixed = torch.lerp(z[last].to(exact), old.to(exact), momentum)
    return F.normalize(mixed, dim=1).to(old.dtype)


def first_rows(size: int, dim: int, draws: Draws, *, unit: bool) -> Iterator[tuple[int, Tensor]]:
    """A bank's random first rows in pieces: where each starts, and float32 rows (n, dim)."""
    half = math.sqrt(3 / dim)
    for start in range(0, size, ROWS):
        shape = (min(ROWS, size - start), dim)
        if unit:
            yield start, F.normalize(torch.randn(shape, generator=draws.generator), dim=1)
        else:
            yield start, (2 * torch.rand(shape, generator=draws.generator) - 1) * half
