"""Normalised images as pixels in [0, 1] and back, and how much of them a prediction explains."""

import torch
from torch import Tensor

from unlabeled.batch import MEAN, STD
from unlabeled.draws import to
from unlabeled.parts.precision import full_precision


@full_precision
def pixels(x: Tensor) -> Tensor:
    """What `batch.normalize` was given, (..., 3, H, W); the host need not wait for it."""
    mean, std = _constants(x)
    return x * std + mean


@full_precision
def normalized(x: Tensor) -> Tensor:
    """As `batch.normalize`; the host need not wait for it."""
    mean, std = _constants(x)
    return (x - mean) / std


@full_precision
def explained(prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """The share of the masked region's squares about ImageNet's mean that F explains.

    1: all of it; 0: no more than the mean colour would (normalised images have it at 0).
    """
    error = (mask * (prediction - image).square()).sum()
    return 1 - error / (mask * image.square()).sum().clamp(min=1e-12)


def _constants(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(to(torch.tensor(v, dtype=x.dtype), x.device).view(3, 1, 1) for v in (MEAN, STD))
