"""The layout of rendered scenes in motion, with sound: recordings from a seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.recordings import Memory
from unlabeled.data.rendered import rendered
from unlabeled.data.scenes import CHUNK, Known, Labels
from unlabeled.data.splits import Split, digest
from unlabeled.scenes.labels import LABELS
from unlabeled.scenes.motion import MOTIONS, Moving
from unlabeled.scenes.render import picture
from unlabeled.scenes.solids import CLASSES, POINTS
from unlabeled.scenes.sound import sounds
from unlabeled.scenes.tracks import tracks
from unlabeled.scenes.world import FACTOR_NAMES, World
from unlabeled.truth import Annotation, Kept

FORMAT = "1"  # raise it when the same settings give other pictures or other sound
TARGETS = {"class": CLASSES, "motion": MOTIONS}


class ScenesVideo:
    """A solid that moves through a room and sounds; its shape is the class.

    As in `Scenes`, nothing but the shape says what the class is, and the timbre of its sound where
    there is sound. Boxes, masks, normals, key-points and factors are those of the picture in the
    middle; `tracks` holds for all pictures, `motion` names the way the first solid goes.

    Args:
        size: side of the pictures in pixels.
        frames: pictures of a recording.
        rate: pictures in a second.
        train: number of training recordings.
        test: number of test recordings; 0: there is no test split.
        seed: of the world, no function of the run's.
        solids: most solids in one recording.
        cards: most cards in one recording.
        vary: how much of its range each factor takes, as in `Scenes`.
        finer: rays along each side of a pixel.
        motion: "random", or of the class' own, or "none".
        sound: samples in a second; null: there is no sound.
        timbre: "class", or "random": a control in which sound says nothing about the class.
        noise: root mean square of the noise in the room.
        target: what labels are: "class" or "motion".

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        size: int = 64,
        frames: int = 12,
        rate: float = 8.0,
        train: int = 2000,
        test: int = 500,
        seed: int = 0,
        solids: int = 1,
        cards: int = 7,
        vary: Mapping[str, float] | None = None,
        finer: int = 1,
        motion: Literal["random", "class", "none"] = "random",
        sound: int | None = None,
        timbre: Literal["class", "random"] = "class",
        noise: float = 0.02,
        target: Literal["class", "motion"] = "class",
    ) -> None:
        for name, value, low in (
            *(("size", size, 8), ("train", train, 1), ("test", test, 0), ("finer", finer, 1)),
            *(("sound", 1000 if sound is None else sound, 1000), ("noise", noise, 0)),
        ):
            if value < low:
                raise ValueError(f"layout.{name} must be at least {low}, got {value}")
        if timbre not in ("class", "random"):
            raise ValueError(f"layout.timbre must be class or random, got {timbre!r}")
        if target not in TARGETS:
            raise ValueError(f"layout.target must be one of {sorted(TARGETS)}, got {target!r}")
        world = World(solids=solids, cards=cards, vary=vary, seed=seed)
        self.moving = Moving(world, frames=frames, rate=rate, motion=motion)
        self.size, self.finer, self.target = size, finer, target
        self.sound, self.timbre, self.noise = sound, timbre, noise
        self.counts = {"train": train, "test": test}

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        """Renders the recordings, or maps those that lie under the root since they were."""
        return {side: self._split(root, side, n) for side, n in self.counts.items() if n}

    def _split(self, root: Path, side: str, count: int) -> Memory:
        moving = self.moving
        shared = Known(moving, side, self.size)
        known: dict[str, Annotation] = {kind: Labels(shared, kind, count) for kind in LABELS}
        known["tracks"] = _Tracks(moving, side, self.size, count)
        ways = moving.motions(side, range(count))
        known["motion"] = Kept(ways)
        classes = TARGETS[self.target]
        one = moving.solids == 1 or self.target == "motion"
        labels = ways if self.target == "motion" else moving.world.classes(range(count))
        audio = None if self.sound is None else self._audio(root, side, count, self.sound)
        return Memory(
            frames=torch.from_numpy(self._frames(root, side, count)),
            rate=moving.rate,
            audio=audio,
            audio_rate=self.sound or 0,
            labels=labels if one else None,
            classes=classes,
            annotations=known,
            names={"keypoints": POINTS, "factors": FACTOR_NAMES, "motion": MOTIONS},
        )

    def _frames(self, root: Path, side: str, count: int) -> np.ndarray:
        frames, size = self.moving.frames, self.size
        said = (size, self.finer, self.moving.world.cards, sorted(self.moving.world.vary.items()))

        def make(positions: range) -> np.ndarray:
            each = [self.moving.at(side, positions, k) for k in range(frames)]
            return torch.stack([picture(s, size, self.finer) for s in each], dim=1).numpy()

        shape, chunk = (count, frames, 3, size, size), max(1, CHUNK // 4)
        what = f"{count} {side} recordings of {frames} pictures of {size} pixels"
        path = root / f"pictures-{self._key(side, count, *said)}.npy"
        return rendered(path, shape, np.uint8, make, chunk, what)

    def _audio(self, root: Path, side: str, count: int, rate: int) -> Tensor:
        def make(positions: range) -> np.ndarray:
            options = {"timbre": self.timbre, "noise": self.noise}
            heard = sounds(self.moving, side, positions, rate, **options)
            return (heard * 32767).round().to(torch.int16).numpy()

        samples = round(self.moving.frames / self.moving.rate * rate)
        path = root / f"sound-{self._key(side, count, rate, self.timbre, self.noise)}.npy"
        what = f"the sound of {count} {side} recordings"
        return torch.from_numpy(rendered(path, (count, samples), np.int16, make, CHUNK, what))

    def _key(self, side: str, count: int, *more: object) -> str:
        m = self.moving
        said = (FORMAT, side, count, m.frames, m.rate, m.motion, m.solids, m.seed, *more)
        return digest([repr(said).encode()], None, ())


class _Tracks(Annotation):
    """Boxes of every solid in every picture of the recordings of a split."""

    def __init__(self, moving: Moving, split: str, size: int, count: int) -> None:
        self.moving, self.split, self.size, self.count = moving, split, size, count

    def __len__(self) -> int:
        return self.count

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        return tracks(self.moving, self.split, [int(i) for i in positions], self.size)
