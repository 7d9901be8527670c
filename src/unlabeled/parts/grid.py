"""Predicting rows of a grid of patch features from the rows before them (CPC)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sight = Literal["pixel", "row", "none"]
TURNS = {"down": 0, "left": 1, "up": 2, "right": 3}  # counter-clockwise, until it points down


def turned(grid: Tensor, direction: str) -> Tensor:
    """A grid (B, R, C, D) turned so that rows below a place are those in `direction` of it."""
    return torch.rot90(grid, TURNS[direction], (1, 2)).contiguous()


class Masked(nn.Module):
    """A convolution (B, C, H, W) -> (B, C, H, W) that does not look down.

    Nothing is multiplied by a mask: what a place may not see is not read, so that its output is
    the same to the last bit whatever lies there.

    Args:
        width: channels.
        sight: what place (r, c) sees. "pixel": row r - 1 from c - 1 to c + 1, (r, c - 1) and
            itself, as a PixelCNN; "row": c - 1 to c + 1 in rows r - 1 and r.
    """

    def __init__(self, width: int, sight: Sight) -> None:
        super().__init__()
        self.sight = sight
        self.across = nn.Conv2d(width, width, (1, 3), padding=(0, 1))
        if sight == "pixel":
            self.before = nn.Conv2d(width, width, (1, 2), bias=False)
        else:
            self.down = nn.Conv2d(width, width, (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.sight == "pixel":
            above = F.pad(x, (0, 0, 1, 0))[:, :, :-1]
            return self.across(above) + self.before(F.pad(x, (1, 0)))
        return self.down(F.pad(self.across(x), (0, 0, 1, 0)))


class Context(nn.Module):
    """What the rows up to each place tell: grids (B, R, C, D) -> (B, R, C, D).

    Residual blocks of a 1x1 convolution to `width`, a masked one, and a 1x1 convolution back,
    with a ReLU before each but the first; a last ReLU. No norm: it would mix rows.

    Args:
        dim: D.
        sight: see `Masked`; "none" gives the grid itself.
        width: channels inside a block.
        blocks: their number; each lets a place see one row further up.
    """

    def __init__(self, dim: int, sight: Sight, *, width: int = 256, blocks: int = 5) -> None:
        super().__init__()
        if sight not in ("pixel", "row", "none"):
            raise ValueError(f"context must be pixel, row or none, got {sight!r}")
        if width < 1 or blocks < 1:
            raise ValueError(f"width and blocks must be at least 1, got {width} and {blocks}")
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, width, 1),
                nn.ReLU(inplace=True),
                Masked(width, sight),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, dim, 1),
            )
            for _ in range(0 if sight == "none" else blocks)
        )

    def forward(self, grid: Tensor) -> Tensor:
        if not len(self.blocks):
            return grid
        x = grid.permute(0, 3, 1, 2)
        for block in self.blocks:
            x = x + block(x)
        return F.relu(x).permute(0, 2, 3, 1)


class Downwards(nn.Module):
    """Predictions of rows further down, and what they are compared with.

    Args:
        features: width of the grid's features.
        steps: how many distances are predicted, each by weights W_k of its own.
        dim: width that targets and predictions are mapped to, with biases; None compares with
            the features themselves, bilinearly.
        sight: of the context, see `Context`.
        width: likewise.
        blocks: likewise.
    """

    def __init__(
        self, features: int, *, steps: int, dim: int | None, sight: Sight, width: int, blocks: int
    ) -> None:
        super().__init__()
        self.context = Context(features, sight, width=width, blocks=blocks)
        out = features if dim is None else dim
        self.target = nn.Identity() if dim is None else nn.Linear(features, dim)
        self.predict = nn.ModuleList(
            nn.Linear(features, out, bias=dim is not None) for _ in range(steps)
        )
        if dim is None:  # scores start near 0 whatever the width; they have no temperature
            for layer in self.predict:
                nn.init.normal_(layer.weight, std=1 / features)  # type: ignore[arg-type]
