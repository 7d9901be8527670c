"""Which photographs of YFCC100M are used, and their labels; found in one pass over the metadata."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from unlabeled.data.metadata import Photo, words
from unlabeled.draws import Draws, seed_of

CHUNK = 1 << 16  # photographs looked at together


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

    def write(self, rows: Iterator[Photo], folder: Path) -> None:
        """Writes ids.npy and hashes.npy of the photographs and, of targets, labels and tags.

        Raises:
            ValueError: there are fewer than `count`.
        """
        if self.count is None:
            _write_all(rows, folder)
            return
        found = self._subset(rows)
        if self.target is not None:
            found = self._write_targets(found, folder)
        _save(folder, ids=[x.id for x in found], hashes=[x.hash for x in found])

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

    def _write_targets(self, found: list[Photo], folder: Path) -> list[Photo]:
        """Labels of the photographs that have a frequent one; the others are left out."""
        has = [words(x.tags) if self.target == "tags" else [self._cell(x)] for x in found]
        counted = Counter(word for each in has for word in each)
        names = sorted(counted, key=lambda word: (-counted[word], word))[: self.classes]
        number = {name: i for i, name in enumerate(sorted(names))}
        tags = [[number[word] for word in each if word in number] for each in has]
        some = [i for i, each in enumerate(tags) if each]
        lengths = np.array([len(tags[i]) for i in some])
        draws = Draws(self.seed, "yfcc tag", rows=len(some)).uniform().numpy()
        values = np.array([tag for i in some for tag in tags[i]], np.int64)
        drawn = (draws * lengths).astype(np.int64).clip(max=lengths - 1)
        labels = values[lengths.cumsum() - lengths + drawn]
        _save(folder, labels=labels, tags=values, ends=lengths.cumsum())
        (folder / "classes.json").write_text(json.dumps(sorted(names)))
        return [found[i] for i in some]

    def _cell(self, photo: Photo) -> str:
        assert photo.place is not None
        longitude, latitude = photo.place
        row = int((min(max(latitude, -90.0), 90.0) + 90) // self.cell)
        middle = np.deg2rad((row + 0.5) * self.cell - 90)
        around = max(1, round(360 / self.cell * float(np.cos(middle).clip(min=0))))
        column = int((longitude + 180) % 360 / 360 * around)
        return f"row {row} column {column} of {around}"


def _write_all(rows: Iterator[Photo], folder: Path) -> None:
    """All photographs, chunk by chunk, as files that can be mapped into memory."""
    count = 0
    with open(folder / "ids", "wb") as ids, open(folder / "hashes", "wb") as hashes:
        while chunk := list(islice(rows, CHUNK)):
            np.array([x.id for x in chunk], np.int64).tofile(ids)
            np.array([x.hash for x in chunk], "S32").tofile(hashes)
            count += len(chunk)
    if not count:
        raise ValueError("the metadata has no photographs")
    for name, dtype in (("ids", np.dtype(np.int64)), ("hashes", np.dtype("S32"))):
        raw = np.memmap(folder / name, dtype, mode="r")
        whole = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (count,))
        for start in range(0, count, 1 << 20):
            whole[start : start + (1 << 20)] = raw[start : start + (1 << 20)]
        whole.flush()
        (folder / name).unlink()


def _save(folder: Path, **arrays: Sequence[int] | Sequence[bytes] | np.ndarray) -> None:
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", np.asarray(values), allow_pickle=False)


def ranks(values: np.ndarray, seed: int) -> np.ndarray:
    """(N,) uint64 that look random: a bijection of numbers for each seed (splitmix64)."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(seed_of(seed, "yfcc subset"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
