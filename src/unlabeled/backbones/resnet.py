"""ResNets (He et al., 2016) whose parameters have torchvision's names."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from unlabeled.backbones.norm import Norm, norm_layer
from unlabeled.backbones.recompute import STAGES, chosen, through

BLOCKS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    161: (Bottleneck, (3, 4, 46)),
}


class ResNet(nn.Module):
    """A ResNet without classifier: the features are the global average of its last stage.

    With the defaults its state dict is that of torchvision's `resnet{depth}` without `fc`.

    Depth 161 is CPC v2's (Henaff et al., 2019): a ResNet-101 up to res4, which has twice as many
    blocks, bottlenecks of twice the width (512) and maps of four times the channels (4096).

    Args:
        depth: 18, 34, 50, 101, 152 or 161.
        width: channels after the stem; every other width is a multiple of it. 128 is the
            "2x" of SimCLR and BYOL.
        stem: "imagenet" (7x7 stride 2, max-pool) or "small" (3x3, no max-pool) for
            images of about 32 pixels.
        stem_stride: of the small stem; 2 costs a quarter.
        norm: "batch", "sync" (over processes), "group", "layer" or "none".
        bn_splits: statistics over this many parts of the batch, as on as many devices.
        zero_init_residual: every block starts as the identity (Goyal et al., 2017).
        widen: factor of the inner width of bottlenecks only; 2 is `wide_resnet50_2`.
        last: the stage it ends with, "res5" or "res4" (CPC's encoder has no res5).
        checkpoint_activations: recompute blocks in the backward pass instead of keeping what
            is inside them: true, or a list of stages (res2, ..., res5).
    """

    def __init__(
        self,
        *,
        depth: int = 50,
        width: int = 64,
        stem: Literal["imagenet", "small"] = "imagenet",
        stem_stride: int = 1,
        norm: Norm = "batch",
        bn_splits: int = 1,
        zero_init_residual: bool = False,
        widen: int = 1,
        last: Literal["res4", "res5"] = "res5",
        checkpoint_activations: bool | Sequence[str] = False,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {list(BLOCKS)}, got {depth}")
        if width < 1 or widen < 1:
            raise ValueError(f"width and widen must be at least 1, got {width} and {widen}")
        if stem not in ("imagenet", "small"):
            raise ValueError(f"stem must be imagenet or small, got {stem!r}")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride}")
        if last not in ("res4", "res5"):
            raise ValueError(f"last must be res4 or res5, got {last!r}")
        if depth == 161 and last != "res4":
            raise ValueError(f"depth=161 ends with res4: set last=res4, got last={last}")
        block, counts = BLOCKS[depth]
        if widen > 1 and block is BasicBlock:
            raise ValueError(f"widen={widen} needs bottlenecks (depth 50 or more), got {depth}")
        if zero_init_residual and norm == "none":
            raise ValueError("zero_init_residual needs a norm with weights, got norm=none")
        self.recomputed = chosen(checkpoint_activations)
        listed = checkpoint_activations
        self.config: dict[str, Any] = {
            "_target_": "unlabeled.backbones.resnet.ResNet",
            "depth": depth,
            "width": width,
            "stem": stem,
            "stem_stride": stem_stride,
            "norm": norm,
            "bn_splits": bn_splits,
            "zero_init_residual": zero_init_residual,
            "widen": widen,
            "last": last,
            "checkpoint_activations": listed if isinstance(listed, bool) else list(listed),
        }
        self.last = last
        layer = norm_layer(norm, bn_splits)
        small = stem == "small"
        kernel, stride, padding = (3, stem_stride, 1) if small else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False)
        self.bn1 = layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        make = partial(_layer, block, norm=layer, base_width=64 * widen)
        wide = width * block.expansion
        self.layer1 = make(width, width, counts[0], stride=1)
        self.layer2 = make(wide, width * 2, counts[1], stride=2)
        if depth == 161:
            self.layer3 = make(wide * 2, width * 16, counts[2], stride=2, base_width=32 * widen)
            self.dim = wide * 16
        else:
            self.layer3 = make(wide * 2, width * 4, counts[2], stride=2)
            self.dim = wide * 4
        if last == "res5":
            self.layer4 = make(wide * 4, width * 8, counts[3], stride=2)
            self.dim = wide * 8
        self._initialise(zero_init_residual)

    @property
    def units(self) -> list[nn.Module]:
        """What is gathered at a time where weights are sharded: the blocks."""
        stages = [part for name, part in self.named_children() if name.startswith("layer")]
        return [block for stage in stages for block in stage.children()]

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.stages(x)[self.last], 1).flatten(1)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w): conv1 (after norm and ReLU, before the max-pool), res2 to res5."""
        x = self.relu(self.bn1(self.conv1(x)))
        maps = {"conv1": x}
        x = self.maxpool(x)
        stages = [self.layer1, self.layer2, self.layer3]
        if self.last == "res5":
            stages.append(self.layer4)
        for name, stage in zip(STAGES, stages, strict=False):
            x = maps[name] = through(stage, x, recompute=name in self.recomputed)
        return maps

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)  # type: ignore[arg-type]


class Shortcut(nn.Conv2d):
    """A convolution of single pixels, with a stride.

    With fewer channels than a vector register holds (16 with AVX-512, 8 with AVX2), oneDNN's
    gradient of its weights writes beyond its memory if there is a stride: a CPU then crashes or
    learns from wrong numbers (uxlfoundation/oneDNN, issue 6035). So the pixels are picked first.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.in_channels >= 16 or input.device.type != "cpu":
            return super().forward(input)
        rows, columns = self.stride
        return F.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias)


def _layer(
    block: type[BasicBlock] | type[Bottleneck],
    inplanes: int,
    planes: int,
    count: int,
    *,
    stride: int,
    norm: Callable[[int], nn.Module],
    base_width: int,
) -> nn.Sequential:
    wide = planes * block.expansion
    shortcut = None
    if stride != 1 or inplanes != wide:
        shortcut = nn.Sequential(Shortcut(inplanes, wide, 1, stride, bias=False), norm(wide))
    make = partial(block, base_width=base_width, norm_layer=norm)
    first = make(inplanes, planes, stride, shortcut)
    return nn.Sequential(first, *(make(wide, planes) for _ in range(1, count)))
