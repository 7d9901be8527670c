"""Grids of overlapping patches, and ops that patches get one by one (CPC)."""

import torch
from torch import Tensor, nn

from unlabeled.augment.rows import on_rows, share
from unlabeled.augment.views import Chain, Ops, finished, taken, unit
from unlabeled.batch import MEAN, Batch
from unlabeled.draws import Draws, to, where


def patches_of(x: Tensor, size: int, stride: int) -> Tensor:
    """All patches (B, R, C, 3, size, size) of images (B, 3, H, W), row by row.

    Patch (r, c) is x[:, :, r * stride : r * stride + size, c * stride : c * stride + size].
    """
    for side in x.shape[-2:]:
        if side < size or (side - size) % stride:
            raise ValueError(
                f"patches of size={size} with stride={stride} do not fill a side of {side} pixels: "
                f"choose a crop of {size} + n * {stride}"
            )
    return x.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5).contiguous()


class PatchGrid(nn.Module):
    """One crop as a grid of patches: views = [(B, R, C, 3, size, size)].

    Patches are cut first and changed afterwards, each by draws of its own: what is done to a
    whole image (a tint) would tell which patches belong together.

    Args:
        chain: ops on the whole crop, before it is cut.
        patch: ops on each patch.
        size: side of a patch in pixels.
        stride: from a patch to the next, in pixels.
    """

    def __init__(self, chain: Ops, patch: Ops, *, size: int = 64, stride: int = 32) -> None:
        super().__init__()
        if size < 1 or stride < 1:
            raise ValueError(f"size and stride must be at least 1, got {size} and {stride}")
        self.chain, self.patch = Chain(chain), Chain(patch)
        self.size, self.stride = size, stride

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        (crop,) = taken(batch, 1, "patch grid")
        x = self.chain(unit(crop), draws.fork("chain"))
        patches = patches_of(x, self.size, self.stride)
        grid = patches.shape[:3]
        own = draws.fork("patch").times(grid[1] * grid[2])
        patches = self.patch(patches.flatten(0, 2), own).unflatten(0, grid)
        return {**batch, "views": [finished(patches)]}


class CropPad(nn.Module):
    """Cuts a smaller square out of each patch, at random, and pads it to the old size.

    What pads is ImageNet's mean colour, zero once it is normalised.

    Args:
        margin: how much smaller, in pixels: 4 leaves 60 of 64.
    """

    def __init__(self, *, margin: int = 4) -> None:
        super().__init__()
        if margin < 0:
            raise ValueError(f"margin must not be negative, got {margin}")
        self.margin = margin

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        size = x.shape[-1] - self.margin
        if size < 1:
            raise ValueError(f"margin={self.margin} leaves nothing of {x.shape[-1]} pixels")
        corner = to(draws.integers(self.margin + 1, 2), x.device)
        windows = x.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)
        rows = torch.arange(len(x), device=x.device)
        inner = windows[rows, corner[:, 0], corner[:, 1]]
        out = to(torch.tensor(MEAN), x.device).view(3, 1, 1).expand(x.shape).clone()
        start = self.margin // 2
        out[..., start : start + size, start : start + size] = inner
        return out


class ColorDrop(nn.Module):
    """Leaves each patch one of its three colour channels.

    The other two become ImageNet's mean, zero once they are normalised.

    Args:
        p: probability.
    """

    def __init__(self, *, p: float = 0.5) -> None:
        super().__init__()
        self.p = share(p, "p")

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        rows, kept = where(draws.chance(self.p)), draws.integers(3)
        keep = (torch.arange(3) == kept[rows, None]).float()[:, :, None, None]
        fill = (1 - keep) * torch.tensor(MEAN).view(3, 1, 1)
        return on_rows(x, rows, lambda some: some * to(keep, x.device) + to(fill, x.device))
