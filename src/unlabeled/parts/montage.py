"""Pictures of puzzles: tiles in a grid, and a frame that says whether an answer is right."""

import math

import torch
from torch import Tensor

RIGHT, WRONG = (0.0, 0.62, 0.45), (0.84, 0.37, 0.0)  # green and red that all eyes tell apart
EMPTY = 0.92  # grey of a cell without a tile


def montage(tiles: Tensor) -> Tensor:
    """Tiles (B, G * G, 3, h, w) row by row, with white lines between: (B, 3, H, W)."""
    count, (h, w) = math.isqrt(tiles.shape[1]), tiles.shape[-2:]
    gap = max(1, h // 16)
    size = count * (h + gap) - gap, count * (w + gap) - gap
    out = tiles.new_ones(len(tiles), 3, *size)
    for i in range(count * count):
        top, left = i // count * (h + gap), i % count * (w + gap)
        out[:, :, top : top + h, left : left + w] = tiles[:, i]
    return out


def around(centre: Tensor, other: Tensor, place: Tensor) -> Tensor:
    """Tiles (B, 3, s, s) in the middle of 3 x 3 cells, and others in a cell (B,) around them.

    Cells are numbered row by row from 0 to 7, without the middle.
    """
    cells = centre.new_full((len(centre), 9, *centre.shape[1:]), EMPTY)
    cells[:, 4] = centre
    cells[torch.arange(len(centre)), place + (place >= 4)] = other
    return montage(cells)


def framed(x: Tensor, right: Tensor) -> Tensor:
    """Images (B, 3, h, w) with a green border where `right` (B,) is true, else a red one."""
    width = max(1, x.shape[-1] // 24)
    colours = torch.where(right[:, None], x.new_tensor(RIGHT), x.new_tensor(WRONG))
    out = colours[:, :, None, None].expand_as(x).clone()
    inside = (..., slice(width, -width), slice(width, -width))
    out[inside] = x[inside]
    return out
