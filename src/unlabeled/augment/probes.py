"""Transforms that a feature may be invariant to, one strong change each: for measuring it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.augment.geometry import rotate_rows
from unlabeled.augment.noise import normal
from unlabeled.draws import Draws, to


class Turn(nn.Module):
    """Turns each image by 90, 180 or 270 degrees, at random, never by none."""

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        return rotate_rows(x, draws.integers(4, low=1))


class Shuffle(nn.Module):
    """Cuts each image into grid x grid tiles and puts them back in a random order.

    Rows and columns that do not divide keep their place at the lower and right border.

    Args:
        grid: tiles per side.
    """

    def __init__(self, *, grid: int = 3) -> None:
        super().__init__()
        if grid < 2:
            raise ValueError(f"grid must be at least 2, got {grid}")
        self.grid = grid

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        n, (h, w) = self.grid, (side // self.grid for side in x.shape[-2:])
        if min(h, w) < 1:
            raise ValueError(f"grid={n} is finer than images of {x.shape[-2]}x{x.shape[-1]} pixels")
        tiles = x[..., : n * h, : n * w].unflatten(-1, (n, w)).unflatten(-3, (n, h))
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # B T C h w
        order = to(draws.permutations(n * n), x.device)
        rows = torch.arange(len(x), device=x.device)[:, None]
        moved = tiles[rows, order].unflatten(1, (n, n)).permute(0, 3, 1, 4, 2, 5)
        x[..., : n * h, : n * w] = moved.flatten(4, 5).flatten(2, 3)
        return x


class Zoom(nn.Module):
    """Shows a random square part of each image, enlarged to the image's size.

    Args:
        share: of the image's area that is shown.
    """

    def __init__(self, *, share: float = 0.4) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        self.share = share

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        side = self.share**0.5
        centre = to((2 * draws.uniform(2) - 1) * (1 - side), x.device)  # -1 to 1 is the image
        theta = torch.zeros(len(x), 2, 3, device=x.device)
        theta[:, 0, 0] = theta[:, 1, 1] = side
        theta[:, :, 2] = centre
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class Noise(nn.Module):
    """Adds normal noise to each pixel and channel.

    Args:
        sigma: its standard deviation, of values in [0, 1].
    """

    def __init__(self, *, sigma: float = 0.1) -> None:
        super().__init__()
        if sigma < 0:
            raise ValueError(f"sigma must not be negative, got {sigma}")
        self.sigma = sigma

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        noise = normal(draws, x.device, *x.shape[1:])
        return x.add_(noise, alpha=self.sigma).clamp_(0, 1)
