"""Relative position's question and answer (Doersch et al., 2015)."""

from typing import Literal

import torch
from torch import Tensor, nn

from unlabeled.augment.tiles import SpacedTiles, Tiles
from unlabeled.augment.views import Chain, Ops, finished, taken, unit
from unlabeled.batch import Batch
from unlabeled.draws import Draws, to


def label(dx: int, dy: int) -> int:
    """The class of a query that lies dx to the right of its anchor and dy below it.

    0 1 2
    3 . 4
    5 6 7
    """
    if (dx, dy) == (0, 0) or not (-1 <= dx <= 1 and -1 <= dy <= 1):
        raise ValueError(f"({dx}, {dy}) is not one of the eight neighbours")
    place = 3 * (dy + 1) + dx + 1
    return place - (place > 4)


def neighbours(grid: int, anchors: Literal["all", "center"]) -> Tensor:
    """(n, 3) int64: anchor, query and class of the pairs of neighbouring cells, row by row."""
    if anchors not in ("all", "center"):
        raise ValueError(f"anchors must be all or center, got {anchors!r}")
    if (anchors == "center" and grid != 3) or grid < 2:
        raise ValueError(
            f"grid={grid}: anchors=center needs 3 cells a side, anchors=all at least 2"
        )
    cells = range(grid**2) if anchors == "all" else [4]
    return torch.tensor(
        [
            (a, a + dy * grid + dx, label(dx, dy))
            for a in cells
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if (dx or dy) and 0 <= a % grid + dx < grid and 0 <= a // grid + dy < grid
        ]
    )


class RelativePosition(nn.Module):
    """Patches of a grid on each crop, which of them are compared, and where one lies.

    views = [patches (B * C, T, 3, s, s)], row b * C + c from crop c of image b, numbered row by
    row; target = (B * C, n) classes of the n pairs; the buffer `pairs` (n, 2) has their anchors
    and queries.

    Args:
        chain: ops on each whole crop (a flip, greys), before it is cut.
        patch: ops on each patch, with draws of its own: a colour that is dropped from all of a
            batch, or of an image, would leave the shortcut open.
        cut: `SpacedTiles` (the paper's grid) or `Tiles` (cells with a random place in each).
        anchors: "all" uses every two neighbours in both orders, "center" only the middle of
            3 x 3 with each of its neighbours.
    """

    pairs: Tensor
    classes: Tensor

    def __init__(
        self,
        chain: Ops,
        patch: Ops,
        *,
        cut: SpacedTiles | Tiles,
        anchors: Literal["all", "center"] = "all",
    ) -> None:
        super().__init__()
        self.chain, self.patch, self.cut = Chain(chain), Chain(patch), cut
        found = neighbours(cut.grid, anchors)
        self.register_buffer("pairs", found[:, :2].clone())
        self.register_buffer("classes", found[:, 2].clone())

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        crops = taken(batch, max(1, len(batch.get("crops", []))), "or more grids")
        some = [self._patches(x, draws.fork(f"grid{i}")) for i, x in enumerate(crops)]
        patches = torch.stack(some, 1).flatten(0, 1) if len(some) > 1 else some[0]
        target = self.classes.expand(len(patches), -1).contiguous()
        return {**batch, "views": [patches], "target": target}

    def _patches(self, crop: Tensor, draws: Draws) -> Tensor:
        x = self.chain(unit(crop), draws.fork("chain"))
        if isinstance(self.cut, Tiles):
            order = torch.arange(self.cut.grid**2).expand(len(x), -1)
            x = self.cut(x, to(order.contiguous(), x.device), draws.fork("places"))
        else:
            x = self.cut(x, draws.fork("places"))
        count = x.shape[1]
        x = self.patch(x.flatten(0, 1), draws.fork("patch").times(count))
        return finished(x.unflatten(0, (-1, count)))
