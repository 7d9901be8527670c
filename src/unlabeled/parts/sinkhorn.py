"""Equal partition of a batch over prototypes (Cuturi, 2013; Caron et al., 2020)."""

import math

import torch
from torch import Tensor

from unlabeled.parts.precision import full_precision


@torch.no_grad()
@full_precision
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments (B, K) of the *global* batch: rows sum to 1, columns tend to B / K.

    Alternates normalising prototypes and samples, in logarithms: exp(1 / 0.05) overflows
    half precision. Each iteration ends on the samples, as in the paper's code, so only their
    sums are exact after three.

    Args:
        scores: (B, K) products of embeddings and prototypes.
        epsilon: entropy weight; smaller is harder.
        iterations: of prototypes, then samples.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    q = scores / epsilon
    b, k = q.shape
    for _ in range(iterations):
        q = q - q.logsumexp(0, keepdim=True) - math.log(k)
        q = q - q.logsumexp(1, keepdim=True) - math.log(b)
    return (q + math.log(b)).exp()
