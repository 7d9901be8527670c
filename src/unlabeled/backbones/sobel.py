"""Edges instead of colours: a fixed filter in front of any backbone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.backbones.behind import Behind

GREY = (1 / 3, 1 / 3, 1 / 3)  # of normalised channels
ACROSS = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))


class Sobel(Behind):
    """A backbone that sees two channels: the horizontal and vertical gradients of the grey image.

    Unsupervised networks otherwise cling to colour (Bojanowski & Joulin, 2017; Caron et al., 2018,
    section 4). The filter is part of the network, so that clustering, evaluations and exports all
    see what training sees. The gradients fill the first two of the model's three input channels
    and the third is zero: the same function as a first layer with two channels, since weights
    that meet zeros neither matter nor learn. The weights of the filter are those of the official
    code, from memory.

    Args:
        model: the backbone behind it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        kernel = torch.tensor(ACROSS)
        weight = torch.tensor(GREY)[None, :, None, None] * torch.stack([kernel, kernel.T])[:, None]
        self.weight: Tensor
        self.register_buffer("weight", F.pad(weight, (0, 0, 0, 0, 0, 0, 0, 1)), persistent=False)

    def seen(self, x: Tensor) -> Tensor:
        """Gradients (B, 3, H, W) of normalised images: across, down, and zero."""
        return F.conv2d(x, self.weight.to(x.dtype), padding=1)
