"""An image and its transformed self, for PIRL (Misra & van der Maaten, 2019)."""

from torch import Tensor, nn

from unlabeled.augment.geometry import rotate_rows
from unlabeled.augment.jigsaw import orders
from unlabeled.augment.permutations import Criterion
from unlabeled.augment.tiles import Tiles
from unlabeled.augment.views import Chain, Ops, finished, taken, unit
from unlabeled.batch import Batch
from unlabeled.draws import Draws, to


class PatchesOfImage(nn.Module):
    """views = [image (B, 3, H, W), shuffled patches (B, T, 3, tile, tile)] of two crops.

    Where patches lie is drawn per image; flips and colours per patch; patch i of image b is row
    T * b + i of the flattened patches.

    Args:
        image: ops on the first crop.
        patch: ops on each patch of the second crop.
        grid: cells per side.
        tile: side of a patch in pixels, at a random place in its cell.
        permutations: null for a random order out of all, or how many orders there are, or a
            `.npy` file of them.
        criterion: how they are chosen, see `permutations.permutations`.
        seed: of that choice.
        rotate: turn the second crop by a multiple of 90 degrees first (PIRL's Rotation + Jigsaw).
    """

    permutations: Tensor | None

    def __init__(
        self,
        image: Ops,
        patch: Ops,
        *,
        grid: int = 3,
        tile: int = 64,
        permutations: int | str | None = None,
        criterion: Criterion = "max_min",
        seed: int = 0,
        rotate: bool = False,
    ) -> None:
        super().__init__()
        self.image, self.patch = Chain(image), Chain(patch)
        self.cut, self.rotate = Tiles(grid=grid, size=tile), rotate
        some = None if permutations is None else orders(permutations, grid, criterion, seed)
        self.register_buffer("permutations", some)

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        first, second = taken(batch, 2, "images (one and its pair)")
        image = self.image(unit(first), draws.fork("image"))
        if self.rotate:
            second = rotate_rows(second.clone(), draws.fork("turns").integers(4))
        order = self._orders(draws.fork("order"), second)
        tiles = unit(self.cut(second, order, draws.fork("tiles")))  # B T 3 h w
        count = tiles.shape[1]
        patches = self.patch(tiles.flatten(0, 1), draws.fork("patch").times(count))
        patches = patches.unflatten(0, (-1, count))
        return {**batch, "views": [finished(image), finished(patches)]}

    def _orders(self, draws: Draws, x: Tensor) -> Tensor:
        if self.permutations is None:
            return to(draws.permutations(self.cut.grid**2), x.device)
        return self.permutations[to(draws.integers(len(self.permutations)), x.device)]


class RotationOfImage(nn.Module):
    """views = [image (B, 3, S, S), turned image (B, 3, S, S)] of two crops.

    Args:
        image: ops on the first crop.
        turned: ops on the second crop, before its turn by a random multiple of 90 degrees.
    """

    def __init__(self, image: Ops, turned: Ops) -> None:
        super().__init__()
        self.image, self.turned = Chain(image), Chain(turned)

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        first, second = taken(batch, 2, "images (one and its pair)")
        image = self.image(unit(first), draws.fork("image"))
        other = self.turned(unit(second), draws.fork("turned"))
        other = rotate_rows(other, draws.fork("turns").integers(4))
        return {**batch, "views": [finished(image), finished(other)]}
