"""AlexNet's convolutions (Krizhevsky, 2014: one tower) with torchvision's parameter names."""

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.backbones.norm import Norm, norm_layer

CONVS = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1)}
CONVS |= {8: (384, 256, 3, 1, 1), 10: (256, 256, 3, 1, 1)}  # index in torchvision's `features`
POOLED = ("conv1", "conv2")  # a max-pool follows
NEEDED = {False: 7, True: 15}  # pixels a side of conv1's map: two max-pools, three for a grid
HIDDEN = (1, 4)  # index of the hidden layers in torchvision's `classifier`


class AlexNet(nn.Module):
    """AlexNet up to conv5, or to one or both of its fully connected hidden layers.

    Without norm its state dict is the `features.*` of torchvision's `alexnet` (and `classifier.1`,
    `classifier.4`). With norm the layers keep these names but have no bias, and `norms.{0..6}`
    follow them.

    Args:
        norm: "none" (as published), "batch", "sync" (over processes), "group" or "layer".
        bn_splits: statistics over this many parts of the batch, as on as many devices.
        features: "average", the global average of conv5 (dim 256), or "grid", the max-pooled
            6x6 map that torchvision's classifier reads (dim 9216).
        stride: of conv1; 2 for the jigsaw's small tiles (Noroozi & Favaro, 2016).
        side: of that grid; 2 is what patches of 64 to 96 pixels leave.
        hidden: widths of fc6, or of fc6 and fc7, behind the grid, each with norm and ReLU: the
            last one's output is the features.
        normed: the first convolution with a norm; 3 for conv3 to conv5 and what follows (Doersch
            et al., 2015).
        affine: whether a norm has scale and shift.
    """

    def __init__(
        self,
        *,
        norm: Norm = "none",
        bn_splits: int = 1,
        features: Literal["average", "grid"] = "average",
        stride: int = 4,
        side: int = 6,
        hidden: Sequence[int] = (),
        normed: int = 1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if features not in ("average", "grid"):
            raise ValueError(f"features must be average or grid, got {features!r}")
        if stride < 1 or side < 1:
            raise ValueError(f"stride and side must be at least 1, got {stride} and {side}")
        if not 1 <= normed <= len(CONVS):
            raise ValueError(f"normed is one of the convolutions 1 to {len(CONVS)}, got {normed}")
        if len(hidden) > len(HIDDEN) or min(hidden, default=1) < 1:
            raise ValueError(f"hidden has the widths of fc6 and fc7 at most, got {list(hidden)}")
        if hidden and features != "grid":
            raise ValueError(f"hidden={list(hidden)} reads a grid: features=grid, not {features}")
        self.config: dict[str, Any] = {
            "_target_": "unlabeled.backbones.alexnet.AlexNet",
            "norm": norm,
            "bn_splits": bn_splits,
            "features": features,
            "stride": stride,
            "side": side,
            "hidden": list(hidden),
            "normed": normed,
            "affine": affine,
        }
        layer, grid = norm_layer(norm, bn_splits), features == "grid"
        has = [norm != "none" and i >= normed for i in range(1, 1 + len(CONVS) + len(hidden))]
        shapes = {
            i: (*shape[:3], stride if i == 0 else shape[3], shape[4]) for i, shape in CONVS.items()
        }
        self.features = nn.ModuleDict(
            {
                str(i): nn.Conv2d(*s, bias=not n)
                for (i, s), n in zip(shapes.items(), has, strict=False)
            }
        )
        widths = [256 * side * side if grid else 256, *hidden]
        self.classifier = nn.ModuleDict(
            {
                str(i): nn.Linear(a, b, bias=not n)
                for i, a, b, n in zip(HIDDEN, widths, widths[1:], has[len(CONVS) :], strict=False)
            }
        )
        channels = [shape[1] for shape in CONVS.values()] + list(hidden)
        self.norms = nn.ModuleList(
            layer(c) if n else nn.Identity() for c, n in zip(channels, has, strict=True)
        )
        if not affine:
            for one in self.norms:
                _without_scale(one)
        self.grid, self.side, self.stride, self.dim = grid, side, stride, widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x)["conv5"]
        if not self.grid:
            return F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = F.adaptive_avg_pool2d(F.max_pool2d(x, 3, 2), self.side).flatten(1)
        for layer, norm in zip(self.classifier.values(), self.norms[len(CONVS) :], strict=True):
            x = F.relu(norm(layer(x)[:, :, None, None]).flatten(1))
        return x

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w) conv1 to conv5, each after its ReLU and before any max-pool."""
        smallest = 7 + self.stride * (NEEDED[self.grid] - 1)
        if min(x.shape[-2:]) < smallest:
            raise ValueError(
                f"AlexNet needs images of {smallest} pixels or more, got "
                f"{x.shape[-2]}x{x.shape[-1]}: use a backbone with a small stem"
            )
        maps: dict[str, Tensor] = {}
        for i, (conv, norm) in enumerate(zip(self.features.values(), self.norms, strict=False), 1):
            name = f"conv{i}"
            maps[name] = F.relu(norm(conv(x)))
            x = F.max_pool2d(maps[name], 3, 2) if name in POOLED else maps[name]
        return maps


def _without_scale(norm: nn.Module) -> None:
    if not isinstance(norm, nn.Identity):
        norm.affine = False  # type: ignore[assignment]
        norm.register_parameter("weight", None)
        norm.register_parameter("bias", None)
