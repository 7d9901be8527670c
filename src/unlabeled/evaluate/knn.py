"""Weighted k-nearest-neighbour classification by cosine similarity (Wu et al., 2018)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.evaluate.accuracy import label_rank, tops
from unlabeled.evaluate.contract import Data, Features, Request, Result, Shapes
from unlabeled.evaluate.forward import SOUND

QUERIES, BANK = 4096, 8192  # most rows of a chunk: 32 M similarities at a time
SPARE = 32  # candidates beyond the neighbours asked for
ROUNDING = 2e-6  # by which a float32 product of unit vectors may be wrong
NUMBERS = 1 << 24  # features of a chunk's rows
LEAST = torch.iinfo(torch.int64).min  # the key of what is no neighbour
Search = Literal["auto", "torch", "faiss"]
Near = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class KNN:
    """Every image of the bank near a query votes for its class with weight exp(s / t).

    A single search, exact and in bounded memory, serves all numbers of neighbours and
    temperatures. Of equally similar images the earlier ones are nearer, and of classes with equal
    votes the first one wins.

    Args:
        k: numbers of neighbours.
        temperature: values of t.
        stage: whose average-pooled features are compared; "final" is the backbone's output.
        leave_one_out: classify the training images, each by all others, where there is no
            test split.
        search: "torch" searches on the run's device and "faiss" on the CPU, several times faster
            than torch there; "auto" is faiss for runs on a CPU. Both find the same.
        data: another data module than the run's.
    """

    def __init__(
        self,
        *,
        k: Sequence[int] = (1, 20),
        temperature: Sequence[float] = (0.07,),
        stage: str = "final",
        leave_one_out: bool = False,
        search: Search = "auto",
        data: Data | None = None,
    ) -> None:
        if not k or min(k) < 1:
            raise ValueError(f"k must list numbers of neighbours of at least 1, got {list(k)}")
        if not temperature or min(temperature) <= 0:
            raise ValueError(f"temperature must list positive numbers, got {list(temperature)}")
        if search not in get_args(Search):
            raise ValueError(f"search must be auto, torch or faiss, got {search!r}")
        self.search: Search = search
        self.k, self.temperature = tuple(k), tuple(temperature)
        self.stage, self.leave_one_out, self.data = stage, leave_one_out, data
        self.splits = frozenset({"train"} if leave_one_out else {"train", "test"})
        self.hears = stage == SOUND

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        n, k = data.size("train") - self.leave_one_out, max(self.k)
        return f"k = {k} neighbours are more than the {n} training images" if k > n else None

    def requests(self, shapes: Shapes) -> set[Request]:
        return {shapes.named(self.stage)}

    def __call__(self, features: Features) -> Result:
        request = features.shapes.named(self.stage)
        split = "train" if self.leave_one_out else "test"
        bank = features.splits["train"][request].flatten(1)
        similarity, near = search(
            features.splits[split][request].flatten(1),
            bank,
            max(self.k),
            skip_self=self.leave_one_out,
            device=features.device,
            by=self.search,
        )
        votes, labels = features.labels["train"][near], features.labels[split]
        scores, details, per_image = {}, {}, {}
        for k in self.k:
            for t in self.temperature:
                weights = vote(similarity[:, :k], votes[:, :k], features.classes, t)
                for top, right in tops(label_rank(weights, labels), features.classes).items():
                    name = f"k{k}_t{t:g}/{top}"
                    scores[name], per_image[name] = right.double().mean().item(), right
                    details[name] = {
                        "protocol": "weighted cosine kNN, leave one out"
                        if self.leave_one_out
                        else "weighted cosine kNN",
                        "stage": request.stage,
                        "hyperparameters": {"k": k, "temperature": t},
                        "selection": "none: k and temperature are given",
                        "bank": len(bank),
                    }
        return Result(scores, details, per_image)


def search(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    skip_self: bool = False,
    device: torch.device | str = "cpu",
    by: Search = "auto",
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and positions (n, k) of the k nearest rows of a bank, best first.

    Equal similarities are ordered by position. Memory is bounded whatever the sizes. Where
    products in float32 are too close to say which is larger, float64 decides: which neighbours
    are found depends neither on chunks nor on who made the products, and equal rows are equally
    similar.

    Args:
        queries: (n, d).
        bank: (m, d).
        k: how many.
        skip_self: row i of the bank is query i and no neighbour of it.
        device: where the products are made; the answer is on the CPU.
        by: who makes them; "auto" is faiss on a CPU.
    """
    most = len(bank) - skip_self
    if k > most:
        raise ValueError(f"k = {k} neighbours, but the training set holds only {most} images")
    device = torch.device(device)
    faiss = by == "faiss" or (by == "auto" and device.type == "cpu")
    count = min(len(bank), k + skip_self + SPARE)
    found = [torch.empty(0, k, dtype=torch.int64)]
    for rows in torch.arange(len(queries)).split(QUERIES):
        q = queries[rows]
        near = _by_faiss if faiss else _by_torch
        similarity, place = _candidates(q, bank, count, near, "cpu" if faiss else device)
        own = rows[:, None] if skip_self else torch.full((len(q), 1), -1)
        keys = _key(_decided(q, bank, similarity, place), place).masked_fill_(place == own, LEAST)
        best = keys.topk(k, dim=1).values
        if count < len(bank):  # something as near may have been no candidate
            unsure = _unkey(best[:, -1])[0] <= similarity[:, -1] + ROUNDING
            best[unsure] = _among_all(q[unsure], bank, k, own[unsure], device)
        found.append(best)
    return _unkey(torch.cat(found))


def _candidates(
    q: Tensor, bank: Tensor, count: int, near: Near, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Similarities and positions (R, count) of rows of the bank, about the nearest, best first."""
    q = F.normalize(q.to(device).float(), dim=1)
    best = torch.empty(len(q), 0, device=device)
    place = torch.empty(len(q), 0, dtype=torch.int64, device=device)
    for start, rows in _chunks(bank):
        b = F.normalize(rows.to(device).float(), dim=1)
        similarity, at = near(q, b, min(count, len(b)))
        best, place = torch.cat([best, similarity], dim=1), torch.cat([place, at + start], dim=1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        place = place.gather(1, order)
    return best.cpu(), place.cpu()


def _chunks(bank: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, min(BANK, NUMBERS // bank.shape[1]))
    for start in range(0, len(bank), step):
        yield start, bank[start : start + step]


def _by_torch(q: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    similarity, place = (q @ b.T).topk(count, dim=1)
    return similarity, place


def _by_faiss(q: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    import faiss  # heavy

    faiss.omp_set_num_threads(torch.get_num_threads())
    found = faiss.knn(q.numpy(), b.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _decided(q: Tensor, bank: Tensor, similarity: Tensor, place: Tensor) -> Tensor:
    """The similarities (R, c), best first, of rows at `place`; those of close ones from float64."""
    close = similarity[:, :-1] - similarity[:, 1:] <= 2 * ROUNDING
    close = F.pad(close, (0, 1)) | F.pad(close, (1, 0))
    decided, at = similarity.clone(), close.nonzero()
    for some in at.split(max(1, NUMBERS // q.shape[1])):
        row, column = some.unbind(1)
        a = F.normalize(q[row].double(), dim=1)
        b = F.normalize(bank[place[row, column]].double(), dim=1)
        decided[row, column] = (a * b).sum(1).float()
    return decided


def _among_all(q: Tensor, bank: Tensor, k: int, own: Tensor, device: torch.device) -> Tensor:
    """Keys (R, k) of the nearest rows but the one at `own` (R, 1), by products in float64."""
    device = device if device.type == "cuda" else torch.device("cpu")  # others lack float64
    found = [torch.empty(0, k, dtype=torch.int64)]
    for some, itself in zip(q.split(QUERIES // 8), own.split(QUERIES // 8), strict=True):
        x = F.normalize(some.to(device).double(), dim=1)
        best = torch.empty(len(x), 0, dtype=torch.int64, device=device)
        for start, rows in _chunks(bank):
            b = F.normalize(rows.to(device).double(), dim=1)
            keys = _keys((x @ b.T).float(), start)
            columns = torch.arange(start, start + len(b), device=device)
            keys.masked_fill_(columns == itself.to(device), LEAST)
            both = torch.cat([best, keys], dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1).values
        found.append(best.cpu())
    return torch.cat(found)


def _keys(similarity: Tensor, start: int) -> Tensor:
    """One integer per entry that sorts by similarity, then by lower position.

    `topk` promises no order among equals. The bits of a float sort like an integer once those
    of negative numbers are turned round; they go above 32 bits of position.
    """
    place = torch.arange(start, start + similarity.shape[1], device=similarity.device)
    return _key(similarity, place)


def _key(similarity: Tensor, place: Tensor) -> Tensor:
    bits = (similarity + 0.0).view(torch.int32).long()  # + 0.0: there is no minus zero
    bits = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (bits << 32) + (0xFFFFFFFF - place)


def _unkey(keys: Tensor) -> tuple[Tensor, Tensor]:
    bits, place = keys >> 32, 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    magnitude = bits.abs().int().view(torch.float32)
    return torch.where(bits < 0, -magnitude, magnitude), place


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Sums of exp(s / t) per class (n, classes) float64; minus infinity without a vote.

    Args:
        similarity: (n, k), best first.
        labels: (n, k) of the neighbours.
        classes: number of classes.
        temperature: t.
    """
    s = similarity.double()
    weights = ((s - s[:, :1]) / temperature).exp()  # a common factor keeps exp in range
    votes = torch.zeros(len(s), classes, dtype=torch.float64).scatter_add_(1, labels, weights)
    voted = torch.zeros(len(s), classes, dtype=torch.bool)
    voted.scatter_(1, labels, torch.ones_like(labels, dtype=torch.bool))
    return votes.masked_fill(~voted, -torch.inf)
