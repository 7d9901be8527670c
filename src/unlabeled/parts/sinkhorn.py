"""Equal partition of a batch over prototypes (Cuturi, 2013; Caron et al., 2020)."""

import torch
from torch import Tensor

from unlabeled.dist import gather
from unlabeled.parts.precision import full_precision


@torch.no_grad()
@full_precision
def sinkhorn(
    scores: Tensor, epsilon: float = 0.05, iterations: int = 3, *, shared: bool = False
) -> Tensor:
    """Soft assignments (B, K) of the *global* batch: rows sum to 1, columns tend to B / K.

    Alternates normalising prototypes and samples, in logarithms: exp(1 / 0.05) overflows
    half precision. Each iteration ends on the samples, as in the paper's code, so only their
    sums are exact after three. The paper's factors B and K cancel and are left out.

    Args:
        scores: (B, K) products of embeddings and prototypes.
        epsilon: entropy weight; smaller is harder.
        iterations: of prototypes, then samples.
        shared: the rows are this process's share of the global batch. Processes then exchange
            one number per prototype and iteration, never scores; shares may differ in size.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations of Sinkhorn must be at least 1, got {iterations}")
    q = scores / epsilon
    for _ in range(iterations):
        prototypes = q.logsumexp(0, keepdim=True)
        if shared:
            prototypes = gather(prototypes).logsumexp(0, keepdim=True)
        q = q - prototypes
        q = q - q.logsumexp(1, keepdim=True)
    return q.exp()
