"""What was found in YFCC100M's metadata, in files that are kept and mapped into memory."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.files import cache_folder
from unlabeled.truth import Annotation

log = logging.getLogger(__name__)
Found = TypeVar("Found")


class Ragged(Annotation):
    """Runs of one array, which may lie on the disk.

    Args:
        values: (M,) int64.
        ends: (R,) int64: where in it each row's run ends.
        rows: (N,) int64, the row of each image; None: its own.
    """

    def __init__(
        self, values: np.ndarray, ends: np.ndarray, rows: np.ndarray | None = None
    ) -> None:
        self.values, self.ends, self.rows = values, ends, rows

    def __len__(self) -> int:
        return len(self.ends if self.rows is None else self.rows)

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        found = []
        for i in positions:
            row = int(i if self.rows is None else self.rows[i])
            start = int(self.ends[row - 1]) if row else 0
            found.append(torch.from_numpy(np.array(self.values[start : int(self.ends[row])])))
        return found

    def take(self, positions: Tensor) -> "Ragged":
        """Those of the images at `positions` alone."""
        at = positions.numpy()
        return Ragged(self.values, self.ends, at if self.rows is None else self.rows[at])


class Table(NamedTuple):
    """Photographs and their labels; the fields are those of `unlabeled.data.yfcc.Photos`."""

    ids: np.ndarray
    hashes: np.ndarray
    labels: Tensor | None
    classes: tuple[str, ...]
    annotations: Mapping[str, Annotation]

    @classmethod
    def read(cls, folder: Path) -> "Table":
        """What `unlabeled.data.selection.Selection.write` wrote.

        Raises:
            OSError, ValueError, EOFError: a file is not there, or is damaged.
        """
        ids, hashes = (np.load(folder / f"{x}.npy", mmap_mode="r") for x in ("ids", "hashes"))
        classes = tuple(json.loads((folder / "classes.json").read_text()))
        if len(ids) != len(hashes):
            raise ValueError(f"{len(ids)} ids and {len(hashes)} hashes")
        if not classes:
            return cls(ids, hashes, None, (), {})
        labels, tags, ends = (
            np.load(folder / f"{x}.npy", mmap_mode="c") for x in ("labels", "tags", "ends")
        )
        if not len(labels) == len(ends) == len(ids) or len(tags) != ends[-1]:
            raise ValueError(f"{len(labels)} labels and {len(tags)} tags of {len(ids)}")
        return cls(ids, hashes, torch.from_numpy(labels), classes, {"tags": Ragged(tags, ends)})


def kept(key: str, make: Callable[[Path], None], read: Callable[[Path], Found]) -> Found:
    """What `read` finds in the cache's folder for a key, which `make` fills if it cannot.

    Args:
        key: all that it depends on.
        make: writes into a folder.
        read: raises OSError, ValueError or EOFError if something is missing or damaged.
    """
    name = blake2b(key.encode(), digest_size=16).hexdigest()
    folder = cache_folder().parent / "yfcc" / name
    with suppress(OSError, ValueError, EOFError):
        return read(folder)
    partial = folder.with_name(f".{name}.{os.getpid()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        make(partial)
        with suppress(OSError, ValueError, EOFError):  # another process was faster
            return read(folder)
        if folder.exists():
            log.warning("%s was damaged: made again", folder)
            folder.rename(partial.with_suffix(".damaged"))
        with suppress(OSError):  # another process, just now
            partial.rename(folder)
        return read(folder)
    finally:
        for left in (partial, partial.with_suffix(".damaged")):
            shutil.rmtree(left, ignore_errors=True)
