"""What context encoders with and without an adversary share (Pathak et al., CVPR 2016)."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import reduce_sum
from unlabeled.parts.pixels import pixels
from unlabeled.parts.precision import full_precision

Predicts = Literal["image", "hole"]


def side_of(augment: nn.Module, predicts: Predicts) -> Callable[[int], int] | None:
    """From an image's side to that of its centre's hole, where that alone is predicted."""
    if predicts not in ("image", "hole"):
        raise ValueError(f"predicts must be image or hole, got {predicts!r}")
    if predicts == "image":
        return None
    cast(Any, augment).hole_side(8)  # raises where holes are not in the centre
    return cast(Any, augment).hole_side


def predicted(
    decoder: nn.Module, features: Tensor, side: int, hole: Callable[[int], int] | None
) -> Tensor:
    """F(x) as an image (B, 3, side, side); where the hole alone is predicted, 0 outside it."""
    if hole is None:
        return decoder(features, side)
    inner = hole(side)
    return F.pad(decoder(features, inner), ((side - inner) // 2,) * 4)


@full_precision
def hole_loss(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    hidden: Tensor,
    *,
    overlap_weight: float = 10.0,
    context_weight: float = 0.0,
) -> Tensor:
    """Weighted squared error, per channel and pixel of what is looked at, in all processes.

        sum w (x - F)^2 / (3 count)        count: pixels of M; of the image if it counts too

    Args:
        prediction: F (B, 3, H, W).
        image: x.
        mask: (B, 1, H, W), M: 1 in the region that is predicted.
        hidden: (B, 1, H, W), 1 where the network saw nothing: M without its visible band.
        overlap_weight: w in the band; it is 1 where hidden.
        context_weight: w outside M.
    """
    weight = mask * (hidden + overlap_weight * (1 - hidden)) + context_weight * (1 - mask)
    total = reduce_sum((weight * (prediction - image).square()).sum())
    looked_at = torch.ones_like(mask) if context_weight else mask
    return total / (3 * reduce_sum(looked_at.sum())).clamp(min=1)


def pictures(batch: Batch, prediction: Tensor) -> dict[str, Tensor]:
    """The view with its hole, the view with the prediction in its region, and the truth."""
    image = cast(dict[str, Tensor], batch["target"])["image"]
    filled = torch.where(cast(Tensor, batch["mask"]) > 0, prediction.float(), image)
    columns = {"with a hole": batch["views"][0], "filled in": filled, "truth": image}
    return {title: pixels(x).clamp(0, 1) for title, x in columns.items()}
