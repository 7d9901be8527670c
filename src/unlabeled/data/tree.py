"""A folder tree of images or recordings, read as splits and classes."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from unlabeled.data.files import IMAGES, Kind, Listing, index
from unlabeled.data.splits import Files

log = logging.getLogger(__name__)

TRAIN = ("train", "training")
TEST = ("test", "val", "valid", "validation")


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
    tops = [path.partition(b"/")[0] if b"/" in path else b"" for path in found.paths.tolist()]
    sides = {top: _side(top) for top in set(tops)}
    owner = np.array([sides[top] for top in tops])
    inside = "train" in sides.values()
    train = np.flatnonzero(owner == ("train" if inside else ""))
    if not len(train):
        raise ValueError(f"{root} has test folders only: add a folder named train")
    if inside and len(beside := np.flatnonzero(owner == "")):
        log.warning(
            "%d images of %s lie beside its folders of splits and are not read (such as %s)",
            *(len(beside), root, os.fsdecode(bytes(found.paths[beside[0]]))),
        )
    parts = {"train": (train, _class_names(found, train, inside))}
    others = [np.flatnonzero(owner == name) for name in tests if name in sides.values()]
    named = [(rows, _class_names(found, rows, True)) for rows in others]
    if named:
        alike = [part for part in named if (part[1] is None) == (parts["train"][1] is None)]
        parts["test"] = (alike or named)[0]
    classes = sorted({name for _, names in parts.values() for name in names or ()})
    return {side: _split(root, found, *part, classes) for side, part in parts.items()}


def _side(top: bytes) -> str:
    name = top.decode("utf-8", "replace").lower()
    return "train" if name in TRAIN else name if name in TEST else ""


def _class_names(found: Listing, rows: np.ndarray, inside: bool) -> list[str] | None:
    """The first folder of every path (inside its split's), or None where that is no class."""
    names: dict[bytes, str] = {}  # one string for all images of a class, not one for each
    found_names = []
    for path in found.paths[rows].tolist():
        parts = path.split(b"/", 1 + inside)
        if len(parts) < 2 + inside:
            return None
        name = parts[inside]
        if name not in names:
            names[name] = name.decode("utf-8", "backslashreplace")
        found_names.append(names[name])
    return found_names if len(names) >= 2 else None


def _split(
    root: Path, found: Listing, rows: np.ndarray, names: list[str] | None, classes: list[str]
) -> Files:
    paths, sizes = found.paths[rows], found.sizes[rows]
    if names is None:
        return Files(root, paths, sizes, None, ())
    return Files(
        root, paths, sizes, torch.from_numpy(np.searchsorted(classes, names)), tuple(classes)
    )
