"""Noise at every pixel, computed on the device from one key per image.

`Draws` draws for the global batch on one core, in every process: a number for every pixel of 1024
images of 224 pixels takes 0.7 s, longer than a GPU's training step. Here an image's noise is the
output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with the image's key as seed, in exact
integer arithmetic: whole numbers are the same on every device, and on any number of processes. On
a CPU this costs five times as much as drawing: 9 ms for 128 images of 32 pixels.
"""

import math

import torch
from torch import Tensor

from unlabeled.draws import Draws, to

# The algorithm's three constants, as the signed numbers of the same 64 bits.
STEP = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def splitmix(keys: Tensor, count: int) -> Tensor:
    """The first `count` outputs of a generator per key (B,) int64: (B, count) int64."""
    z = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * STEP
    z = (z ^ _right(z, 30)).mul_(FIRST)
    z = (z ^ _right(z, 27)).mul_(SECOND)
    return z ^ _right(z, 31)


def uniform(draws: Draws, device: torch.device, *shape: int) -> Tensor:
    """(B, *shape) float32 on the device, uniform in [0, 1)."""
    bits = splitmix(_keys(draws, device), math.prod(shape))
    return (_right(bits, 40) * 2.0**-24).view(-1, *shape)


def normal(draws: Draws, device: torch.device, *shape: int) -> Tensor:
    """(B, *shape) float32 on the device, standard normal, by the transform of Box and Muller."""
    count = math.prod(shape)
    bits = splitmix(_keys(draws, device), (count + 1) // 2)
    radius = ((_right(bits, 40) + 1) * 2.0**-24).log_().mul_(-2).sqrt_()  # of a number in (0, 1]
    angle = (_right(bits, 16) & 0xFFFFFF) * (2.0**-24 * 2 * math.pi)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    return pairs[:, :count].reshape(-1, *shape)


def _keys(draws: Draws, device: torch.device) -> Tensor:
    return to(draws.integers(2**63 - 1), device)


def _right(z: Tensor, by: int) -> Tensor:
    """z shifted right with zeros coming in: torch's own shift repeats the sign."""
    return (z >> by) & (2 ** (64 - by) - 1)
