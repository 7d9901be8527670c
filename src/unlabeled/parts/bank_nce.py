"""Noise-contrastive estimation against rows of a bank, whose normaliser negatives give (AVID)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.dist import gather, world_size
from unlabeled.parts.precision import full_precision


@full_precision
def similarities(x: Tensor, rows: Tensor) -> Tensor:
    """(B, K): products of x (B, D) with rows (B, K, D) of its own."""
    return torch.einsum("bd,bkd->bk", x, rows)


@full_precision
def positives_nce(positive: Tensor, negative: Tensor, log_e: Tensor, temperature: float) -> Tensor:
    """Mean over rows of binary NCE with one positive or several, which count as one.

    With h(s) = exp(s / t) / (exp(s / t) + K E),
        l = -mean_p log h(s_p) - sum_j log(1 - h(s_j)).

    Args:
        positive: (B, P) cosines.
        negative: (B, K) cosines.
        log_e: () log of E, the mean of exp(s / t) over negatives of the first batch.
        temperature: t.
    """
    shift = log_e + math.log(negative.shape[1])
    own = F.softplus(shift - positive / temperature).mean(1)
    return (own + F.softplus(negative / temperature - shift).sum(1)).mean()


class BankNCE(nn.Module):
    """That loss, with E of the first global batch, frozen then.

    Args:
        temperature: t.
    """

    alike = True  # E is the same in every process
    log_e: Tensor

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.register_buffer("log_e", torch.tensor(torch.nan))  # not estimated yet

    def forward(self, x: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """The loss of unit rows x (B, D) with unit rows (B, P, D) and (B, K, D) of a bank."""
        own, other = similarities(x, positives), similarities(x, negatives)
        with torch.no_grad():
            total = gather((other / self.temperature).logsumexp((0, 1))[None]).logsumexp(0)
            estimate = (total - math.log(other.numel() * world_size())).to(self.log_e.dtype)
            self.log_e.copy_(torch.where(self.log_e.isnan(), estimate, self.log_e))
        return positives_nce(own, other, self.log_e.clone(), self.temperature)
