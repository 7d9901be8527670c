"""Images as pixels in [0, 1], before a backbone."""

import torch
from torch import Tensor, nn

from unlabeled.backbones.behind import Behind
from unlabeled.backbones.wrapped import IMAGENET


class Unit(Behind):
    """A backbone that sees its normalised images as pixels in [0, 1] again.

    For what learned without mean and deviation, as the official code of SimCLR does: evaluations
    and exports, which normalise, then see what training saw.

    Args:
        model: the backbone behind it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.mean: Tensor
        self.std: Tensor
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def seen(self, x: Tensor) -> Tensor:
        """Pixels (..., 3, H, W) in [0, 1] of normalised images."""
        return x * self.std.to(x.dtype) + self.mean.to(x.dtype)
