"""Copies of remote shards: once per machine, since several processes read images in any order."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from unlabeled.data.files import cache_folder
from unlabeled.data.remote import Source, fetch


class Copies:
    """Copies of remote shards on this machine's disk, made when they are first opened.

    Args:
        folder: where; None: `UNLABELED_CACHE`, by default `~/.cache/unlabeled`.
        most: bytes to keep; the longest unused are deleted. None: all.
    """

    def __init__(self, folder: str | None, most: int | None) -> None:
        self.folder = Path(folder).expanduser() if folder else cache_folder().parent / "shards"
        self.most = most

    def path(self, place: str) -> Path:
        """Where a shard's copy is or will be."""
        return self.folder / f"{blake2b(place.encode(), digest_size=16).hexdigest()}.tar"

    def open(self, source: Source) -> int:
        """A file descriptor of a shard's copy, fetched first if it is not there or was cut.

        Raises:
            OSError: it cannot be fetched.
        """
        path = self.path(source.place)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(path, wait=True):
            if not _whole(path, source.size):
                self._make_room(source.size, path)
                fetch(source.place, path)
                _noted(path).write_text(str(path.stat().st_size))
            os.utime(path)
            return os.open(path, os.O_RDONLY)

    def _make_room(self, size: int, keep: Path) -> None:
        if self.most is None:
            return
        kept = sorted((p.stat().st_mtime_ns, p.stat().st_size, p) for p in self._files())
        used = sum(bytes for _, bytes, _ in kept) + size
        for _, bytes, path in kept:
            if used <= self.most:
                return
            if path != keep:
                with _locked(path, wait=False) as mine:
                    if mine:  # whoever has it open reads on; the space is free when all closed
                        path.unlink(missing_ok=True)
                        _noted(path).unlink(missing_ok=True)
                        used -= bytes

    def _files(self) -> list[Path]:
        return list(self.folder.glob("*.tar"))


def _noted(path: Path) -> Path:
    """Where the size of a shard's copy is written down, since a pipe tells none."""
    return path.with_suffix(".bytes")


def _whole(path: Path, size: int) -> bool:
    """Whether a copy is there with the size that its source has now (0: unknown) and it had."""
    try:
        there = path.stat().st_size
        return size in (0, there) and _noted(path).read_text() == str(there)
    except (OSError, UnicodeDecodeError):
        return False


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a shard's lock among the processes of this machine; whether it is held."""
    with open(path.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
