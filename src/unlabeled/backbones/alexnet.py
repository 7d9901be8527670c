"""AlexNet's convolutions (Krizhevsky, 2014: one tower) with torchvision's parameter names."""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.backbones.norm import Norm, norm_layer

CONVS = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1)}
CONVS |= {8: (384, 256, 3, 1, 1), 10: (256, 256, 3, 1, 1)}  # index in torchvision's `features`
POOLED = ("conv1", "conv2")  # a max-pool follows
SMALLEST = {False: 31, True: 63}  # pixels: two max-pools leave 1x1 of 31, three (grid) of 63


class AlexNet(nn.Module):
    """AlexNet up to conv5, without its fully connected layers.

    Without norm its state dict is the `features.*` of torchvision's `alexnet`. With norm the
    convolutions keep these names but have no bias, and `norms.{0..4}` follow them.

    Args:
        norm: "none" (as published), "batch", "sync" (over processes) or "group".
        bn_splits: statistics over this many parts of the batch, as on as many devices.
        features: "average", the global average of conv5 (dim 256), or "grid", the max-pooled
            6x6 map that torchvision's classifier reads (dim 9216).
    """

    def __init__(
        self,
        *,
        norm: Norm = "none",
        bn_splits: int = 1,
        features: Literal["average", "grid"] = "average",
    ) -> None:
        super().__init__()
        if features not in ("average", "grid"):
            raise ValueError(f"features must be average or grid, got {features!r}")
        self.config: dict[str, Any] = {
            "_target_": "unlabeled.backbones.alexnet.AlexNet",
            "norm": norm,
            "bn_splits": bn_splits,
            "features": features,
        }
        layer, plain = norm_layer(norm, bn_splits), norm == "none"
        self.features = nn.ModuleDict(
            {str(i): nn.Conv2d(*arguments, bias=plain) for i, arguments in CONVS.items()}
        )
        self.norms = nn.ModuleList(layer(arguments[1]) for arguments in CONVS.values())
        self.grid = features == "grid"
        self.dim = 256 * 6 * 6 if self.grid else 256

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x)["conv5"]
        if self.grid:
            return F.adaptive_avg_pool2d(F.max_pool2d(x, 3, 2), 6).flatten(1)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w) conv1 to conv5, each after its ReLU and before any max-pool."""
        smallest = SMALLEST[self.grid]
        if min(x.shape[-2:]) < smallest:
            raise ValueError(
                f"AlexNet needs images of {smallest} pixels or more, got "
                f"{x.shape[-2]}x{x.shape[-1]}: use a backbone with a small stem"
            )
        maps: dict[str, Tensor] = {}
        for i, (conv, norm) in enumerate(zip(self.features.values(), self.norms, strict=True), 1):
            name = f"conv{i}"
            maps[name] = F.relu(norm(conv(x)))
            x = F.max_pool2d(maps[name], 3, 2) if name in POOLED else maps[name]
        return maps
