"""The layout of rendered scenes: images from a seed, kept on disk once they are made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.rendered import rendered
from unlabeled.data.splits import Array, Split, digest
from unlabeled.scenes.labels import LABELS, labels, normals
from unlabeled.scenes.render import picture
from unlabeled.scenes.solids import CLASSES, POINTS
from unlabeled.scenes.world import FACTOR_NAMES, FACTORS, Scene, World
from unlabeled.truth import Annotation

FORMAT = "2"  # raise it when the same settings render other pixels
CHUNK = 32  # scenes that are rendered at once
MAPS = ("masks", "segmentation", "normals")


class Scenes:
    """A solid of one of ten shapes in a room, among cards; the shape is the class.

    Where it stands, how large it is, how it is turned, colours, textures, light, the room and
    the clutter say nothing about the class. Every image is a function of (seed, split, index),
    and of no count. Boxes, masks, segmentation, normals, key-points and factors are exact and
    made when they are asked for: see `unlabeled.truth`.

    Args:
        size: side of the images in pixels.
        train: number of training images.
        test: number of test images; 0: there is no test split.
        seed: of the world, no function of the run's, so that runs share their images.
        solids: most solids in one image; with more than one, images have boxes but no label.
        cards: most cards in one image.
        vary: how much of its range each factor takes, in [0, 1], by the names in
            `unlabeled.scenes.world.FACTORS`; 1 where nothing is given.
        finer: rays along each side of a pixel that its colour is the mean of.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        size: int = 64,
        train: int = 10000,
        test: int = 2000,
        seed: int = 0,
        solids: int = 1,
        cards: int = 7,
        vary: Mapping[str, float] | None = None,
        finer: int = 2,
    ) -> None:
        for name, value, low in (
            *(("size", size, 8), ("train", train, 1)),
            *(("test", test, 0), ("finer", finer, 1)),
        ):
            if value < low:
                raise ValueError(f"layout.{name} must be at least {low}, got {value}")
        self.world = World(solids=solids, cards=cards, vary=vary, seed=seed)
        self.size, self.finer = size, finer
        self.counts = {"train": train, "test": test}

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        """Renders the images, or maps those that lie under the root since they were rendered."""
        return {side: self._split(root, side, n) for side, n in self.counts.items() if n}

    def pictures(
        self, split: str, positions: Sequence[int], redraw: Mapping[str, int] | None = None
    ) -> Tensor:
        """Some images (B, 3, size, size) uint8, rendered now.

        Args:
            split: "train" or "test".
            positions: of images, as without `data.limit`; any may be asked for.
            redraw: factor -> number of another draw: the same scenes but for these factors, to
                measure what a change of one does to features.
        """
        scenes = self.world.scenes(split, positions, redraw)
        return picture(scenes, self.size, self.finer)

    def _split(self, root: Path, side: str, count: int) -> Array:
        one = self.world.solids == 1
        known: dict[str, Annotation] = {}
        shared = Known(self.world, side, self.size)
        for kind in LABELS:
            known[kind] = Labels(shared, kind, count)
        known["redrawn"] = Redrawn(self, side, count)
        return Array(
            torch.from_numpy(self._pixels(root, side, count)),
            self.world.classes(range(count)) if one else None,
            CLASSES,
            known,
            {"keypoints": POINTS, "factors": FACTOR_NAMES, "redrawn": tuple(FACTORS)},
        )

    def _pixels(self, root: Path, side: str, count: int) -> np.ndarray:
        w = self.world
        said = (FORMAT, side, count, self.size, self.finer, w.seed, w.solids, w.cards)
        key = digest([repr((*said, sorted(w.vary.items()))).encode()], None, ())
        shape = (count, 3, self.size, self.size)
        what = f"{count} {side} scenes of {self.size} pixels"

        def make(positions: range) -> np.ndarray:
            return self.pictures(side, positions).numpy()

        return rendered(root / f"scenes-{key}.npy", shape, np.uint8, make, CHUNK, what)


class Drawn(Protocol):
    """What gives scenes by split and positions."""

    def scenes(self, split: str, positions: Sequence[int]) -> Scene:
        """Those at some positions."""
        ...


class Known:
    """What is known about the scenes of a split; all but maps is kept once it was asked for."""

    def __init__(self, world: Drawn, split: str, size: int) -> None:
        self.world, self.split, self.size = world, split, size
        self.found: dict[int, dict[str, Tensor]] = {}

    def __call__(self, kind: str, positions: Sequence[int]) -> Sequence[Tensor]:
        places = [int(i) for i in positions]
        if kind == "normals":
            return [n for part in _chunks(places) for n in normals(self._scenes(part), self.size)]
        if kind in MAPS:
            return [known[kind] for part in _chunks(places) for known in self._labels(part)]
        for part in _chunks([i for i in dict.fromkeys(places) if i not in self.found]):
            for i, known in zip(part, self._labels(part), strict=True):
                self.found[i] = {k: x.clone() for k, x in known.items() if k not in MAPS}
        return [self.found[i][kind] for i in places]

    def _labels(self, positions: Sequence[int]) -> list[dict[str, Tensor]]:
        return labels(self._scenes(positions), self.size)

    def _scenes(self, positions: Sequence[int]) -> Scene:
        return self.world.scenes(self.split, positions)


class Labels(Annotation):
    """One kind of what is known about the scenes of a split."""

    def __init__(self, known: Known, kind: str, count: int) -> None:
        self.known, self.kind, self.count = known, kind, count

    def __len__(self) -> int:
        return self.count

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        return self.known(self.kind, positions)


class Redrawn(Annotation):
    """The scenes of a split rendered again, one factor after the other drawn anew: not kept."""

    def __init__(self, layout: Scenes, split: str, count: int) -> None:
        self.layout, self.split, self.count = layout, split, count

    def __len__(self) -> int:
        return self.count

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        found = []
        for part in _chunks([int(i) for i in positions]):
            each = [self.layout.pictures(self.split, part, {name: 1}) for name in FACTORS]
            found += torch.stack(each, dim=1).unbind()
        return found


def _chunks(positions: Sequence[int]) -> list[Sequence[int]]:
    return [positions[i : i + CHUNK] for i in range(0, len(positions), CHUNK)]
