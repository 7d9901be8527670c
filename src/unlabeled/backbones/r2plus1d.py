"""R(2+1)D: residual networks of clips whose convolutions see space and time in turn.

Tran et al., CVPR 2018, https://arxiv.org/abs/1711.11248. Convolutions are two-dimensional: over the
pixels of each frame, and over time and places, which in channels_last order are two ways to look
at the same memory. Parameters have the names of torchvision's r2plus1d_18, without dimensions of 1.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.backbones.norm import Norm, norm_layer

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
Middle = Literal["matched", "same"]


class Spatial(nn.Conv2d):
    """A convolution of every frame of clips (B, C, T, H, W).

    Args:
        into: channels.
        width: channels of the output.
        kernel: side.
        stride: in space.
        frames: that it sees at once, as more channels: a 3-D convolution without stride in time.
    """

    def __init__(
        self, into: int, width: int, kernel: int, *, stride: int = 1, frames: int = 1
    ) -> None:
        super().__init__(into * frames, width, kernel, stride, kernel // 2, bias=False)
        self.frames = frames

    def forward(self, input: Tensor) -> Tensor:
        x = input.transpose(1, 2)  # B T C H W
        if self.frames > 1:
            beside = self.frames // 2
            padded = F.pad(x, (0, 0, 0, 0, 0, 0, beside, beside))
            x = torch.cat([padded[:, i : i + x.shape[1]] for i in range(self.frames)], dim=2)
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(1, 2)


class Temporal(nn.Conv2d):
    """A convolution over three frames, of every place of clips (B, C, T, H, W)."""

    def __init__(self, into: int, width: int, *, stride: int = 1) -> None:
        super().__init__(into, width, (3, 1), (stride, 1), (1, 0), bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(3)).unflatten(3, input.shape[3:])


class Shortcut(nn.Conv2d):
    """A convolution of single places, of every stride-th in space and time.

    They are picked first: see `unlabeled.backbones.resnet.Shortcut`.
    """

    def __init__(self, into: int, width: int, *, stride: int) -> None:
        super().__init__(into, width, 1, bias=False)
        self.step = stride

    def forward(self, input: Tensor) -> Tensor:
        x = input[:, :, :: self.step, :: self.step, :: self.step]
        return super().forward(x.flatten(3)).unflatten(3, x.shape[3:])


class Steps(nn.Sequential):
    """Layers of clips (B, C, T, H, W); what takes maps alone, norms, sees them as T x HW.

    What norms give is a view, on which ReLU in place would cost more than a copy.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for layer in self:
            if isinstance(layer, (Spatial, Temporal, Shortcut, Steps, nn.ReLU)):
                x = layer(x)
            else:
                x = layer(x.flatten(3)).unflatten(3, x.shape[3:])
        return x


class Block(nn.Module):
    """Two (2+1)D convolutions beside a shortcut.

    Args:
        into: channels.
        width: channels of the output.
        stride: of the first, in space and time.
        middle: channels between space and time.
        norm: see `R2Plus1D`.
        bn_splits: see `R2Plus1D`.
    """

    def __init__(
        self, into: int, width: int, *, stride: int, middle: int, norm: Norm, bn_splits: int
    ) -> None:
        super().__init__()
        layer = norm_layer(norm, bn_splits)

        def twice(start: int, step: int) -> Steps:
            space, time = (
                Spatial(start, middle, 3, stride=step),
                Temporal(middle, width, stride=step),
            )
            return Steps(space, layer(middle), nn.ReLU(), time)

        self.conv1 = Steps(twice(into, stride), layer(width), nn.ReLU())
        self.conv2 = Steps(twice(width, 1), layer(width))
        self.downsample = None
        if stride > 1 or into != width:
            self.downsample = Steps(Shortcut(into, width, stride=stride), layer(width))

    def forward(self, x: Tensor) -> Tensor:
        beside = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv2(self.conv1(x)) + beside)


class R2Plus1D(nn.Module):
    """An R(2+1)D network without classifier: clips (B, T, 3, H, W) to features (B, dim).

    A picture (B, 3, H, W) is a clip of one frame. Stages are averaged over time.

    Args:
        depth: 10 (one block a stage; no paper's), 18 or 34.
        width: channels of the first stage; every other width is a multiple of it.
        stem: "factored" (1x7x7, then 3x1x1), "joint" (3x7x7 and a max-pool: AVID's) or "small"
            (1x3x3, then 3x1x1, for clips of about 64 pixels); the first two with stride 2 in space.
        stem_stride: of the small stem, in space.
        middle: channels between space and time: "matched" (as many parameters as the 3-D
            convolution) or "same" (as the output's; AVID's code, from memory).
        pool: what features are over places and times of the last stage: "avg", or "max" (AVID).
        norm: "batch", "sync" (over processes), "group", "layer" or "none".
        bn_splits: statistics over this many parts of the batch.
    """

    def __init__(
        self,
        *,
        depth: int = 18,
        width: int = 64,
        stem: Literal["factored", "joint", "small"] = "factored",
        stem_stride: int = 2,
        middle: Middle = "matched",
        pool: Literal["avg", "max"] = "avg",
        norm: Norm = "batch",
        bn_splits: int = 1,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {list(BLOCKS)}, got {depth}")
        if width < 2:
            raise ValueError(f"width must be at least 2, got {width}")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride}")
        choices = {"stem": (stem, ("factored", "joint", "small")), "pool": (pool, ("avg", "max"))}
        for name, (given, known) in {**choices, "middle": (middle, ("matched", "same"))}.items():
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        self.config: dict[str, Any] = {
            "_target_": "unlabeled.backbones.r2plus1d.R2Plus1D",
            "depth": depth,
            "width": width,
            "stem": stem,
            "stem_stride": stem_stride,
            "middle": middle,
            "pool": pool,
            "norm": norm,
            "bn_splits": bn_splits,
        }
        self.pool, self.dim = pool, 8 * width
        layer = norm_layer(norm, bn_splits)
        if stem == "joint":
            first: list[nn.Module] = [Spatial(3, width, 7, stride=2, frames=3)]
        else:
            side, between = (7, width * 45 // 64) if stem == "factored" else (3, width)
            space = Spatial(3, between, side, stride=2 if stem == "factored" else stem_stride)
            first = [space, layer(between), nn.ReLU(), Temporal(between, width)]
        self.stem = Steps(*first, layer(width), nn.ReLU())
        self.pooled = stem == "joint"
        into = width
        for i, count in enumerate(BLOCKS[depth]):
            blocks: list[nn.Module] = []
            for k in range(count):
                stride, wide = (2 if i and not k else 1), width * 2**i
                full = (27 * into * wide) // (9 * into + 3 * wide)
                inner = full if middle == "matched" else wide
                rest = {"middle": inner, "norm": norm, "bn_splits": bn_splits}
                blocks.append(Block(into, wide, stride=stride, **rest))
                into = wide
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        last = list(self.clips(x).values())[-1]
        return last.amax((2, 3, 4)) if self.pool == "max" else last.mean((2, 3, 4))

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w), means over time: conv1 (before a max-pool), res2 to res5."""
        return {name: clip.mean(2) for name, clip in self.clips(x).items()}

    def clips(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, t, h, w) of every stage; t is halved from res3 on."""
        x = self.stem((x[:, None] if x.ndim == 4 else x).transpose(1, 2))
        maps = {"conv1": x}
        if self.pooled:
            x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        for i in range(1, 5):
            x = maps[f"res{i + 1}"] = _whole(self.get_submodule(f"layer{i}"), x)
        return maps


def _whole(stage: nn.Module, x: Tensor) -> Tensor:
    """A stage's output; in float32 on a CPU where maps are single: see `recompute.through`."""
    single = x.shape[-2:] == (1, 1) or x.shape[2] == 1
    if single and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return stage(x.float())
    return stage(x)
