"""The projection head of DINO (Caron et al., 2021), which later methods took over."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.parts.mlp import mlp


class WeightNormed(nn.Module):
    """A linear layer without bias, whose rows have a direction and a norm apart.

    Args:
        width: of the input.
        outputs: number of rows.
        fixed: keep the norms at 1; else they are learned.
    """

    def __init__(self, width: int, outputs: int, *, fixed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(width, outputs, bias=False).weight.detach())
        self.scale = nn.Parameter(torch.ones(outputs, 1), requires_grad=not fixed)

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.scale * F.normalize(self.weight, dim=1))


class Head(nn.Module):
    """Three layers with GELU, L2 normalisation, and a weight-normed linear layer.

    Args:
        width: of the input.
        hidden: width of the two hidden layers.
        bottleneck: width of what is normalised.
        outputs: width of the output.
        norm: of the hidden layers: "none", "batch" or "sync".
        fixed: keep the norms of the last layer's rows at 1.
    """

    def __init__(
        self, width: int, hidden: int, bottleneck: int, outputs: int, *, norm: str, fixed: bool
    ) -> None:
        super().__init__()
        self.mlp = mlp(width, hidden, hidden, bottleneck, norm=norm, activation="gelu")
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = WeightNormed(bottleneck, outputs, fixed=fixed)

    def forward(self, h: Tensor) -> Tensor:
        """Logits (B, outputs) of features (B, width)."""
        return self.last(self.embed(h))

    def embed(self, h: Tensor) -> Tensor:
        """The unit embeddings (B, bottleneck) that the last layer sees."""
        return F.normalize(self.mlp(h), dim=1)
