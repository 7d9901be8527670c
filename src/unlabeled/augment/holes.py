"""The context encoder's question and answer: a picture with a hole, and what was there.

Pathak et al., CVPR 2016. https://arxiv.org/abs/1604.07379
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.augment.corruption import normalized, one_view
from unlabeled.augment.rows import share
from unlabeled.augment.views import channels_last
from unlabeled.batch import Batch
from unlabeled.draws import Draws, seed_of, to

REACH = 16  # the pattern's side in crops


class Holes(nn.Module):
    """One view with a hole of every image's own; `mask` says what is to be predicted.

    `mask` (B, 1, S, S) is 1 in the region M that the loss looks at. `target` holds the whole
    `image` and `hidden` (B, 1, S, S): the part of M that is blank in the view. Along the region's
    border a band of `overlap` pixels is left visible, so that the prediction has to continue it.

    Args:
        base: a module (Batch, Draws) -> Batch that gives one view (B, 3, S, S).
        kind: "region", cut out of a large thresholded low-frequency pattern; "blocks", squares
            that may overlap; "centre", one square.
        size: side of the centre's square as a share of the image's.
        area: share of the image in a region, or in all blocks together if none overlap.
        tolerance: how much a region's share may differ from `area`.
        cell: from one random number of the pattern to the next, as a share of the image's side:
            1 / 0.06 of 128 pixels in the official code. Lower: smaller spots.
        density: the pattern's random numbers, in [0, 1), are regions below this threshold.
        blocks: how many.
        overlap: width of the visible band in pixels.
        fill: colour of the hole, RGB in [0, 1]; None: ImageNet's mean. (The official code gives
            [0.459, 0.408, 0.482] to RGB, which are the means of green, blue and red.)
        seed: of the pattern.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        kind: Literal["region", "blocks", "centre"] = "region",
        size: float = 0.5,
        area: float = 0.25,
        tolerance: float = 0.05,
        cell: float = 0.13,
        density: float = 0.25,
        blocks: int = 4,
        overlap: int = 0,
        fill: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in ("region", "blocks", "centre"):
            raise ValueError(f"kind must be region, blocks or centre, got {kind!r}")
        for name, value in (("size", size), ("area", area), ("cell", cell), ("density", density)):
            if not 0 < value < 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {value}")
        if blocks < 1 or overlap < 0:
            raise ValueError(
                f"blocks must be at least 1 and overlap at least 0, got {blocks} and {overlap}"
            )
        if fill is not None and (len(fill) != 3 or not all(0 <= v <= 1 for v in fill)):
            raise ValueError(f"fill is a colour, three numbers in [0, 1], got {list(fill)}")
        self.base, self.kind, self.size, self.area = base, kind, size, area
        self.tolerance, self.cell, self.density = share(tolerance, "tolerance"), cell, density
        self.blocks, self.overlap, self.seed = blocks, overlap, seed
        self.fill = None if fill is None else tuple(float(v) for v in fill)
        self._patterns: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        batch = self.base(batch, draws.fork("base"))
        x = one_view(batch, "a hole")
        if x.shape[-1] != x.shape[-2]:
            raise ValueError(f"holes need square crops, got {x.shape[-2]}x{x.shape[-1]}")
        mask = getattr(self, f"_{self.kind}")(x, draws.fork("hole"))  # B S S bool
        mask = mask[:, None].to(x.dtype)
        hidden = shrunk(mask, self.overlap)
        view = channels_last(torch.where(hidden > 0, self._colour(x), x))
        return {**batch, "views": [view], "mask": mask, "target": {"image": x, "hidden": hidden}}

    def hole_side(self, side: int) -> int:
        """Pixels of the centre's square in an image of `side` pixels, as many on each side of it.

        Raises:
            ValueError: holes are elsewhere.
        """
        if self.kind != "centre":
            raise ValueError(f"a hole has a side if its kind is centre, got {self.kind!r}")
        return side - 2 * round(side * (1 - self.size) / 2)

    def _colour(self, x: Tensor) -> Tensor:
        if self.fill is None:
            return torch.zeros_like(x[:1, :, :1, :1])
        return normalized(to(torch.tensor(self.fill), x.device).view(1, 3, 1, 1))

    def _centre(self, x: Tensor, draws: Draws) -> Tensor:
        side = self.hole_side(x.shape[-1])
        if side <= 2 * self.overlap:
            raise ValueError(f"overlap={self.overlap} leaves nothing of a hole of {side} pixels")
        border = (x.shape[-1] - side) // 2
        hole = torch.ones(side, side, dtype=torch.bool, device=x.device)
        return F.pad(hole, (border,) * 4).expand(len(x), -1, -1)

    def _blocks(self, x: Tensor, draws: Draws) -> Tensor:
        side = x.shape[-1]
        block = int(side * math.sqrt(self.area / self.blocks))
        if block < 1 or block <= 2 * self.overlap:
            raise ValueError(
                f"blocks={self.blocks} of {block} pixels are too small for overlap={self.overlap}"
            )
        corner = to(draws.integers(side - block + 1, self.blocks, 2), x.device)[..., None]
        place = torch.arange(side, device=x.device)
        within = (place >= corner) & (place < corner + block)  # B N 2 S
        return (within[:, :, 0, :, None] & within[:, :, 1, None, :]).any(1)

    def _region(self, x: Tensor, draws: Draws) -> Tensor:
        side = x.shape[-1]
        key = side, x.device
        if key not in self._patterns:
            spots = pattern(side * REACH, side * self.cell, self.density, self.seed)
            fitting = windows(spots, side, self.area, self.tolerance)
            if not len(fitting):
                raise ValueError(
                    f"no window of the pattern has area={self.area} within {self.tolerance}: raise "
                    f"tolerance, or move density={self.density} towards the area"
                )
            self._patterns[key] = to(spots, x.device), fitting
        spots, fitting = self._patterns[key]
        chosen = fitting[draws.integers(len(fitting))]
        width = spots.shape[1] - side + 1
        top, left = to(chosen // width, x.device), to(chosen % width, x.device)
        return spots.unfold(0, side, 1).unfold(1, side, 1)[top, left]


def pattern(side: int, cell: float, density: float, seed: int) -> Tensor:
    """A large map of spots (side, side) bool: smooth noise below a threshold.

    Args:
        side: in pixels.
        cell: pixels between two random numbers.
        density: the threshold.
        seed: of the random numbers, uniform in [0, 1).
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "pattern"))
    count = max(2, round(side / cell))
    coarse = torch.rand(1, 1, count, count, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bicubic")[0, 0] < density


def windows(spots: Tensor, side: int, area: float, tolerance: float) -> Tensor:
    """Windows whose share of spots is within the tolerance of `area`, numbered row by row."""
    sums = F.pad(spots.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32), (1, 0, 1, 0))
    sums = sums[side:] - sums[:-side]
    sums = sums[:, side:] - sums[:, :-side]
    found = (sums / side**2 - area).abs() <= tolerance
    return found.flatten().nonzero().flatten()


def shrunk(mask: Tensor, by: int) -> Tensor:
    """Masks (B, 1, H, W) of 0 and 1 without a band along their border with 0, not the image's."""
    return mask if by == 0 else 1 - F.max_pool2d(1 - mask, 2 * by + 1, 1, by)
