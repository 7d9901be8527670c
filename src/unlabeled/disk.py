"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def replace(path: Path, text: str) -> None:
    """Writes a file, or its new contents, in one piece.

    Args:
        path: in a folder that exists, or whose own folder does.
        text: what it is to hold.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    with _whole(path) as file:
        file.write(text.encode())


def replace_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """The same of arrays, as a compressed `.npz`."""
    with _whole(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
