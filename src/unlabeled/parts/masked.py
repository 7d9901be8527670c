"""The error of filling in patches that were masked (MAE, VideoMAE)."""

import torch
from torch import Tensor

from unlabeled.parts.precision import full_precision


def standardized(patches: Tensor, unbiased: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (B, L, P) with zero mean and unit variance each, their means, and deviations.

    Args:
        patches: of images.
        unbiased: a variance with P - 1 for P.
    """
    var, mean = torch.var_mean(patches, 2, correction=int(unbiased), keepdim=True)
    std = (var + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


@full_precision
def masked_error(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """L of predictions and targets (B, L, P) and a mask (B, L), 1 where a patch was masked."""
    return ((predicted - target).square().mean(2) * mask).sum() / mask.sum()
