"""The image files, or others, under a folder: kept in a cache, as walking millions takes long."""

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unlabeled.data.sorted_names import SortedNames

EXTENSIONS = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"]
)
FORMAT = "1"  # of the cache file
SETTLED = 1.0  # seconds: a folder changed that recently may change again within its time stamp


class Kind(NamedTuple):
    """Which files a data set is made of."""

    plural: str  # for messages
    extensions: frozenset[str]


IMAGES = Kind("images", EXTENSIONS)


class Listing(NamedTuple):
    """Files under a root in the order of their paths, and the folders they were found in."""

    paths: np.ndarray  # (N,) bytes, relative, separated by "/": 40 bytes a file, not 100
    sizes: np.ndarray  # (N,) int64, bytes
    folders: np.ndarray  # (D,) bytes, relative, "." first
    changed: np.ndarray  # (D,) int64, modification time in ns


def index(root: Path, kind: Kind = IMAGES) -> Listing:
    """The files of a kind under `root`, from the cache if no folder changed since.

    Links are followed, hidden files and folders ignored. A file overwritten in place with
    another size goes unnoticed, since its folder does not change.

    Raises:
        ValueError: `root` is not a folder.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}: point data.root at the folder with the {kind.plural}")
    said = os.fsencode(root.resolve()) + (b"" if kind is IMAGES else kind.plural.encode())
    cache = cache_folder() / f"{hashlib.sha256(said).hexdigest()[:32]}.npz"
    found = _load(cache)
    if found is not None and _unchanged(root, found):
        return found
    now = time.time()
    with suppress(OSError):  # runs that are sorted wait there, or else in memory
        cache.parent.mkdir(parents=True, exist_ok=True)
    found = walk(root, kind)
    if now - found.changed.max() / 1e9 > SETTLED:
        _save(cache, found)
    return found


def cache_folder() -> Path:
    """Where indices are kept: below `UNLABELED_CACHE`, by default `~/.cache/unlabeled`."""
    home = os.environ.get("UNLABELED_CACHE") or Path.home() / ".cache/unlabeled"
    return Path(home) / "index"


def walk(root: Path, kind: Kind = IMAGES) -> Listing:
    """The files of a kind under `root`, read from the disk.

    Beside the listing itself, memory grows with the number of folders, not of files.
    """
    with SortedNames(cache_folder()) as files:
        folders = _collect(root, kind, files)
        names, sizes = files.table()
    return Listing(
        names,
        sizes,
        np.array([name for name, _ in folders], dtype=np.bytes_),
        np.array([changed for _, changed in folders], dtype=np.int64),
    )


def _collect(root: Path, kind: Kind, files: SortedNames) -> list[tuple[bytes, int]]:
    """Adds all files with their sizes; gives the folders and when they changed."""
    folders: list[tuple[bytes, int]] = []
    seen: set[tuple[int, int]] = set()  # a link may lead back up
    todo = [b""]
    while todo:
        folder = todo.pop()
        path = os.path.join(os.fsencode(root), folder)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.append((folder or b".", status.st_mtime_ns))
        with os.scandir(path) as entries:
            for entry in entries:
                name = folder + b"/" + entry.name if folder else entry.name
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    todo.append(name)
                elif is_of(entry.name, kind) and entry.is_file():
                    files.add(name, entry.stat().st_size)
    return sorted(folders)


def is_of(name: bytes, kind: Kind) -> bool:
    """Whether a file name ends as one of that kind does, in upper or lower case."""
    return os.path.splitext(name)[1].lower().decode("ascii", "replace") in kind.extensions


def _unchanged(root: Path, listing: Listing) -> bool:
    try:
        return all(
            os.stat(os.path.join(os.fsencode(root), folder)).st_mtime_ns == changed
            for folder, changed in zip(listing.folders, listing.changed, strict=True)
        )
    except OSError:
        return False


def _load(cache: Path) -> Listing | None:
    try:
        with np.load(cache, allow_pickle=False) as saved:
            if str(saved["format"]) != FORMAT:
                return None
            found = Listing(*(saved[name] for name in Listing._fields))
    except Exception:  # zipfile and numpy raise nearly anything
        return None  # none yet, or damaged: it is made again
    return found if len(found.paths) == len(found.sizes) and len(found.changed) else None


def _save(cache: Path, listing: Listing) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, format=np.array(FORMAT), **listing._asdict())
                os.replace(file.name, cache)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:
        return  # a read-only home, or a full one, costs time, not the run
