"""Cutting images into tiles."""

import torch
from torch import Tensor, nn

from unlabeled.draws import Draws, to


class Tiles(nn.Module):
    """Cuts one square at a random place out of each cell of a grid.

    Borders that always touched would let a network match edges instead of parts.

    Args:
        grid: cells per side.
        size: side of a tile in pixels, at most a cell's.
    """

    def __init__(self, *, grid: int, size: int) -> None:
        super().__init__()
        if grid < 1 or size < 1:
            raise ValueError(f"grid and tile must be at least 1, got {grid} and {size}")
        self.grid, self.size = grid, size

    def corners(self, draws: Draws, height: int, width: int) -> Tensor:
        """(B, grid * grid, 2) int64: top and left of every tile, row by row, on the CPU."""
        cells = height // self.grid, width // self.grid
        if self.size > min(cells):
            raise ValueError(
                f"tile={self.size} is larger than a cell of a {height}x{width} crop, "
                f"{cells[0]}x{cells[1]} for grid={self.grid}"
            )
        count = self.grid**2
        row, column = torch.arange(count) // self.grid, torch.arange(count) % self.grid
        top = row * cells[0] + draws.integers(cells[0] - self.size + 1, count)
        left = column * cells[1] + draws.integers(cells[1] - self.size + 1, count)
        return torch.stack([top, left], 2)

    def forward(self, x: Tensor, order: Tensor, draws: Draws) -> Tensor:
        """Tiles (B, T, 3, size, size) of x (B, 3, H, W): slot i holds tile order[b, i].

        Args:
            x: images.
            order: (B, T) int64, on x's device.
            draws: of the places.
        """
        corners = to(self.corners(draws, *x.shape[-2:]), x.device)
        top, left = corners.gather(1, order[:, :, None].expand(-1, -1, 2)).unbind(2)  # B T
        windows = x.unfold(2, self.size, 1).unfold(3, self.size, 1).permute(0, 2, 3, 1, 4, 5)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return windows[rows, top, left]
