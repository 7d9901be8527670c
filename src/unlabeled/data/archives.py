"""Many archives as one sequence of images, each read where it lies."""

import io
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from unlabeled.data import tar
from unlabeled.data.copies import Copies
from unlabeled.data.files import cache_folder
from unlabeled.data.remote import PIPE, Source, filesystem
from unlabeled.data.rgb import UnreadableError

log = logging.getLogger(__name__)
MOST_BYTES = 1 << 28  # of one image's file: more is an attack or a mistake
OPEN = 128  # archives that a process has open at a time
WHY = {tar.DAMAGED: "damaged archive", tar.OUTSIDE: "its path leads outside of the archive"}


class ShardError(UnreadableError):
    """An archive that cannot be opened: `hop` images, all that it should have."""


class Archives:
    """Shards in their order; image i is the i-th of all.

    An archive on the disk is indexed first, and the index kept. Of a remote one, the number of
    its images comes from the index or the `_stats.json` beside it (img2dataset writes one);
    without these it is copied.

    Args:
        sources: the shards.
        copies: where remote ones are kept.

    Raises:
        ValueError: a shard is compressed or, where it must be read first, cannot be read.
    """

    def __init__(self, sources: Sequence[Source], copies: Copies) -> None:
        self.sources, self.copies = list(sources), copies
        self._start()
        with ThreadPoolExecutor(32) as pool:
            counts, self._labels = zip(*pool.map(self._summary, range(len(sources))), strict=True)
        self.counts = np.array(counts, np.int64)
        self.ends = self.counts.cumsum()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._files: OrderedDict[int, tuple[int, tar.Index]] = OrderedDict()
        self._failed: dict[int, str] = {}

    def name(self, i: int) -> str:
        """What to call an image in a message: shard and member."""
        shard, row = self.place(i)
        try:
            index = self._opened(shard)[1]
            member = os.fsdecode(index.names[row]) if row < len(index.names) else f"image {row}"
        except UnreadableError:
            member = f"image {row}"
        return f"{self.sources[shard].name}: {member}"

    def place(self, i: int) -> tuple[int, int]:
        """The shard of an image, and its number there."""
        shard = int(np.searchsorted(self.ends, i, "right"))
        return shard, i - int(self.ends[shard] - self.counts[shard])

    def read(self, i: int) -> io.BytesIO:
        """The bytes of an image's file.

        Raises:
            UnreadableError: they cannot be read, or there are too many.
        """
        shard, row = self.place(i)
        with self._lock:  # so that nobody closes the file meanwhile
            file, index = self._opened(shard)
            if row >= len(index.sizes):
                raise UnreadableError(f"the archive has only {len(index.sizes)} images")
            size = int(index.sizes[row])
            if size < 0:
                raise UnreadableError(WHY[size])
            if size > MOST_BYTES:
                raise UnreadableError(f"a file of {size} bytes")
            data = os.pread(file, size, int(index.offsets[row]))
        if len(data) < size:
            raise UnreadableError(f"the archive ends after {len(data)} of {size} bytes")
        return io.BytesIO(data)

    def labels(self) -> np.ndarray | None:
        """(N,) int64 of every image's `.cls`, or None where one has none."""
        if any(part is None for part in self._labels):
            return None
        return np.concatenate([np.zeros(0, np.int64), *self._labels])  # type: ignore[list-item]

    def names(self, shard: int) -> np.ndarray:
        """(M,) bytes, what a shard's images are called; empty where one is missing.

        Raises:
            ValueError: it cannot be read.
        """
        source, index = self.sources[shard], None
        if source.remote and not source.place.startswith(PIPE):
            index = _beside(source, ".index.npz", tar.load)
        names = (self._whole_index(shard) if index is None else index).names
        names = names[: self.counts[shard]]
        return np.pad(names, (0, int(self.counts[shard]) - len(names)), constant_values=b"")

    def _opened(self, shard: int) -> tuple[int, tar.Index]:
        if shard in self._failed:
            raise self._error(shard)
        if shard not in self._files:
            try:
                self._files[shard] = self._open(shard)
            except (OSError, ValueError) as error:
                self._failed[shard] = f"{type(error).__name__}: {error}"
                raise self._error(shard) from error
            if len(self._files) > OPEN:
                os.close(self._files.popitem(last=False)[1][0])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _error(self, shard: int) -> ShardError:
        return ShardError(self._failed[shard], hop=int(self.counts[shard]))

    def _open(self, shard: int) -> tuple[int, tar.Index]:
        source = self.sources[shard]
        if not source.remote:
            file = os.open(source.place, os.O_RDONLY)
            return file, self._index(shard, Path(source.place))
        file = self.copies.open(source)
        return file, self._index(shard, self.copies.path(source.place), os.fstat(file).st_size)

    def _summary(self, shard: int) -> tuple[int, np.ndarray | None]:
        """How many images a shard has, and their labels.

        Never depends on what was copied before: a run that goes on must meet the same images.
        """
        source = self.sources[shard]
        index = None
        if source.remote and not source.place.startswith(PIPE):
            index = _beside(source, ".index.npz", tar.load)
            said = None if index is not None else _beside(source, "_stats.json", _successes)
            if said is not None:
                return said, None
        elif source.remote:
            index = tar.load(self._kept(shard))
        if index is None:
            index = self._whole_index(shard)
        if not len(index.names):
            raise ValueError(f"no images in the shard {source.place}")
        known = index.labels[index.sizes != tar.DAMAGED]
        whole = len(known) and (known >= 0).all()  # what is damaged is never learned from
        return len(index.names), index.labels.clip(min=0) if whole else None

    def _whole_index(self, shard: int) -> tar.Index:
        """A shard's index, of a copy where it is remote."""
        try:
            file, index = self._open(shard)
        except OSError as error:
            place = self.sources[shard].place
            raise ValueError(f"cannot read the shard {place}: {error}") from error
        os.close(file)
        return index

    def _index(self, shard: int, path: Path, size: int | None = None) -> tar.Index:
        """The index beside the archive, else the kept one, else a new one."""
        kept, changed = self._kept(shard), 0
        if size is None:  # an archive of the user's, who may change it
            status = path.stat()
            size, changed = status.st_size, status.st_mtime_ns
            beside = tar.load(path.with_suffix(".index.npz"))
            if beside is not None and int(beside.bytes) == size:
                return beside
        found = tar.load(kept)
        if found is not None and int(found.bytes) == size and changed in (0, int(found.changed)):
            return found
        found = tar.scan(path)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            tar.save(kept, found)
        except OSError:
            log.debug("no index kept in %s", kept.parent)  # a read-only home costs time alone
        return found

    def _kept(self, shard: int) -> Path:
        source = self.sources[shard]
        place = source.place if source.remote else os.path.abspath(source.place)
        return cache_folder() / f"{blake2b(place.encode(), digest_size=16).hexdigest()}.tar.npz"


def _beside(source: Source, suffix: str, read: Callable[[Any], Any]) -> Any:
    """What a file beside a remote shard says, or None where there is none."""
    system, path = filesystem(source.place)
    try:
        with system.open(path.removesuffix(".tar") + suffix, "rb") as file:
            return read(io.BytesIO(file.read()))
    except Exception:  # not there, not allowed, not readable: there are other ways
        return None


def _successes(file: io.BytesIO) -> int | None:
    found = json.load(file)
    count = found.get("successes") if isinstance(found, dict) else None
    return count if isinstance(count, int) and count > 0 else None
