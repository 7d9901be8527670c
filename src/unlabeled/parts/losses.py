"""Losses that two or more methods share: pure functions of global tensors, in full precision."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.parts.precision import full_precision


@full_precision
def info_nce(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Mean of -log exp(q.k/t) / (exp(q.k/t) + sum_n exp(q.n/t)).

    Args:
        q: (B, D) unit queries.
        k: (B, D) their unit positives.
        negatives: (K, D) unit vectors, the same for every query.
        temperature: t.

    Equation 1 of He et al., 2019; equation 3 of Misra & van der Maaten, 2019 has this form.
    """
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.int64))


@full_precision
def binary_nce(scores: Tensor, log_z: Tensor, images: int, temperature: float) -> Tensor:
    """Noise-contrastive estimation: K + 1 two-way problems instead of one (K + 1)-way one.

    With p = exp(s/t) / Z and noise density P = 1 / images,
        l = -log p0 / (p0 + K P) - sum_j log K P / (p_j + K P),
    written with softplus so that no exponential overflows.

    Args:
        scores: (B, 1 + K) cosines, the positive's first.
        log_z: () log of the frozen normaliser Z.
        images: n, the number of images the noise is uniform over.
        temperature: t.

    Equations 6-9 of Wu et al., 2018.
    """
    k = scores.shape[1] - 1
    # log p - log(K P): the log-odds of "data" against "noise"
    odds = scores / temperature - log_z - math.log(k / images)
    return (F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(1)).mean()


@full_precision
def negative_cosine(p: Tensor, z: Tensor, *, stop_gradient: bool = True) -> Tensor:
    """Mean of -cos(p, z) over rows (B, D); z carries no gradient, unless asked to."""
    return -F.cosine_similarity(p, z.detach() if stop_gradient else z, dim=1).mean()


@full_precision
def norm_hinge(h: Tensor, limit: float) -> Tensor:
    """Mean over rows h (B, D) of max(0, |h| - limit)^2.

    A lecture's reading of how embeddings are kept bounded where they are not normalised: rows
    shorter than the limit are free. No paper of this project uses it; it is off by default.
    """
    return F.relu(torch.linalg.vector_norm(h, dim=1) - limit).square().mean()
