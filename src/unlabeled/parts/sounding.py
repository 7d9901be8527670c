"""How far what is seen is from what is heard, and pictures of where something sounds."""

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.parts.precision import full_precision


@full_precision
def distances(v: Tensor, a: Tensor) -> Tensor:
    """(B,) of the directions of rows (B, D); its gradient is finite where they coincide."""
    square = (F.normalize(v, dim=1) - F.normalize(a, dim=1)).square().sum(1)
    return (square + 1e-12).sqrt()


def overlay(pictures: Tensor, maps: Tensor) -> Tensor:
    """Pictures with their maps in colour: dark blue the least of each, over green to yellow.

    Args:
        pictures: (B, 3, H, W) in [0, 1].
        maps: (B, h, w), any values.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    even = (maps - low) / (high - low).clamp(min=1e-6)
    size = pictures.shape[-2:]
    x = F.interpolate(even[:, None].float(), size, mode="bilinear", align_corners=False)
    colour = torch.cat([x.square(), x, 0.5 * (1 - x)], dim=1)
    grey = pictures.mean(1, keepdim=True)
    return (0.5 * grey + 0.5 * colour).clamp(0, 1)
