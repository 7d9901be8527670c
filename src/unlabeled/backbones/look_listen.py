"""The sub-networks of Look, Listen and Learn, for pictures and for spectrograms."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.backbones.norm import Norm, norm_layer


class LookListen(nn.Module):
    """Blocks of two 3x3 convolutions, each with norm and ReLU, and a global max-pool.

    A max-pool by 2 follows every block but the last. Stages are `conv1`, `conv2`, ... (B, C, h, w),
    each block's output before its pool. Arandjelovic & Zisserman, 2017, figure 3: widths 64, 128,
    256, 512, batch norm; pictures of 224 pixels and spectrograms of 257 x 200.

    With `stem` and down="stride" this is AVID's network of sound, Conv2D-10 (Morgado et al., 2021;
    from memory of their code).

    Args:
        channels: of the input: 3 for pictures, 1 for spectrograms.
        widths: of the blocks; features have the last one's.
        stem: a 7x7 convolution of stride 2 to the first width comes before, with norm and ReLU.
        down: "pool", or "stride": the first convolution of every block but the last has stride 2,
            in place of the pools.
        norm: "batch", "sync" (over processes), "group", "layer" or "none".
        bn_splits: statistics over this many parts of the batch.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: bool = False,
        down: Literal["pool", "stride"] = "pool",
        norm: Norm = "batch",
        bn_splits: int = 1,
    ) -> None:
        super().__init__()
        if channels < 1 or not widths or min(widths) < 1:
            raise ValueError(f"channels and widths must be positive, got {channels}, {widths}")
        if down not in ("pool", "stride"):
            raise ValueError(f"down must be pool or stride, got {down!r}")
        self.config: dict[str, Any] = {
            "_target_": "unlabeled.backbones.look_listen.LookListen",
            "channels": channels,
            "widths": list(widths),
            "stem": stem,
            "down": down,
            "norm": norm,
            "bn_splits": bn_splits,
        }
        make = partial(_conv, norm=norm, bn_splits=bn_splits)
        self.stem = nn.Sequential(*make(channels, widths[0], 7, stride=2)) if stem else None
        channels = widths[0] if stem else channels
        self.pools, last = down == "pool", len(widths) - 1
        self.blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            stride = 2 if down == "stride" and i < last else 1
            first = make(channels, width, 3, stride=stride)
            self.blocks.append(nn.Sequential(*first, *make(width, width, 3)))
            channels = width
        self.dim, self.smallest = widths[-1], 2 ** (last + stem)

    def forward(self, x: Tensor) -> Tensor:
        return list(self.stages(x).values())[-1].amax((2, 3))

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w) of every block, and before them of the stem, if there is one."""
        if min(x.shape[-2:]) < self.smallest:
            raise ValueError(
                f"{len(self.blocks)} blocks need {self.smallest} rows and columns or more, got "
                f"{x.shape[-2]} x {x.shape[-1]}"
            )
        maps: dict[str, Tensor] = {}
        if self.stem is not None:
            x = maps["stem"] = self.stem(x)
        for i, block in enumerate(self.blocks, 1):
            x = maps[f"conv{i}"] = block(F.max_pool2d(x, 2) if self.pools and i > 1 else x)
        return maps


def _conv(
    into: int, width: int, kernel: int, *, norm: Norm, bn_splits: int, stride: int = 1
) -> list[nn.Module]:
    """A convolution with norm and ReLU."""
    conv = nn.Conv2d(into, width, kernel, stride, kernel // 2, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return [conv, norm_layer(norm, bn_splits)(width), nn.ReLU(inplace=True)]
