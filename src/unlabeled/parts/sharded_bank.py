"""A memory bank that no process holds whole, for training sets of 10^8 images and more.

Every process keeps an equal contiguous part of the rows. A row is read by adding up what all
processes have of it, and one of them has all, so that sums are exact; updates travel as they do
for a whole bank, and each process applies those of its own rows. Nothing depends on the number of
processes, which may change when a run goes on.

Why not a file that is mapped into memory: between two checkpoints it would move on, and a run that
is killed could not go back to the checkpoint's bank without a journal of all rows overwritten
since; nor do network file systems show nodes one another's writes in order.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.dist import gather, mine, rank, reduce_sum, world_size
from unlabeled.draws import Draws
from unlabeled.parts.memory import ROWS, Kept, Memory, MemoryBank, first_rows, moved


class ShardedBank(Memory):
    """As `MemoryBank`, its rows shared out: see there.

    Every process must make the same calls, `state_dict` too: a checkpoint holds the whole bank,
    as any other one's, which the first process collects in its host's memory.
    """

    shard: Tensor

    def __init__(
        self, size: int, dim: int, momentum: float = 0.5, *, dtype: Kept = "float32"
    ) -> None:
        super().__init__(dtype)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.size, self.dim, self.momentum = size, dim, momentum
        self.share = -(-size // world_size())
        self.first = rank() * self.share
        # One row more: what other processes' images are written to, and never read.
        shard = torch.zeros(self.share + 1, dim, dtype=self.dtype)
        self.register_buffer("shard", shard, persistent=False)

    def fill(self, draws: Draws, *, unit: bool = True) -> None:
        """See `MemoryBank`: the same rows. Each process draws all and keeps its own."""
        for start, rows in first_rows(self.size, self.dim, draws, unit=unit):
            self._keep(start, rows)

    def _keep(self, start: int, rows: Tensor) -> None:
        """Writes those of the bank's rows from `start` on that lie here."""
        low = max(start, self.first)
        high = min(start + len(rows), self.first + self.share)
        if low < high:
            self.shard[low - self.first : high - self.first] = rows[low - start : high - start]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Copies of the rows (B, ..., dim) of an index (B, ...) of this process."""
        return mine(self.shared(gather(index)))

    @torch.no_grad()
    def shared(self, index: Tensor) -> Tensor:
        """Copies of rows of an index that is the same in every process (negatives)."""
        place, own = self._places(index)
        rows = F.embedding(place, self.shard)
        return reduce_sum(torch.where(own[..., None], rows, torch.zeros_like(rows)))

    def everything(self) -> Tensor:
        """All rows (size, dim), in every process: only for small sets."""
        return gather(self.shard[: self.share])[: self.size].clone()

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor, rows: Sequence[int] | None = None) -> None:
        """See `MemoryBank`."""
        index, z = gather(index, rows), gather(z, rows)
        place, _ = self._places(index)
        self.shard.index_copy_(0, place, moved(self.shard[place], index, z, self.momentum))

    def _places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the shard, the spare one where they lie elsewhere, and whether they lie here."""
        place = index - self.first
        own = (place >= 0) & (place < self.share)
        return place.where(own, place.new_tensor(self.share)), own

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        first = rank() == 0
        bank = self.shard.new_empty((self.size if first else 0, self.dim), device="cpu")
        for start in range(0, self.share, ROWS):
            rows = self.shard[start : min(start + ROWS, self.share)]
            for process, part in enumerate(gather(rows).split(len(rows)) if len(rows) else ()):
                low = process * self.share + start
                if first and low < self.size:
                    bank[low : low + len(part)] = part[: self.size - low].cpu()
        destination[f"{prefix}bank"] = bank

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        key = f"{prefix}bank"
        if key not in state_dict:
            missing_keys.append(key)
            return
        self.refuse_other(key, state_dict[key], (self.size, self.dim))
        self._keep(0, state_dict[key])


def memory_bank(
    size: int,
    dim: int,
    momentum: float,
    *,
    storage: Literal["whole", "sharded"] = "whole",
    dtype: Kept = "float32",
) -> MemoryBank | ShardedBank:
    """A bank by how it is stored.

    Args:
        size: images.
        dim: width of an embedding.
        momentum: of the moving average.
        storage: "whole" in every process, or "sharded" over them.
        dtype: of what is kept: "float32", or half of it in "bfloat16" or "float16".
    """
    if storage not in ("whole", "sharded"):
        raise ValueError(f"bank.storage must be whole or sharded, got {storage!r}")
    made = MemoryBank if storage == "whole" else ShardedBank
    return made(size, dim, momentum, dtype=dtype)
