"""Weighted k-nearest-neighbour classification by cosine similarity (Wu et al., 2018)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.evaluate.accuracy import label_rank, tops
from unlabeled.evaluate.contract import Data, Features, Request, Result, Shapes

QUERIES, BANK = 512, 8192  # rows of a chunk: 4 M similarities at a time


class KNN:
    """Every image of the bank near a query votes for its class with weight exp(s / t).

    A single search serves all numbers of neighbours and temperatures.

    Args:
        k: numbers of neighbours.
        temperature: values of t.
        stage: whose average-pooled features are compared; "final" is the backbone's output.
        leave_one_out: classify the training images, each by all others, where there is no
            test split.
        data: another data module than the run's.
    """

    def __init__(
        self,
        *,
        k: Sequence[int] = (1, 20),
        temperature: Sequence[float] = (0.07,),
        stage: str = "final",
        leave_one_out: bool = False,
        data: Data | None = None,
    ) -> None:
        if not k or min(k) < 1:
            raise ValueError(f"k must list numbers of neighbours of at least 1, got {list(k)}")
        if not temperature or min(temperature) <= 0:
            raise ValueError(f"temperature must list positive numbers, got {list(temperature)}")
        self.k, self.temperature = tuple(k), tuple(temperature)
        self.stage, self.leave_one_out, self.data = stage, leave_one_out, data
        self.splits = frozenset({"train"} if leave_one_out else {"train", "test"})

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
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and positions (n, k) of the k nearest rows of a bank, best first.

    Equal similarities are ordered by position. Memory is bounded whatever the sizes.

    Args:
        queries: (n, d).
        bank: (m, d).
        k: how many.
        skip_self: row i of the bank is query i and no neighbour of it.
        device: where the products are made; the answer is on the CPU.
    """
    most = len(bank) - skip_self
    if k > most:
        raise ValueError(f"k = {k} neighbours, but the training set holds only {most} images")
    found = []
    for first in range(0, len(queries), QUERIES):
        q = F.normalize(queries[first : first + QUERIES].to(device).float(), dim=1)
        best = torch.empty(len(q), 0, dtype=torch.int64, device=device)
        for start in range(0, len(bank), BANK):
            b = F.normalize(bank[start : start + BANK].to(device).float(), dim=1)
            keys = _keys(q @ b.T, start)
            if skip_self:
                own = torch.arange(first, first + len(q), device=device)[:, None] - start
                columns = torch.arange(len(b), device=device)
                keys.masked_fill_(columns == own, torch.iinfo(torch.int64).min)
            both = torch.cat([best, keys], dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1).values
        found.append(best.cpu())
    return _unkey(torch.cat(found))


def _keys(similarity: Tensor, start: int) -> Tensor:
    """One integer per entry that sorts by similarity, then by lower position.

    `topk` promises no order among equals. The bits of a float sort like an integer once those
    of negative numbers are turned round; they go above 32 bits of position.
    """
    bits = (similarity + 0.0).view(torch.int32).long()  # + 0.0: there is no minus zero
    bits = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    place = torch.arange(start, start + similarity.shape[1], device=similarity.device)
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
