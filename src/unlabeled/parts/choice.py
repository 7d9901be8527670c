"""Which key is a query's own: a softmax over scores, in bounded memory."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unlabeled.parts.precision import full_precision


@full_precision
def choice(
    queries: Tensor, keys: Tensor, own: Tensor, others: Tensor | None, chunk: int | None = None
) -> Tensor:
    """Mean over queries of -log exp(q.k_own) / sum_j exp(q.k_j), and how often k_own wins: (2,).

    Args:
        queries: (Q, D).
        keys: (N, D).
        own: (Q,) which key is a query's own.
        others: (Q, K) which keys compete with it; None: all others.
        chunk: queries whose scores exist at a time; they are computed again for the gradient.
    """
    step = len(queries) if chunk is None else chunk
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    sums = []
    for i in range(0, len(queries), step):
        some = None if others is None else others[i : i + step]
        given = queries[i : i + step], keys, own[i : i + step], some
        sums.append(_sums(*given) if chunk is None else again(_sums, *given))
    return torch.stack(sums).sum(0) / len(queries)


def companions(own: Tensor, size: int) -> Tensor:
    """(Q, size - 1) the other keys of each own key's (Q,) group, where `size` in a row are one."""
    place = own % size
    step = torch.arange(1, size, device=own.device)
    return (own - place)[:, None] + (place[:, None] + step) % size


def _sums(queries: Tensor, keys: Tensor, own: Tensor, others: Tensor | None) -> Tensor:
    if others is None:
        scores = queries @ keys.T  # Q N
    else:
        candidates = keys[torch.cat([own[:, None], others], 1)]  # Q 1+K D
        scores = (candidates @ queries[:, :, None]).squeeze(2)
        own = torch.zeros_like(own)
    wins = (scores.detach() >= scores.detach().gather(1, own[:, None])).sum(1) == 1  # no ties
    return torch.stack([F.cross_entropy(scores, own, reduction="sum"), wins.sum().to(scores.dtype)])
