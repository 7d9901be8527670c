"""Recordings in media files: splits of them, with what is known of each file."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.files import Kind, cache_folder
from unlabeled.data.lasting import few
from unlabeled.data.media import Film
from unlabeled.data.media_index import Table, indexed
from unlabeled.data.recordings import middle
from unlabeled.data.rgb import UnreadableError
from unlabeled.data.sound_files import SoundFile, probe_sound
from unlabeled.data.splits import Files
from unlabeled.truth import Annotation

log = logging.getLogger(__name__)
RECORDINGS = Kind(
    "recordings",
    frozenset(
        (
            *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".flv", ".wmv"),
            *(".ogv", ".3gp", ".ts", ".mts"),
        )
    ),
)


@dataclass(frozen=True)
class Media:
    """Recordings in files.

    Args:
        files: which, with their labels.
        table: what is known of them.
        rows: (N,) int64, where in the table.
        groups: (N,) int64: recordings of one group stay together when a split is divided; None:
            each is alone.
        pictured: false: they are sounds, without pictures.
    """

    files: Files
    table: Table
    rows: np.ndarray
    groups: Tensor | None = None
    pictured: bool = True

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.files.root

    @property
    def labels(self) -> Tensor | None:
        return self.files.labels

    @property
    def classes(self) -> tuple[str, ...]:
        return self.files.classes

    @property
    def annotations(self) -> Mapping[str, Annotation]:
        return self.files.annotations

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        return self.files.names

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        """What to call a recording in a message."""
        return self.files.name(i)

    def recording(self, i: int) -> Film | SoundFile:
        """One of them. Raises `UnreadableError`."""
        row = int(self.rows[i])
        facts, stamp = self.table.facts(row), self.table.stamp(row)
        if facts.reason:
            raise UnreadableError(facts.reason)
        path = self.root / self.name(i)
        if not self.pictured:
            return SoundFile(path, facts)
        said = f"{path.absolute()} {stamp.size} {stamp.changed}".encode("utf-8", "surrogateescape")
        name = hashlib.blake2b(said, digest_size=16).hexdigest()
        return Film(path, facts, cache_folder().parent / f"motion/{name[:2]}/{name}.npy")

    def lengths(self) -> Tensor:
        """(N,) int64: pictures of each; 0 of what cannot be read."""
        return torch.from_numpy(self.table.numbers[self.rows, 0])

    def image(self, i: int) -> Tensor:
        """The picture in the middle, RGB (3, H, W) uint8. Raises `UnreadableError`."""
        return middle(self.recording(i))

    def take(self, positions: Tensor) -> "Media":
        """Some of the recordings, in the order of `positions`."""
        groups = None if self.groups is None else self.groups[positions]
        rows = self.rows[positions.numpy()]
        return replace(self, files=self.files.take(positions), rows=rows, groups=groups)

    def identity(self) -> str:
        """A hash of which recordings these are, in their order, with their labels."""
        return self.files.identity()


def media(
    splits: Mapping[str, Files],
    *,
    sound: bool = False,
    shortest: float = 0.0,
    group: Callable[[str], str] | None = None,
    pictured: bool = True,
) -> dict[str, Media]:
    """Splits of media files, with what is known of each file.

    What is too short, or has no sound though some is asked for, is left out, counted and named.
    What cannot be read stays, to be counted as unreadable where it is met.

    Args:
        splits: the files.
        sound: leave out recordings without a track of sound.
        shortest: leave out recordings shorter than so many seconds.
        group: from a name to that of its group.
        pictured: false: of sound files, whose pictures nobody asks for.

    Raises:
        ValueError: nothing is left to train on.
    """
    everything = dict.fromkeys(path for files in splits.values() for path in files.paths.tolist())
    root = splits["train"].root
    read = None if pictured else probe_sound
    table = indexed(root, list(everything), read)
    at = {path: i for i, path in enumerate(everything)}
    found = {}
    for side, files in splits.items():
        rows = np.array([at[path] for path in files.paths.tolist()], dtype=np.int64)
        groups = None
        if group is not None:
            names = [group(files.name(i)) for i in range(len(files))]
            groups = torch.from_numpy(np.unique(names, return_inverse=True)[1])
        whole = Media(files, table, rows, groups, pictured)
        found[side] = whole.take(_fitting(whole, sound, shortest, side))
    if not len(found["train"]):
        asked = f" lasts {shortest:g} s" + (" and has sound" if sound else "")
        raise ValueError(f"{root}: no training recording{asked}: see data.layout.shortest")
    return found


def _fitting(split: Media, sound: bool, shortest: float, where: str) -> Tensor:
    """Positions of the recordings that are long enough and sound as they should."""
    mute, short, kept = [], [], []
    for i, row in enumerate(split.rows.tolist()):
        facts = split.table.facts(row)
        if facts.reason:
            kept.append(i)
        elif sound and not facts.sounding:
            mute.append(i)
        elif (facts.end - int(facts.pts[0])) * facts.base < shortest:
            short.append(i)
        else:
            kept.append(i)
    if mute or short:
        log.warning(
            "%s: of %d recordings, %d without sound and %d shorter than %g s are left out: %s",
            *(where, len(split), len(mute), len(short), shortest),
            few([split.name(i) for i in [*mute, *short]]),
        )
    return torch.tensor(kept, dtype=torch.int64)
