"""Crops against prototypes that clusters are (DeepCluster-v2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.dist import reduce_sum
from unlabeled.parts.precision import full_precision

IGNORED = -100


@full_precision
def prototype_loss(z: list[Tensor], prototypes: Tensor, y: Tensor, t: float) -> Tensor:
    """Mean cross-entropy of crops (B, D) with prototypes (H, K, D) for labels (H, B)."""
    scores = torch.cat(z) @ prototypes.transpose(1, 2) / t  # H, V B, K
    target = y.repeat(1, len(z)).flatten()
    total = F.cross_entropy(scores.flatten(0, 1), target, ignore_index=IGNORED, reduction="sum")
    known = (target != IGNORED).sum().to(total.dtype)  # processes may ignore unequally many
    return reduce_sum(total) / reduce_sum(known).clamp(min=1)
