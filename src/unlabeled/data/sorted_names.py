"""Names in order, however many: sorted in runs that wait on the disk, then merged."""

import heapq
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

RUN = 1 << 15  # names in memory at a time
READ = 1 << 10  # rows of a run read at a time, while they are merged

Entry = tuple[bytes, int]


def _row(width: int) -> np.dtype:
    """A name of at most `width` bytes, and a number."""
    return np.dtype([("name", np.bytes_, width), ("number", "<i8")])


class SortedNames:
    """Collects names with a number each, and gives them back sorted in one table.

    As Python's objects there is a run of them at a time, whatever their number.

    Args:
        folder: where runs wait, in a file without a name; if it cannot be written they wait in
            memory, as rows of bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count, self.width = 0, 1  # of names; of the longest
        self._entries: list[Entry] = []
        self._runs: list[tuple[int, int, np.dtype] | np.ndarray] = []  # place, length, type
        self._file: BinaryIO | None = None
        self._writes = True

    def __enter__(self) -> "SortedNames":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, name: bytes, number: int) -> None:
        """One more."""
        self.count, self.width = self.count + 1, max(self.width, len(name))
        self._entries.append((name, number))
        if len(self._entries) == RUN:
            self._put_down()

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """All of them in order: names (n,) bytes, numbers (n,) int64."""
        merged = heapq.merge(*(self._read(run) for run in self._runs), sorted(self._entries))
        names = np.empty(self.count, (np.bytes_, self.width))
        numbers = np.empty(self.count, np.int64)
        for i in range(0, self.count, READ):
            part = zip(*itertools.islice(merged, READ), strict=True)
            names[i : i + READ], numbers[i : i + READ] = part
        return names, numbers

    def _put_down(self) -> None:
        self._entries.sort()
        run = np.array(self._entries, _row(max(len(name) for name, _ in self._entries)))
        self._entries = []
        self._runs.append(self._kept(run))

    def _kept(self, run: np.ndarray) -> tuple[int, int, np.dtype] | np.ndarray:
        if not self._writes:
            return run
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            place = self._file.seek(0, os.SEEK_END)
            data = memoryview(run.tobytes())
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            self._writes = False  # read-only or full
            return run
        return place, len(run), run.dtype

    def _read(self, run: tuple[int, int, np.dtype] | np.ndarray) -> Iterator[Entry]:
        if isinstance(run, np.ndarray):
            for i in range(0, len(run), READ):
                yield from run[i : i + READ].tolist()
            return
        place, length, dtype = run
        assert self._file is not None
        for i in range(0, length, READ):
            size = min(READ, length - i) * dtype.itemsize
            data = os.pread(self._file.fileno(), size, place + i * dtype.itemsize)
            yield from np.frombuffer(data, dtype).tolist()
