"""Triplets: how much farther negatives are than positives, and which of them count."""

import torch
from torch import Tensor

from unlabeled.dist import gather, world_size
from unlabeled.parts.precision import full_precision


@full_precision
def gaps(pairs: Tensor, others: Tensor) -> Tensor:
    """(B, 2, N): D(x, x+) - D(x, n) by cosine, of both of a pair as anchors x.

    Args:
        pairs: (B, 2, D) unit rows.
        others: (N, D) unit rows n.
    """
    positive = (pairs[:, 0] * pairs[:, 1]).sum(1)  # D = 1 - cos: the ones cancel
    return pairs @ others.T - positive[:, None, None]


def selected(cost: Tensor, allowed: Tensor, noise: Tensor, hard: int, drawn: int) -> Tensor:
    """(B, N) bool: for each row its `hard` largest costs, and `drawn` others.

    Args:
        cost: (B, N) of negatives.
        allowed: (B, N) bool, which of them are some; where these are too few, all are taken.
        noise: (B, N), finite: of the others, those with most of it are taken.
        hard: how many.
        drawn: how many.
    """
    taken = torch.zeros_like(allowed)
    for count, score in ((hard, cost), (drawn, noise)):
        left = score.masked_fill(~allowed | taken, -torch.inf)
        best = left.topk(min(count, left.shape[1]), dim=1).indices
        taken = taken.scatter(1, best, True) & allowed
    return taken


def average(part: Tensor, whole: Tensor) -> Tensor:
    """The sum of `part` (B,) over that of `whole` (B,); the mean over processes is that of all."""
    return part.sum() * world_size() / gather(whole).sum().clamp(min=1)
