"""What a generative method puts between the encoder's last map and its decoder.

There are no connections around it: pixels that find another way make the representation empty.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.dist import SyncBatchNorm

Bottleneck = Literal["map", "pooled", "channelwise", "dense"]
Norm = Literal["batch", "sync", "none"]


def bottleneck(
    kind: Bottleneck, channels: int, *, side: int, units: int, norm: Norm
) -> tuple[nn.Module, int]:
    """A module from maps (B, channels, h, w) to the decoder's input, and the channels of that.

    Args:
        kind: "map", the map as it is; "pooled", its mean over positions, which is what
            evaluations read, and a map that a linear layer grows from it; "channelwise", the
            context encoder's: each channel's positions are connected with one another, and a
            stride-1 convolution connects the channels; "dense", one convolution that sees all of
            the map, and its transpose.
        channels: of the encoder's last map.
        side: of the map after the bottleneck, but for "map"; before it, the encoder's map is
            brought to this side (but for "pooled") by max-pooling.
        units: channels of the map that "pooled" grows, or width of "dense".
        norm: of hidden layers.
    """
    if kind not in ("map", "pooled", "channelwise", "dense"):
        raise ValueError(f"bottleneck must be map, pooled, channelwise or dense, got {kind!r}")
    if side < 1 or units < 1:
        raise ValueError(f"side and units must be at least 1, got {side} and {units}")
    if kind == "map":
        return nn.Identity(), channels
    if kind == "pooled":
        return nn.Sequential(Pooled(channels, units, side), *after(norm, units)), units
    pool = nn.AdaptiveMaxPool2d(side)
    if kind == "channelwise":
        mixed = nn.Conv2d(channels, channels, 1, bias=norm == "none")
        return (
            nn.Sequential(pool, Channelwise(channels, side), mixed, *after(norm, channels)),
            channels,
        )
    narrow = nn.Conv2d(channels, units, side, bias=norm == "none")
    wide = nn.ConvTranspose2d(units, channels, side, bias=norm == "none")
    leaky = after(norm, units, slope=0.2)
    return nn.Sequential(pool, narrow, *leaky, wide, *after(norm, channels)), channels


class Pooled(nn.Module):
    """The mean over positions, and a map that a linear layer grows from it.

    Args:
        channels: of the map that is averaged.
        units: of the map that grows.
        side: of that one.
    """

    def __init__(self, channels: int, units: int, side: int) -> None:
        super().__init__()
        self.linear, self.side = nn.Linear(channels, units * side**2), side

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3))).view(len(x), -1, self.side, self.side)


class Channelwise(nn.Module):
    """A fully-connected layer for each channel: C (side^2)^2 weights in place of (C side^2)^2.

    Args:
        channels: C.
        side: of the map.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        positions = side**2
        bound = 1 / math.sqrt(positions)  # as in nn.Linear
        self.weight = nn.Parameter(
            torch.empty(channels, positions, positions).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.zeros(channels, positions))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(0, 1)  # C B P
        out = torch.baddbmm(self.bias[:, None], rows, self.weight.transpose(1, 2))
        return F.relu(out).transpose(0, 1).reshape(x.shape)


def after(norm: Norm, channels: int, *, slope: float = 0.0) -> list[nn.Module]:
    """What follows a convolution: its norm and a (leaky) ReLU."""
    if norm not in ("batch", "sync", "none"):
        raise ValueError(f"norm must be batch, sync or none, got {norm!r}")
    layers: list[nn.Module] = []
    if norm != "none":
        layers = [nn.BatchNorm2d(channels) if norm == "batch" else SyncBatchNorm(channels)]
    return [*layers, nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)]
