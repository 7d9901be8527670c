"""Which photographs of YFCC100M are used, and their labels, found by passing over the metadata."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unlabeled.data.columns import Columns
from unlabeled.data.metadata import Photo, words
from unlabeled.draws import seed_of

CHUNK = 1 << 16  # photographs looked at together
WORDS = 1 << 21  # different tags counted together: 300 MB


@dataclass(frozen=True)
class Selection:
    """What is asked for; the fields are arguments of `unlabeled.data.yfcc.YFCC`."""

    count: int | None
    seed: int
    target: str | None
    classes: int
    cell: float

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"data.layout.count must be at least 1, got {self.count}")
        if self.target not in (None, "tags", "geo"):
            raise ValueError(f"data.layout.target must be tags, geo or null, got {self.target!r}")
        if self.classes < 2:
            raise ValueError(f"data.layout.classes must be at least 2, got {self.classes}")
        if not 0 < self.cell <= 90:
            raise ValueError(f"data.layout.cell must be in (0, 90] degrees, got {self.cell}")

    @property
    def whole(self) -> bool:
        """Whether all photographs are used, without labels."""
        return self.count is None and self.target is None

    def write(self, rows: Callable[[], Iterator[Photo]], folder: Path) -> None:
        """Writes ids.npy and hashes.npy of the photographs and, of targets, labels and tags.

        Args:
            rows: reads the metadata; once, or, for labels without a count, twice.
            folder: where.

        Raises:
            ValueError: there are fewer than `count`, or none.
        """
        if self.count is not None:
            found = self._subset(rows())
            rows = partial(iter, found)
        names = [] if self.target is None else self._names(rows())
        number = {name: i for i, name in enumerate(names)}
        types: dict[str, Any] = {"ids": np.int64, "hashes": "S32"}
        types |= {} if self.target is None else dict.fromkeys(("labels", "tags", "ends"), np.int64)
        reader, end = rows(), 0
        with Columns(folder, types) as columns:
            while chunk := list(islice(reader, CHUNK)):
                labelled: dict[str, np.ndarray] = {}
                if self.target is not None:
                    tags = [[number[x] for x in self._words(p) if x in number] for p in chunk]
                    chunk = [photo for photo, each in zip(chunk, tags, strict=True) if each]
                    labelled = self._labels(chunk, [each for each in tags if each])
                    labelled["ends"] += end
                    end += len(labelled["tags"])
                columns.add(ids=[x.id for x in chunk], hashes=[x.hash for x in chunk], **labelled)
        if not columns.count:
            raise ValueError(
                "the metadata has no photographs" + (f" with {self.target}" if self.target else "")
            )
        (folder / "classes.json").write_text(json.dumps(names))

    def _subset(self, rows: Iterator[Photo]) -> list[Photo]:
        """The `count` photographs of the smallest rank, in the order of their ids."""
        assert self.count is not None
        kept: list[Photo] = []
        near = np.zeros(0, np.uint64)
        most, seen = np.iinfo(np.uint64).max, 0
        while chunk := list(islice(rows, CHUNK)):
            if self.target is not None:
                chunk = [x for x in chunk if (x.tags if self.target == "tags" else x.place)]
            seen += len(chunk)
            rank = ranks(np.array([x.id for x in chunk], np.int64), self.seed)
            below = np.flatnonzero(rank <= most)
            kept += [chunk[i] for i in below]
            near = np.concatenate([near, rank[below]])
            if len(kept) > self.count + CHUNK:  # bounded, whatever comes
                best = np.argpartition(near, self.count - 1)[: self.count]
                kept, near = [kept[i] for i in best], near[best]
                most = near.max()
        if len(kept) < self.count:
            raise ValueError(
                f"data.layout.count={self.count} is more than the {seen} photographs"
                + (f" with {self.target}" if self.target else "")
            )
        best = np.argpartition(near, self.count - 1)[: self.count]
        return sorted((kept[i] for i in best), key=lambda photo: photo.id)

    def _names(self, rows: Iterator[Photo]) -> list[str]:
        """The `classes` most frequent tags or cells, sorted.

        Exact below `WORDS` different ones. Beyond, the rarer half is forgotten whenever so many
        are known, which none of the most frequent ones is in.
        """
        counted: Counter[str] = Counter()
        for photo in rows:
            counted.update(self._words(photo))
            if len(counted) > max(WORDS, 4 * self.classes):
                counted = Counter(dict(counted.most_common(len(counted) // 2)))
        return sorted(sorted(counted, key=lambda x: (-counted[x], x))[: self.classes])

    def _words(self, photo: Photo) -> list[str]:
        if self.target == "tags":
            return words(photo.tags)
        return [] if photo.place is None else [self._cell(photo)]

    def _labels(self, chunk: list[Photo], tags: list[list[int]]) -> dict[str, np.ndarray]:
        """All tags of photographs, where each one's end, and one of each, drawn by its id."""
        lengths = np.array([len(each) for each in tags], np.int64)
        values = np.array([tag for each in tags for tag in each], np.int64)
        ids = np.array([x.id for x in chunk], np.int64)
        drawn = ranks(ids, seed_of(self.seed, "yfcc tag")) % lengths.astype(np.uint64)
        ends = lengths.cumsum()
        return {
            "labels": values[ends - lengths + drawn.astype(np.int64)],
            "tags": values,
            "ends": ends,
        }

    def _cell(self, photo: Photo) -> str:
        assert photo.place is not None
        longitude, latitude = photo.place
        row = int((min(max(latitude, -90.0), 90.0) + 90) // self.cell)
        middle = np.deg2rad((row + 0.5) * self.cell - 90)
        around = max(1, round(360 / self.cell * float(np.cos(middle).clip(min=0))))
        column = int((longitude + 180) % 360 / 360 * around)
        return f"row {row} column {column} of {around}"


def ranks(values: np.ndarray, seed: int) -> np.ndarray:
    """(N,) uint64 that look random: a bijection of numbers for each seed (splitmix64)."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(seed_of(seed, "yfcc subset"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
