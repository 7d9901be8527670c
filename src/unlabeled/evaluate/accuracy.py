"""Accuracy image by image, so that an interval can be had of it.

Not torchmetrics': many heads answer at once, and scores that are NaN must count as wrong.
"""

import torch
from torch import Tensor


def label_rank(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one (..., n) int64; ties go to the lower class.

    Args:
        scores: (..., n, classes); a class must beat minus infinity to count as predicted.
        labels: (n,).
    """
    labels = labels.unsqueeze(-1).expand(*scores.shape[:-1], 1)
    own = scores.gather(-1, labels)
    numbers = torch.arange(scores.shape[-1], device=scores.device)
    rank = ((scores > own) | ((scores == own) & (numbers < labels))).sum(-1)
    # A comparison with NaN is false, which would count a diverged classifier as perfect.
    wrong = ~own.squeeze(-1).isfinite() | scores.isnan().any(-1)
    return rank.masked_fill(wrong, scores.shape[-1])


def tops(rank: Tensor, classes: int) -> dict[str, Tensor]:
    """Which images are right (n,) float32: `top1`, and `top5` where there are more classes."""
    kinds = [1, 5] if classes > 5 else [1]
    return {f"top{k}": (rank < k).float() for k in kinds}
