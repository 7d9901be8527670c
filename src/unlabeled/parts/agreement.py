"""Which recordings agree in what is seen and in what is heard: positive sets of CMA."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from unlabeled.dist import gather, rank, world_size
from unlabeled.draws import Draws, to
from unlabeled.parts.memory import MemoryBank
from unlabeled.parts.precision import full_precision
from unlabeled.parts.sharded_bank import ShardedBank

Bank = MemoryBank | ShardedBank
By = Literal["consensus", "union", "video", "audio"]
QUERIES, BLOCK = 1024, 8192  # rows whose similarities are computed at once


@full_precision
def agreement(by: By, video: Tensor, audio: Tensor) -> Tensor:
    """Similarity of recordings from those of their clips and of their sounds, of any shape."""
    if by == "consensus":
        return torch.minimum(video, audio)
    if by == "union":
        return torch.maximum(video, audio)
    return video if by == "video" else audio


@full_precision
def _products(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.T


@torch.no_grad()
def agreeing(video: Bank, audio: Bank, count: int, by: By) -> Tensor:
    """(n, count) int64: the recordings most similar to each, itself left out, nearest first.

    A chunk of queries meets the banks block by block, so memory does not grow with n. Processes
    share the chunks, whose sizes do not depend on how many processes there are.

    On a CPU faiss searches one modality: 20 000 rows of 128 in 2 s of one core, torch 6.6. The
    lesser and the greater of two similarities are no inner product, so torch computes them (7 s).
    Of candidates that faiss finds by each modality, the best are proven the best of all where they
    exceed what both searches left out: 128 candidates are enough for 90 % of rows in 400 classes
    and take 10 s, 512 for nearly all and 31 s; without classes 256 are enough for none.
    """
    n, device = video.size, next(video.buffers()).device
    alone = {"video": video, "audio": audio}.get(by)
    step = min(QUERIES, n)
    found: list[Tensor] = []
    for start in range(0, n, step * world_size()):
        rows = torch.arange(step, device=device) + start + step * rank()
        rows = rows.clamp(max=n - 1)  # of a last chunk: thrown away
        queries = [bank[rows] for bank in ((video, audio) if alone is None else (alone,))]
        best = torch.empty(step, 0, device=device)
        place = torch.empty(step, 0, dtype=torch.int64, device=device)
        for low in range(0, n, BLOCK):
            block = torch.arange(low, min(low + BLOCK, n), device=device)
            most = min(count + 1, len(block))  # itself may be among them
            near, at = (
                _near_both(by, queries, [video.shared(block), audio.shared(block)], most)
                if alone is None
                else _near(queries[0], alone.shared(block), most)
            )
            near = near.to(best.dtype).masked_fill(at + low == rows[:, None], -torch.inf)
            best, order = torch.cat([best, near], 1).sort(dim=1, descending=True, stable=True)
            place = torch.cat([place, at + low], 1).gather(1, order)[:, :count]
            best = best[:, :count]
        found.append(gather(place))
    return torch.cat(found)[:n]


def _near(q: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Similarities and places (R, count) of the rows of a block that are most similar."""
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return _products(q, block).topk(count, dim=1)
    import faiss  # heavy

    faiss.omp_set_num_threads(torch.get_num_threads())
    x, y = (rows.float().contiguous().numpy() for rows in (q, block))
    near, at = faiss.knn(x, y, count, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(near), torch.from_numpy(at)


def _near_both(
    by: By, queries: Sequence[Tensor], blocks: Sequence[Tensor], count: int
) -> tuple[Tensor, Tensor]:
    pairs = (_products(q, block) for q, block in zip(queries, blocks, strict=True))
    return agreement(by, *pairs).topk(count, dim=1)


def others(draws: Draws, n: int, count: int, left_out: Tensor) -> Tensor:
    """(B, count) int64, uniform with replacement on the rows of [0, n) that are not left out.

    Args:
        draws: with a row for each of B.
        n: how many rows there are.
        count: how many are drawn.
        left_out: (B, M) int64, distinct in each row.
    """
    m = left_out.shape[1]
    drawn = to(draws.integers(n - m, count), left_out.device)
    below = left_out.sort(1).values - torch.arange(m, device=left_out.device)
    # `below` counts the rows before each one that is left out: it is passed by what is not less.
    return drawn + torch.searchsorted(below, drawn, right=True)


class Agreement(nn.Module):
    """The positive sets of cross-modal agreement: settings, and what was found last.

    Args:
        by: similarity of recordings: "consensus" (the lesser of both), "union" (the greater),
            "video" or "audio".
        positives: P of each.
        negatives: of those that are drawn for instances, how many their loss takes.
        every_n_epochs: how often they are found again.
        alone: epochs of instance discrimination before the first, in runs that start from nothing.
    """

    alike = True  # in every process
    sets: Tensor  # (n, P) int32
    epoch: Tensor  # () in which they were found; -1 before

    def __init__(
        self,
        *,
        by: By = "consensus",
        positives: int = 32,
        negatives: int = 64,
        every_n_epochs: int = 5,
        alone: int = 30,
    ) -> None:
        super().__init__()
        if by not in ("consensus", "union", "video", "audio"):
            raise ValueError(f"by must be consensus, union, video or audio, got {by!r}")
        least = {"positives": (positives, 1), "negatives": (negatives, 1), "alone": (alone, 1)}
        for name, (value, low) in {**least, "every_n_epochs": (every_n_epochs, 1)}.items():
            if value < low:
                raise ValueError(f"agreement.{name} must be at least {low}, got {value}")
        self.by: By = by
        self.positives, self.negatives = positives, negatives
        self.every, self.alone = every_n_epochs, alone

    def prepare(self, n: int) -> None:
        """Makes room for n recordings."""
        if n < self.positives + 2:
            raise ValueError(
                f"agreement.positives={self.positives} of each recording need "
                f"{self.positives + 2} of them or more, the training set has {n}"
            )
        self.register_buffer("sets", torch.zeros(n, self.positives, dtype=torch.int32))
        self.register_buffer("epoch", torch.tensor(-1))

    def find(self, video: Bank, audio: Bank, epoch: int, first: int) -> bool:
        """Whether there are sets in an epoch; every n epochs from the first on, they are new."""
        if epoch < first:
            return False
        due = first + (epoch - first) // self.every * self.every
        if int(self.epoch) < due:
            self.sets.copy_(agreeing(video, audio, self.positives, self.by))
            self.epoch.fill_(epoch)
        return True

    def __getitem__(self, index: Tensor) -> Tensor:
        """(B, P) int64 of recordings (B,)."""
        return self.sets[index].long()
