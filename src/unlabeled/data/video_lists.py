"""Recordings that CSV files list by where they were cut from: Kinetics, AudioSet."""

import csv
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from unlabeled.data.files import index
from unlabeled.data.media_files import RECORDINGS, media
from unlabeled.data.splits import Files, Split
from unlabeled.data.video_layouts import listed, long_enough, said
from unlabeled.draws import Draws
from unlabeled.truth import Kept

log = logging.getLogger(__name__)

KINETICS = "https://github.com/cvdfoundation/kinetics-dataset"
AUDIOSET = "https://research.google.com/audioset/download.html"


class Kinetics:
    """Kinetics' lists of clips. Kay et al., 2017, https://arxiv.org/abs/1705.06950.

    A row has label, youtube_id, time_start and time_end; its clip lies anywhere below the root
    under the name <id>_<start>_<end> (six digits each) or <id>. Clips that are not there (videos
    vanish) are left out and counted. Clips of one youtube_id are a group: they stay together when
    settings are chosen, and none is a negative of another.

    Args:
        train: the list of training clips, relative to the root.
        test: that of clips to test on; None: there are none.
        classes: take these only; None: all.
        sound: leave out clips without a track of sound.
        shortest: leave out clips shorter than so many seconds.
    """

    def __init__(
        self,
        *,
        train: str = "annotations/train.csv",
        test: str | None = "annotations/val.csv",
        classes: Sequence[str] | None = None,
        sound: bool = False,
        shortest: float = 0.0,
    ) -> None:
        self.lists = {"train": train} | ({} if test is None else {"test": test})
        self.classes = None if classes is None else tuple(classes)
        self.sound, self.shortest = sound, long_enough(shortest)

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        sides = {side: list(self._rows(root, name)) for side, name in self.lists.items()}
        places = _places(root)
        kinds = self.classes or sorted({row[0] for row in sides["train"]})
        found: dict[str, Files] = {}
        video: dict[str, str] = {}
        for side, rows in sides.items():
            kept = [
                (path, label, cut[0])
                for label, *cut in rows
                if label in kinds and (path := _place(places, cut)) is not None
            ]
            _tell(root / self.lists[side], sum(row[0] in kinds for row in rows), len(kept))
            found[side] = listed(root, [(path, label) for path, label, _ in kept], kinds)
            video |= {path: name for path, _, name in kept}
        options = {"sound": self.sound, "shortest": self.shortest}
        return {**media(found, group=video.__getitem__, **options)}

    def _rows(self, root: Path, name: str) -> Iterator[tuple[str, str, str, str]]:
        columns = ("label", "youtube_id", "time_start", "time_end")
        reader = csv.DictReader(said(root, name, KINETICS).splitlines())
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise ValueError(f"{root / name} has no column {sorted(missing)}: see data=kinetics")
        for row in reader:
            label, *cut = (row[column] or "" for column in columns)
            yield label, cut[0], cut[1], cut[2]


class AudioSet:
    """AudioSet's lists of segments. Gemmeke et al., ICASSP 2017.

    A row has YTID, start_seconds, end_seconds and positive_labels; lines that begin with # are
    comments. Names of files, segments that are not there, and groups are as in `Kinetics`. A
    segment has several labels: annotation `tags` has all of them, and `labels` one of them, drawn
    once.

    Args:
        train: the list of training segments, relative to the root.
        test: that of segments to test on; None: there are none.
        names: the file of index, mid and display_name of all classes; None: classes are the mids.
        sound: leave out recordings without a track of sound.
        shortest: leave out recordings shorter than so many seconds.
    """

    def __init__(
        self,
        *,
        train: str = "balanced_train_segments.csv",
        test: str | None = "eval_segments.csv",
        names: str | None = "class_labels_indices.csv",
        sound: bool = True,
        shortest: float = 0.0,
    ) -> None:
        self.lists = {"train": train} | ({} if test is None else {"test": test})
        self.names, self.sound, self.shortest = names, sound, long_enough(shortest)

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        sides = {side: list(_segments(root, name)) for side, name in self.lists.items()}
        places = _places(root)
        mids, classes = self._classes(root, [mid for row in sides["train"] for mid in row[1]])
        number = {mid: i for i, mid in enumerate(mids)}
        found: dict[str, Files] = {}
        video: dict[str, str] = {}
        for side, rows in sides.items():
            there = [
                (path, cut[0], [number[mid] for mid in several if mid in number])
                for cut, several in rows
                if (path := _place(places, cut)) is not None
            ]
            _tell(root / self.lists[side], len(rows), len(there))
            video |= {path: name for path, name, _ in there}
            kept = [(path, tags) for path, _, tags in there if tags]
            u = Draws("audioset label", side, rows=len(kept)).uniform().tolist()
            drawn = [tags[int(x * len(tags))] for (_, tags), x in zip(kept, u, strict=True)]
            rows_of = [(path, classes[i]) for (path, _), i in zip(kept, drawn, strict=True)]
            tags = Kept([torch.tensor(tags) for _, tags in kept])
            found[side] = replace(listed(root, rows_of, classes), annotations={"tags": tags})
        options = {"sound": self.sound, "shortest": self.shortest}
        return {**media(found, group=video.__getitem__, **options)}

    def _classes(self, root: Path, met: Sequence[str]) -> tuple[list[str], list[str]]:
        """The mids of all classes, and what they are called."""
        if self.names is None:
            mids = sorted(set(met))
            return mids, mids
        reader = csv.DictReader(said(root, self.names, AUDIOSET).splitlines())
        rows = [(row.get("mid"), row.get("display_name")) for row in reader]
        mids, names = [a for a, _ in rows if a], [b for a, b in rows if a and b]
        if not mids or len(mids) != len(names) or len(set(names)) != len(names):
            raise ValueError(
                f"{root / self.names} needs columns mid and display_name, all different"
            )
        return mids, names


def _segments(root: Path, name: str) -> Iterator[tuple[tuple[str, str, str], list[str]]]:
    lines = (line for line in said(root, name, AUDIOSET).splitlines() if not line.startswith("#"))
    for number, row in enumerate(csv.reader(lines, skipinitialspace=True), 1):
        if len(row) != 4:
            raise ValueError(
                f"{root / name}, segment {number}: {len(row)} columns, not YTID, start_seconds, "
                "end_seconds and positive_labels"
            )
        yield (row[0], row[1], row[2]), [mid for mid in row[3].split(",") if mid]


def _places(root: Path) -> dict[str, str]:
    """From the names of the files under a root, without extensions, to their paths."""
    paths = np.char.decode(index(root, RECORDINGS).paths, "utf-8", "surrogateescape").tolist()
    return {Path(path).stem: path for path in paths}


def _place(places: dict[str, str], cut: Sequence[str]) -> str | None:
    """Where a clip lies that was cut from a video, from one second to another."""
    name, start, end = cut
    try:
        full = f"{name}_{round(float(start)):06d}_{round(float(end)):06d}"
    except ValueError:
        full = name
    return places.get(full, places.get(name))


def _tell(path: Path, count: int, kept: int) -> None:
    if not kept:
        raise ValueError(
            f"of the {count} clips of {path}, none lies below its data.root under the name "
            "<id>_<start>_<end> or <id>"
        )
    if kept < count:
        log.warning("%s: of %d clips, %d are not there and left out", path, count, count - kept)
