"""Tracks that were mined in recordings: their index, and pairs of patches (Wang & Gupta, 2015).

An index is one file for each split, DIR/<split>.npz, which scripts/mine_tracks.py writes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from unlabeled.batch import Batch
from unlabeled.data.clip_decode import entries
from unlabeled.data.decode import Interpolation, resized
from unlabeled.data.layouts import Layout
from unlabeled.data.recordings import Recorded, Recording, middle
from unlabeled.data.splits import Split
from unlabeled.draws import Draws, shuffled
from unlabeled.truth import Annotation

MINE = "mine them with scripts/mine_tracks.py"


@dataclass(frozen=True)
class Tracks:
    """Where patches were at the beginning and at the end of being tracked.

    Args:
        recording: (M,) int64, rising: which recording of the split each was found in.
        frames: (M, 2) int64, positions of the first and the last picture.
        boxes: (M, 2, 4) float32: left, top, right, bottom in these, as `unlabeled.truth` has them.
    """

    recording: Tensor
    frames: Tensor
    boxes: Tensor

    def write(self, path: Path, identity: str) -> None:
        """Keeps them, whole or not at all. `identity` is that of the recordings."""
        part = path.with_name(f".{path.name}.partial")
        with part.open("wb") as file:
            arrays = {name: getattr(self, name).numpy() for name in ("recording", "frames")}
            np.savez(file, identity=np.array(identity), boxes=self.boxes.numpy(), **arrays)
        os.replace(part, path)


def read(path: Path, identity: str) -> Tracks:
    """The index of a split. Raises ValueError if it is none, or one of other recordings."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            found = {name: torch.from_numpy(kept[name]) for name in Tracks.__annotations__}
            said = str(kept["identity"])
    except Exception as error:  # on damaged files zipfile and numpy raise nearly anything
        raise ValueError(f"{path} is no index of tracks ({error}): {MINE}") from error
    if said != identity:
        raise ValueError(f"{path} was mined in other recordings than these: {MINE}, elsewhere")
    return Tracks(**found)


class Tracked:
    """A recording and the tracks that were mined in it.

    Args:
        whole: the recording.
        frames: (M, 2), see `Tracks`.
        boxes: (M, 2, 4).
    """

    def __init__(self, whole: Recording, frames: Tensor, boxes: Tensor) -> None:
        self.whole, self.frames, self.boxes = whole, frames, boxes
        self.pictures, self.sound, self.motion = whole.pictures, whole.sound, whole.motion

    @property
    def times(self) -> Tensor:
        return self.whole.times

    @property
    def seconds(self) -> float:
        return self.whole.seconds

    @property
    def sounding(self) -> bool:
        return self.whole.sounding


@dataclass(frozen=True)
class TrackedSplit:
    """A split of recordings with their tracks; training visits those that have some.

    Args:
        whole: the split.
        tracks: all of them.
        first: (N + 1,) int64: recording i has the tracks from first[i] to first[i + 1].
    """

    whole: Split
    tracks: Tracks
    first: Tensor

    @property
    def labels(self) -> Tensor | None:
        return self.whole.labels

    @property
    def groups(self) -> Tensor | None:
        """What stays together when the split is divided, see `splits.parted`."""
        return getattr(self.whole, "groups", None)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes

    @property
    def annotations(self) -> Mapping[str, Annotation]:
        return self.whole.annotations

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        return self.whole.names

    def __len__(self) -> int:
        return len(self.whole)

    def name(self, i: int) -> str:
        return self.whole.name(i)

    def image(self, i: int) -> Tensor:
        return middle(self.recording(i))

    def recording(self, i: int) -> Tracked:
        own = slice(int(self.first[i]), int(self.first[i + 1]))
        whole = cast(Recorded, self.whole).recording(i)
        return Tracked(whole, self.tracks.frames[own], self.tracks.boxes[own])

    def take(self, positions: Tensor) -> "TrackedSplit":
        """Some of the recordings, in the order of `positions`."""
        counts = self.first.diff()[positions]
        first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        place = torch.arange(int(first[-1])) - first[:-1].repeat_interleave(counts)
        rows = self.first[positions].repeat_interleave(counts) + place
        owner = torch.arange(len(positions)).repeat_interleave(counts)
        some = Tracks(owner, self.tracks.frames[rows], self.tracks.boxes[rows])
        return replace(self, whole=self.whole.take(positions), tracks=some, first=first)

    def identity(self) -> str:
        return self.whole.identity()

    def order(self, batch_size: int, *key: int | str) -> Tensor:
        """Recordings with tracks, in random order; again and again until they are an epoch."""
        some = self.first.diff().nonzero().flatten()
        if not len(some):
            raise ValueError(f"nothing was tracked in these {len(self)} recordings: {MINE}")
        passes = -(-len(self) // len(some))
        orders = [some[shuffled(len(some), *key, "tracks", i)] for i in range(passes)]
        return torch.cat(orders)[: len(self)]


class WithTracks:
    """The recordings of a layout, with the tracks of a folder.

    Args:
        layout: of recordings.
        folder: of the index.
    """

    def __init__(self, layout: Layout, folder: str) -> None:
        self.layout, self.folder = layout, Path(folder).expanduser()

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        return {side: self._with(side, x) for side, x in self.layout(root, seed).items()}

    def _with(self, side: str, split: Split) -> TrackedSplit:
        if not isinstance(split, Recorded):
            raise ValueError("tracks are of recordings, and the data are images: data.tracks=null")
        found = read(self.folder / f"{side}.npz", split.identity())
        counts = found.recording.bincount(minlength=len(split))
        return TrackedSplit(split, found, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


class Patches(Protocol):
    """A decode that needs `data.tracks`."""

    tracked: bool


class TrackPair:
    """The first and the last patch of one of a recording's tracks: two crops, and `frames` (2,).

    Of a recording without tracks (training meets none), they are the largest square in the middle
    of its first and of its last picture.

    Args:
        size: side in pixels that patches are resized to.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    gives = frozenset({"crops", "frames"})
    tracked = True

    def __init__(self, *, size: int, interpolation: Interpolation = "bilinear") -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size, self.interpolation = size, interpolation

    def __call__(self, recording: Recording, *key: int | str) -> Batch:
        if isinstance(recording, Tracked) and len(recording.frames):
            which = int(Draws(*key, "track").integers(len(recording.frames)))
            frames, boxes = recording.frames[which], recording.boxes[which].tolist()
        else:
            frames, boxes = torch.tensor([0, len(recording.times) - 1]), [None, None]
        pictures = recording.pictures(frames.tolist())
        crops = [self._cut(x, box) for x, box in zip(pictures, boxes, strict=True)]
        return entries(crops, frames.clone(), None)

    def _cut(self, picture: Tensor, box: Sequence[float] | None) -> Tensor:
        height, width = picture.shape[-2:]
        if box is None:
            side = min(height, width)
            left, top = (width - side) // 2, (height - side) // 2
            box = [left, top, left + side, top + side]
        left, right = _within(box[0], box[2], width)
        top, bottom = _within(box[1], box[3], height)
        part = picture[None, :, top:bottom, left:right]
        return resized(part, self.size, self.size, self.interpolation)[0]

    def __repr__(self) -> str:
        return f"TrackPair(size={self.size}, interpolation={self.interpolation!r})"


def _within(low: float, high: float, length: int) -> tuple[int, int]:
    """Whole pixels of an edge that are in the picture, at least one."""
    start = min(max(0, round(low)), length - 1)
    return start, max(start + 1, min(round(high), length))
