"""A folder tree of images or recordings, read as splits and classes."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from unlabeled.data.files import IMAGES, Kind, Listing, index
from unlabeled.data.splits import Files

log = logging.getLogger(__name__)

TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation")
SIDES = ("", "train", *TEST)  # where a file may lie
FEW = 4096


def read_tree(root: Path, tests: Sequence[str] = TEST, kind: Kind = IMAGES) -> dict[str, Files]:
    """The training images under `root`, and those to test on if a folder is named so.

    Args:
        root: the folder.
        tests: names of folders of test images, best first. Where the training images have
            classes, the first folder that has them too is taken.
        kind: which files are meant.

    Images that lie beside such folders are counted in a warning and left out.

    Raises:
        ValueError: no folder, no images, or no training images.
    """
    found = index(root, kind)
    if not len(found.paths):
        looked = " ".join(sorted(kind.extensions))
        raise ValueError(f"no {kind.plural} under {root} (looked for {looked})")
    owner = _sides(found)
    sides = {SIDES[i] for i in np.unique(owner)}
    inside = "train" in sides
    train = np.flatnonzero(owner == SIDES.index("train" if inside else ""))
    if not len(train):
        raise ValueError(f"{root} has test folders only: add a folder named train")
    if inside and len(beside := np.flatnonzero(owner == SIDES.index(""))):
        log.warning(
            "%d images of %s lie beside its folders of splits and are not read (such as %s)",
            *(len(beside), root, os.fsdecode(bytes(found.paths[beside[0]]))),
        )
    parts = {"train": (train, _classes(found, train, inside))}
    others = [np.flatnonzero(owner == SIDES.index(name)) for name in tests if name in sides]
    named = [(rows, _classes(found, rows, True)) for rows in others]
    if named:
        alike = [part for part in named if (part[1] is None) == (parts["train"][1] is None)]
        parts["test"] = (alike or named)[0]
    classes = sorted({name for _, met in parts.values() if met is not None for name in met.names})
    return {side: _split(root, found, *part, classes) for side, part in parts.items()}


def _side(top: bytes) -> str:
    name = top.decode("utf-8", "replace").lower()
    return "train" if name in TRAIN else name if name in TEST else ""


class _Met(NamedTuple):
    """Classes in the order in which they were met."""

    rows: np.ndarray  # (n,) int32 into names, of each file
    names: list[str]


def _sides(found: Listing) -> np.ndarray:
    """(N,) int8 into SIDES, by the first folder of every path."""
    sides = np.zeros(len(found.paths), np.int8)
    known: dict[bytes, int] = {}
    for i, path in enumerate(_each(found.paths)):
        top, slash, _ = path.partition(b"/")
        if slash and top not in known:
            known[top] = SIDES.index(_side(top))
        sides[i] = known[top] if slash else 0
    return sides


def _classes(found: Listing, rows: np.ndarray, inside: bool) -> _Met | None:
    """The first folder of every path (inside its split's), or None where that is no class."""
    met: dict[bytes, int] = {}
    classes = np.empty(len(rows), np.int32)
    for i, path in enumerate(_each(found.paths, rows)):
        parts = path.split(b"/", 1 + inside)
        if len(parts) < 2 + inside:
            return None
        classes[i] = met.setdefault(parts[inside], len(met))
    names = [name.decode("utf-8", "backslashreplace") for name in met]
    return _Met(classes, names) if len(met) >= 2 else None


def _each(paths: np.ndarray, rows: np.ndarray | None = None) -> Iterator[bytes]:
    """Some paths, or all, of which Python holds a few at a time."""
    for i in range(0, len(paths) if rows is None else len(rows), FEW):
        some = slice(i, i + FEW) if rows is None else rows[i : i + FEW]
        yield from paths[some].tolist()


def _split(
    root: Path, found: Listing, rows: np.ndarray, met: _Met | None, classes: list[str]
) -> Files:
    paths, sizes = found.paths[rows], found.sizes[rows]
    if met is None:
        return Files(root, paths, sizes, None, ())
    labels = np.searchsorted(classes, met.names)[met.rows]
    return Files(root, paths, sizes, torch.from_numpy(labels), tuple(classes))
