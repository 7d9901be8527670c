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
        shift: every channel of every tile is moved right and down by 0 to `shift` pixels of its
            own, within the cell (the jigsaw's released code: 2). A lens moves the channels apart
            by an amount that tells where in the image a tile was; this hides it.
    """

    def __init__(self, *, grid: int, size: int, shift: int = 0) -> None:
        super().__init__()
        if grid < 1 or size < 1:
            raise ValueError(f"grid and tile must be at least 1, got {grid} and {size}")
        if shift < 0:
            raise ValueError(f"shift must not be negative, got {shift}")
        self.grid, self.size, self.shift = grid, size, shift

    def corners(self, draws: Draws, height: int, width: int) -> Tensor:
        """(B, T, 2) or (B, T, 3, 2) int64: top and left, row by row, of tiles or channels."""
        cells = height // self.grid, width // self.grid
        if (needed := self.size + self.shift) > min(cells):
            moved = f" with shift={self.shift}" if self.shift else ""
            raise ValueError(
                f"tile={self.size}{moved} is larger than a cell of a {height}x{width} crop, "
                f"{cells[0]}x{cells[1]} for grid={self.grid}"
            )
        count = self.grid**2
        row, column = torch.arange(count) // self.grid, torch.arange(count) % self.grid
        top = row * cells[0] + draws.integers(cells[0] - needed + 1, count)
        left = column * cells[1] + draws.integers(cells[1] - needed + 1, count)
        corners = torch.stack([top, left], 2)
        if not self.shift:
            return corners
        return corners[:, :, None] + draws.integers(self.shift + 1, count, 3, 2)

    def forward(self, x: Tensor, order: Tensor, draws: Draws) -> Tensor:
        """Tiles (B, T, 3, size, size) of x (B, 3, H, W): slot i holds tile order[b, i].

        Args:
            x: images.
            order: (B, T) int64, on x's device.
            draws: of the places.
        """
        corners = to(self.corners(draws, *x.shape[-2:]), x.device)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return squares(x, corners[rows, order], self.size)


class SpacedTiles(nn.Module):
    """Cuts a grid of squares that are a gap apart, each moved a little (Doersch et al., 2015).

    The grid lies anywhere in the image. As in the official code, a square that its jitter would
    push out of the image stays at the image's border.

    Args:
        grid: squares per side.
        size: side of a square in pixels.
        gap: pixels between neighbours: without, the net would continue lines and textures.
        jitter: every square moves by -jitter to jitter pixels, right and down: regular
            distances would tell where lines that cross the gap must arrive.
    """

    def __init__(self, *, grid: int = 3, size: int = 96, gap: int = 48, jitter: int = 7) -> None:
        super().__init__()
        if grid < 1 or size < 1:
            raise ValueError(f"grid and size must be at least 1, got {grid} and {size}")
        if gap < 0 or jitter < 0:
            raise ValueError(f"gap and jitter must not be negative, got {gap} and {jitter}")
        self.grid, self.size, self.gap, self.jitter = grid, size, gap, jitter

    def corners(self, draws: Draws, height: int, width: int) -> Tensor:
        """(B, T, 2) int64: top and left of every square, row by row, on the CPU."""
        pitch, count = self.size + self.gap, self.grid**2
        if (needed := self.grid * pitch - self.gap) > min(height, width):
            raise ValueError(
                f"grid={self.grid} of size={self.size} and gap={self.gap} needs {needed} pixels, "
                f"the crop has {height}x{width}"
            )
        sides = torch.tensor([height, width])
        start = (draws.uniform(1, 2) * (sides - needed + 1)).long()
        place = torch.stack([torch.arange(count) // self.grid, torch.arange(count) % self.grid], 1)
        moved = draws.integers(self.jitter + 1, count, 2, low=-self.jitter)
        return (start + place * pitch + moved).clamp_(min=0).minimum(sides - self.size)

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        """Squares (B, T, 3, size, size) of x (B, 3, H, W), row by row."""
        return squares(x, to(self.corners(draws, *x.shape[-2:]), x.device), self.size)


def squares(x: Tensor, corners: Tensor, size: int) -> Tensor:
    """Squares (B, T, 3, size, size) of images (B, 3, H, W).

    Args:
        x: images.
        corners: top and left (B, T, 2) of squares, or (B, T, 3, 2) of every channel, on x's device.
        size: side in pixels.
    """
    top, left = corners.unbind(-1)
    rows = torch.arange(len(x), device=x.device)[:, None]
    windows = x.unfold(2, size, 1).unfold(3, size, 1)  # B 3 H' W' h w
    if corners.ndim == 3:
        return windows.permute(0, 2, 3, 1, 4, 5)[rows, top, left]
    channels = torch.arange(x.shape[1], device=x.device)
    return windows[rows[:, :, None], channels, top, left]
