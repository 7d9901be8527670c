"""Ops that bend images: rotation, shear, shift and elastic deformation of each image."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.augment.rows import on_rows, share
from unlabeled.draws import Draws, to, where


def sampled(x: Tensor, places: Tensor) -> Tensor:
    """Images (B, C, H, W) read at places (B, H, W, 2), x then y, sides being at -1 and 1."""
    return F.grid_sample(x, places, "bilinear", padding_mode="reflection", align_corners=False)


class Affine(nn.Module):
    """Turns, shears and shifts each image about its centre; what lies outside is mirrored.

    Args:
        p: probability.
        degrees: the turn lies in [-degrees, degrees].
        shear: x moves by up to this share of y, and y by up to this share of x.
        shift: at most, as a share of the side.
    """

    def __init__(
        self, *, p: float = 0.5, degrees: float = 15.0, shear: float = 0.2, shift: float = 0.1
    ) -> None:
        super().__init__()
        if min(degrees, shear, shift) < 0:
            raise ValueError(
                f"degrees, shear and shift must not be negative, got {degrees}, {shear} and {shift}"
            )
        self.p, self.degrees = share(p, "p"), degrees
        self.shear, self.shift = shear, shift

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        rows, u = where(draws.chance(self.p)), draws.uniform(5, low=-1, high=1)
        matrix = to(self.matrices(u[rows]), x.device)

        def change(some: Tensor) -> Tensor:
            size = list(some.shape)
            return sampled(some, F.affine_grid(matrix, size, align_corners=False))

        return on_rows(x, rows, change)

    def matrices(self, u: Tensor) -> Tensor:
        """(B, 2, 3), from places in the new image to places in the old, of numbers in [-1, 1]."""
        turn = u[:, 0] * math.radians(self.degrees)
        cos, sin = turn.cos(), turn.sin()
        one = torch.ones_like(cos)
        rotation = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
        a, b = (u[:, i] * self.shear for i in (1, 2))
        shear = torch.stack([one, a, b, one], 1).view(-1, 2, 2)
        return torch.cat([rotation @ shear, 2 * self.shift * u[:, 3:, None]], 2)


class Elastic(nn.Module):
    """Bends each image by a smooth random field (Simard, Steinkraus & Platt, 2003).

    The field is normal at `points` x `points` places and cubic between them, where the paper
    smooths white noise by a Gaussian.

    Args:
        p: probability.
        strength: standard deviation of the displacement at those places, as a share of the side.
        points: places per side that are displaced independently.
    """

    def __init__(self, *, p: float = 0.2, strength: float = 0.05, points: int = 4) -> None:
        super().__init__()
        if strength < 0 or points < 2:
            raise ValueError(
                f"strength must not be negative and points be at least 2, got {strength}, {points}"
            )
        self.p, self.strength, self.points = share(p, "p"), strength, points

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        rows = where(draws.chance(self.p))
        field = to(2 * self.strength * draws.normal(2, self.points, self.points)[rows], x.device)

        def change(some: Tensor) -> Tensor:
            size = some.shape[-2:]
            moved = F.interpolate(field, size, mode="bicubic", align_corners=True)
            still = torch.eye(2, 3, device=x.device).expand(len(some), 2, 3)
            places = F.affine_grid(still, list(some.shape), align_corners=False)
            return sampled(some, places + moved.permute(0, 2, 3, 1))

        return on_rows(x, rows, change)
