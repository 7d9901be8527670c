"""Heads that say something of every pixel, from the maps of a backbone's stages."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.evaluate.annotated import gradients, maps_of
from unlabeled.evaluate.trunk import module_between


class LinearMaps(nn.Module):
    """A linear classifier of the stages at every pixel.

    That is one 1 x 1 convolution on all stages, interpolated and concatenated (a hypercolumn,
    Hariharan et al., 2015): interpolation is linear, so each stage has its own part of the
    convolution and the answers are interpolated and added, at a fraction of the memory. Channels
    are scaled to variance 1 / channels of all stages, so that one learning rate does for all
    backbones.

    Args:
        channels: of every stage.
        outputs: numbers per pixel.
    """

    def __init__(self, channels: Mapping[str, int], outputs: int) -> None:
        super().__init__()
        self.scale = sum(channels.values()) ** -0.5
        self.norms = nn.ModuleDict(
            {s: nn.BatchNorm2d(c, affine=False) for s, c in channels.items()}
        )
        self.parts = nn.ModuleDict({s: nn.Conv2d(c, outputs, 1) for s, c in channels.items()})
        for part in self.parts.values():
            nn.init.zeros_(part.weight)  # type: ignore[arg-type]
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]

    def forward(self, maps: Mapping[str, Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Logits (B, outputs, *size), in a list of one."""
        total = torch.zeros(1)
        for i, (stage, part) in enumerate(self.parts.items()):
            x = self.norms[stage](maps[stage].float()) * self.scale
            total = _enlarged(part(x), size) + (total if i else 0)
        return [total]


class PyramidPooling(nn.Module):
    """The pyramid pooling module of Zhao et al. (2017, PSPNet, figure 3), with an auxiliary head.

    The last stage, its averages over 1, 4, 9 and 36 cells and a 3 x 3 convolution on all of
    them; in training also an answer from the stage before (section 4.1).

    Args:
        channels: of the last two stages, in order.
        outputs: numbers per pixel.
        width: channels inside.
        bins: cells along each side.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        outputs: int,
        *,
        width: int = 512,
        bins: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__()
        (self.before, early), (self.last, late) = [*channels.items()][-2:]
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), *_conv(late, width, 1)) for b in bins
        )
        joined = late + len(bins) * width
        self.answer = nn.Sequential(
            *_conv(joined, width, 3), nn.Dropout2d(0.1), nn.Conv2d(width, outputs, 1)
        )
        self.auxiliary = nn.Sequential(
            *_conv(early, early // 4 or 1, 3),
            nn.Dropout2d(0.1),
            nn.Conv2d(early // 4 or 1, outputs, 1),
        )

    def forward(self, maps: Mapping[str, Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Logits (B, outputs, *size); in training followed by the auxiliary head's."""
        x = maps[self.last].float()
        here = (x.shape[2], x.shape[3])
        parts = [x, *(_enlarged(pool(x), here) for pool in self.pools)]
        answers = [_enlarged(self.answer(torch.cat(parts, 1)), size)]
        if self.training:
            answers.append(_enlarged(self.auxiliary(maps[self.before].float()), size))
        return answers


class Dense(nn.Module):
    """A backbone with a head on its maps."""

    def __init__(self, backbone: nn.Module, head: nn.Module, *, learns: bool) -> None:
        super().__init__()
        self.backbone, self.head, self.learns = backbone, head, learns

    @property
    def stages(self) -> list[str]:
        """What the head reads."""
        if isinstance(self.head, LinearMaps):
            return list(self.head.parts)
        return [self.head.last]  # type: ignore[list-item]

    def forward(self, x: Tensor, size: tuple[int, int]) -> list[Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        with gradients(self.learns and torch.is_grad_enabled()):
            maps = maps_of(self.backbone, x)
        return self.head(maps, size)


def dilate_to_eight(backbone: nn.Module) -> None:
    """Makes res4 and res5 keep the resolution of res3, an eighth of the image's, in place.

    Their convolutions are dilated by 2 and by 4 instead; those that had a stride, by half of
    that (Yu and Koltun, 2017).

    Raises:
        ValueError: a stage is no module of its own.
    """
    for before, after, rate in (("res3", "res4", 2), ("res4", "res5", 4)):
        stage = backbone.get_submodule(module_between(backbone, before, after))
        for conv in stage.modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            wide = max(conv.kernel_size) > 1
            by = (rate // 2 if max(conv.stride) > 1 else rate) if wide else 1
            conv.stride, conv.dilation = (1, 1), (by, by)
            if wide:
                rows, columns = conv.kernel_size
                conv.padding = (rows // 2 * by, columns // 2 * by)


def _conv(inputs: int, outputs: int, side: int) -> list[Any]:
    return [
        nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def _enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
