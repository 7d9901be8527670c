"""Arrays that are computed once and then lie on disk: pictures and sounds of rendered scenes."""

import logging
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)


def rendered(
    path: Path,
    shape: tuple[int, ...],
    dtype: Any,
    make: Callable[[range], np.ndarray],
    chunk: int,
    what: str,
) -> np.ndarray:
    """What a file holds, mapped to memory; made and kept if there is no such file yet.

    Args:
        path: the file; its name says everything that decides its contents.
        shape: of the array, rows first.
        dtype: of its numbers.
        make: gives rows of it.
        chunk: rows that are made at once.
        what: names the contents in messages.

    Raises:
        ValueError: the file was written and cannot be read.
    """
    kept = _kept(path, shape, dtype)
    if kept is not None:
        return kept
    log.warning("rendering %s, once", what)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            part = Path(file.name)
    except OSError as error:
        log.warning("scenes are not kept for the next run: %s", error)
        values = np.empty(shape, dtype=dtype)
        _fill(values, make, chunk)
        return values
    try:
        values = np.lib.format.open_memmap(part, "w+", dtype, shape)
        _reserve(part)
        _fill(values, make, chunk)
        values.flush()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    found = _kept(path, shape, dtype)
    if found is None:
        raise ValueError(f"{path} was written and cannot be read: is the disk full?")
    return found


def _fill(into: np.ndarray, make: Callable[[range], np.ndarray], chunk: int) -> None:
    def put(start: int) -> None:
        stop = min(start + chunk, len(into))
        into[start:stop] = make(range(start, stop))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(put, range(0, len(into), chunk)):
            pass


def _reserve(path: Path) -> None:
    """Takes the disk space of a file that is as long as it will be, but not written yet.

    Without it, memory mapped to a file that no longer fits ends the process without a word.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _kept(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """The array in a file, or None if it is not there or damaged."""
    try:
        found = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception:  # on damaged files numpy raises nearly anything
        return None
    return found if found.shape == shape and found.dtype == np.dtype(dtype) else None
