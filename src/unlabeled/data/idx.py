"""The idx files of the MNIST family."""

import gzip
from pathlib import Path

import numpy as np

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def find_idx(root: Path) -> Path | None:
    """The folder that holds Fashion-MNIST's files, or None."""
    for folder in (root / "FashionMNIST/raw", root, DEBIAN):
        if all(_file(folder, name) for name in _NAMES):
            return folder
    return None


def read_idx(folder: Path, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,), uint8, of `side`: "train" or "t10k".

    Raises:
        ValueError: a file is missing or damaged.
    """
    return _array(folder, f"{side}-images-idx3-ubyte"), _array(folder, f"{side}-labels-idx1-ubyte")


_NAMES = [
    f"{side}-{kind}-ubyte" for side in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


def _file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _array(folder: Path, name: str) -> np.ndarray:
    path = _file(folder, name)
    if path is None:
        raise ValueError(f"{folder} has no {name} (or {name}.gz)")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = raw[3]  # magic: 0, 0, type (8: uint8), number of axes
        shape = np.frombuffer(raw, ">i4", axes, 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
