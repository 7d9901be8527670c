"""The jigsaw puzzle's question and answer (Noroozi & Favaro, 2016)."""

import torch
from torch import Tensor, nn

from unlabeled.augment.permutations import Criterion, load_permutations, permutations
from unlabeled.augment.tiles import Tiles
from unlabeled.augment.views import Chain, Ops, channels_last, finished, taken, unit
from unlabeled.batch import Batch
from unlabeled.draws import Draws, to


class Jigsaw(nn.Module):
    """One crop's tiles (B, T, 3, tile, tile) in the order of a random permutation, its `target`.

    Slot i holds tile permutations[target][i], tiles being numbered row by row. The permutations
    are in checkpoints. What is done to an image is done to all its tiles alike: tiles that were
    flipped or turned grey one by one would not be parts of one picture.

    Args:
        chain: ops on the whole crop, before it is cut.
        permutations: how many to choose, or a `.npy` file of them.
        criterion: how they are chosen, see `permutations.permutations`.
        seed: of that choice.
        grid: cells per side.
        tile: side of a tile in pixels, at a random place in its cell.
        shift: every channel of every tile is moved by 0 to that many pixels, see `Tiles`.
        per_tile_normalize: every channel of every tile to zero mean and unit variance, in place
            of ImageNet's, so that brightness does not tell neighbours.
    """

    permutations: Tensor

    def __init__(
        self,
        chain: Ops,
        *,
        permutations: int | str = 1000,
        criterion: Criterion = "max_min",
        seed: int = 0,
        grid: int = 3,
        tile: int = 64,
        shift: int = 0,
        per_tile_normalize: bool = False,
    ) -> None:
        super().__init__()
        self.chain, self.cut = Chain(chain), Tiles(grid=grid, size=tile, shift=shift)
        self.per_tile_normalize = per_tile_normalize
        self.register_buffer("permutations", orders(permutations, grid, criterion, seed))

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        (crop,) = taken(batch, 1, "jigsaw")
        x = self.chain(unit(crop), draws.fork("chain"))
        target = to(draws.fork("target").integers(len(self.permutations)), x.device)
        tiles = self.cut(x, self.permutations[target], draws.fork("tiles"))
        tiles = channels_last(standardized(tiles)) if self.per_tile_normalize else finished(tiles)
        return {**batch, "views": [tiles], "target": target}


def orders(given: int | str, grid: int, criterion: Criterion, seed: int) -> Tensor:
    """The permutations that a config asks for, by number or by file: (count, tiles) int64."""
    if isinstance(given, str):
        return load_permutations(given, grid**2)
    return permutations(given, grid, criterion, seed).clone()


def standardized(x: Tensor) -> Tensor:
    """Images (..., H, W), every channel with zero mean and unit variance; constant ones are 0."""
    var, mean = torch.var_mean(x, (-2, -1), correction=0, keepdim=True)
    return (x - mean).mul_(var.clamp(min=1e-8).rsqrt())
