"""The sub-networks of Look, Listen and Learn, for pictures and for spectrograms."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.backbones.norm import Norm, norm_layer


class LookListen(nn.Module):
    """Blocks of two 3x3 convolutions, each with norm and ReLU, and a global max-pool.

    A max-pool by 2 follows every block but the last. Stages are `conv1`, `conv2`, ... (B, C, h, w),
    each block's output before its pool. Arandjelovic & Zisserman, 2017, figure 3: widths 64, 128,
    256, 512, batch norm; pictures of 224 pixels and spectrograms of 257 x 200.

    Args:
        channels: of the input: 3 for pictures, 1 for spectrograms.
        widths: of the blocks; features have the last one's.
        norm: "batch", "sync" (over processes), "group", "layer" or "none".
        bn_splits: statistics over this many parts of the batch.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        norm: Norm = "batch",
        bn_splits: int = 1,
    ) -> None:
        super().__init__()
        if channels < 1 or not widths or min(widths) < 1:
            raise ValueError(f"channels and widths must be positive, got {channels}, {widths}")
        self.config: dict[str, Any] = {
            "_target_": "unlabeled.backbones.look_listen.LookListen",
            "channels": channels,
            "widths": list(widths),
            "norm": norm,
            "bn_splits": bn_splits,
        }
        layer = norm_layer(norm, bn_splits)
        self.blocks = nn.ModuleList()
        for width in widths:
            parts: list[nn.Module] = []
            for into in (channels, width):
                conv = nn.Conv2d(into, width, 3, padding=1, bias=norm == "none")
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                parts += [conv, layer(width), nn.ReLU(inplace=True)]
            self.blocks.append(nn.Sequential(*parts))
            channels = width
        self.dim, self.smallest = widths[-1], 2 ** (len(widths) - 1)

    def forward(self, x: Tensor) -> Tensor:
        return list(self.stages(x).values())[-1].amax((2, 3))

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w) of every block."""
        if min(x.shape[-2:]) < self.smallest:
            raise ValueError(
                f"{len(self.blocks)} blocks need {self.smallest} rows and columns or more, got "
                f"{x.shape[-2]} x {x.shape[-1]}"
            )
        maps: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks, 1):
            maps[f"conv{i}"] = block(x if i == 1 else F.max_pool2d(x, 2))
            x = maps[f"conv{i}"]
        return maps
