"""Columns of a table, written row by row into files that can be mapped into memory."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

BLOCK = 1 << 20  # rows copied together


class Columns:
    """Files NAME.npy in a folder, of columns whose length is known at the end alone.

    Args:
        folder: which must exist.
        types: name -> type of its values.
    """

    def __init__(self, folder: Path, types: Mapping[str, DTypeLike]) -> None:
        self.folder, self.types = folder, {name: np.dtype(x) for name, x in types.items()}
        self.count = 0  # of the first column

    def __enter__(self) -> "Columns":
        self._stack = ExitStack()
        self._files = {
            name: self._stack.enter_context((self.folder / name).open("wb")) for name in self.types
        }
        return self

    def add(self, **values: ArrayLike) -> None:
        """More of each column; they may grow by different lengths."""
        for k, (name, file) in enumerate(self._files.items()):
            part = np.asarray(values[name], self.types[name])
            part.tofile(file)
            self.count += len(part) if k == 0 else 0

    def __exit__(self, kind: object, *_: object) -> None:
        self._stack.close()
        for name, dtype in self.types.items():
            if kind is None:
                self._finish(self.folder / name, dtype)
            (self.folder / name).unlink()

    def _finish(self, path: Path, dtype: np.dtype) -> None:
        count = path.stat().st_size // dtype.itemsize
        whole = np.lib.format.open_memmap(path.with_name(f"{path.name}.npy"), "w+", dtype, (count,))
        with open(path, "rb") as file:
            for start in range(0, count, BLOCK):
                whole[start : start + BLOCK] = np.fromfile(file, dtype, BLOCK)
        whole.flush()
