"""Ops that move pixels without changing their values."""

import torch
from torch import Tensor, nn

from unlabeled.augment.rows import on_rows, share
from unlabeled.draws import Draws, where


class Flip(nn.Module):
    """Mirrors each image, or each clip, from left to right.

    Args:
        p: probability.
    """

    def __init__(self, *, p: float = 0.5) -> None:
        super().__init__()
        self.p = share(p, "p")

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        return on_rows(x, where(draws.chance(self.p)), lambda some: some.flip(-1))


def rotate(x: Tensor, turns: int) -> Tensor:
    """Square images (..., S, S) turned by 90 degrees counter-clockwise `turns` times.

    Only transposes and flips: interpolation would leave traces that give the turn away.
    """
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"rotations need square crops, got {x.shape[-2]}x{x.shape[-1]}: "
            "a turned rectangle shows its turn by its shape"
        )
    return torch.rot90(x, turns, (-2, -1))


def rotate_rows(x: Tensor, turns: Tensor) -> Tensor:
    """Every row of x (B, ..., S, S) turned as often as its entry of `turns` (B,) on the CPU."""
    for k in (1, 2, 3):
        x = on_rows(x, where(turns == k), lambda some, k=k: rotate(some, k))
    return x
