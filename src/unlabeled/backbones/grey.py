"""No colours: a fixed filter in front of any backbone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.backbones.behind import Behind
from unlabeled.backbones.wrapped import IMAGENET

LUMA = (0.299, 0.587, 0.114)


class Grey(Behind):
    """A backbone that sees three times the grey value of its images, normalised like them.

    For what was trained on grey images (colourisation): evaluations and exports then see what
    training saw. Its first layer never learned to tell channels apart, so colours reach it
    through differences of its weights that are as random as at the start. Grey images pass as
    they are.

    Args:
        model: the backbone behind it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # sum_k c_k (x_k s_k + m_k), and the same normalisation again
        c, m, s = (torch.tensor(v) for v in (LUMA, *IMAGENET))
        self.weight: Tensor
        self.bias: Tensor
        weight, bias = c * s / s[:, None], ((c * m).sum() - m) / s
        self.register_buffer("weight", weight[:, :, None, None], persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def seen(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) without their colours."""
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
