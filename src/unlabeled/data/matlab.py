"""Files of Matlab, and pickles that may hold arrays and nothing that runs."""

import gzip
import pickle
from pathlib import Path
from typing import Any

ARRAYS = {  # what a pickle of arrays, text and numbers is made of
    *(("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")),
    *(
        (f"numpy.{core}.multiarray", f)
        for core in ("core", "_core")
        for f in ("_reconstruct", "scalar")
    ),
}


def opened(path: Path) -> Any:
    """A file of Matlab 7.3, open to read. Raises ValueError if it is none, or h5py is missing."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"reading {path} needs h5py: pip install 'unlabeled[matlab]'") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is no Matlab 7.3 file, or only a part of one: {error}") from error


def member(file: Any, name: str, path: Path) -> Any:
    """One array of an open file. Raises ValueError if it is not there."""
    if name not in file:
        raise ValueError(f"{path} holds no {name!r}, only {sorted(file)[:20]}")
    return file[name]


def loaded(path: Path) -> dict[str, Any]:
    """What an older Matlab file holds: structures as dictionaries. Raises ValueError."""
    from scipy.io import loadmat  # slow to import

    try:
        return loadmat(path, simplify_cells=True)
    except Exception as error:  # it raises all kinds for a damaged file
        raise ValueError(f"{path} is no Matlab file that scipy reads: {error}") from error


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and arrays need no such thing")
        return super().find_class(module, name)


def unpickled(path: Path) -> Any:
    """What a gzipped pickle holds, if that is arrays, text, numbers, lists and dictionaries.

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    try:
        with gzip.open(path, "rb") as file:
            return _Arrays(file, encoding="latin1").load()
    except (OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no gzipped pickle of arrays: {error}") from error
