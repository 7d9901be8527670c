"""What is known of media files before they are decoded: kept, because reading them takes long."""

import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from unlabeled.data.ffmpeg import library, opened, pictured, reading, sounded
from unlabeled.data.files import cache_folder
from unlabeled.data.media import Facts
from unlabeled.data.rgb import UnreadableError
from unlabeled.data.store import cores

log = logging.getLogger(__name__)
FORMAT = "2"  # of the cache file
GUESSED = "avi"  # a container without the times of pictures: FFmpeg guesses them, at times wrongly
TRIED = 16  # pictures whose times are looked at there
SPARSE = "mpeg"  # one that has some: FFmpeg guesses others after a seek than from the start
SAVED_EVERY = 60.0  # seconds
ASKED, TOGETHER = 16, 256  # questions to the file system at once, each for so many files
NONE = np.zeros(0, dtype=np.int64)
Probe = Callable[[Path], Facts]


class Stamp(NamedTuple):
    """What tells a file from one that replaced it."""

    size: int
    changed: int


class Table(NamedTuple):
    """The facts of many files. Regular times are kept as a start and a step."""

    paths: np.ndarray  # (N,) bytes, relative to a root
    sizes: np.ndarray  # (N,) int64, bytes; -1: there is no such file
    changed: np.ndarray  # (N,) int64, ns: with another time or size it is another file
    numbers: np.ndarray  # (N, 8) int64: pictures, first, step, end, timed, sounding, ends of:
    bases: np.ndarray  # (N,) float64
    times: np.ndarray  # int64, of all files whose times are irregular,
    keys: np.ndarray  # int64, of all files
    reasons: np.ndarray  # (N,) bytes

    def __len__(self) -> int:
        return len(self.paths)

    def stamp(self, i: int) -> Stamp:
        """Of one file, when it was read."""
        return Stamp(int(self.sizes[i]), int(self.changed[i]))

    def facts(self, i: int) -> Facts:
        """Of one file."""
        count, first, step, end, timed, sounding, times, keys = self.numbers[i].tolist()
        before = self.numbers[i - 1, 6:].tolist() if i else (0, 0)
        irregular = self.times[before[0] : times]
        pts = irregular if len(irregular) else first + step * np.arange(count, dtype=np.int64)
        reason = self.reasons[i].decode("utf-8", "replace")
        base = float(self.bases[i])
        return Facts(
            pts, self.keys[before[1] : keys], end, base, bool(timed), bool(sounding), reason
        )


def indexed(root: Path, paths: Sequence[bytes], read: Probe | None = None) -> Table:
    """The facts of files, from the cache as far as it has them; others are read, as it has none.

    What is read is saved every minute: a start that is stopped goes on from there.

    Args:
        root: what paths are relative to.
        paths: of the files.
        read: what reads a file, of another index of the same root; None: `probe`.

    Raises:
        ValueError: PyAV is missing.
    """
    library()  # says here, not where files are unreadable, that it is missing
    kind = b"" if read is None else read.__name__.encode()
    name = hashlib.sha256(os.fsencode(root.resolve()) + kind).hexdigest()[:32]
    cache = cache_folder().parent / "media" / f"{name}.npz"
    kept = _load(cache)
    known = {} if kept is None else {path: i for i, path in enumerate(kept.paths.tolist())}
    rows: dict[bytes, tuple[Stamp, Facts]] = {}
    missing = []
    for path, stamp in zip(paths, _stamps(root, paths), strict=True):
        i = known.get(path)
        if kept is not None and i is not None and kept.stamp(i) == stamp:
            rows[path] = (stamp, kept.facts(i))
        else:
            missing.append((path, stamp))
    if missing:
        _read(root, missing, rows, cache, read or probe)
    return _table({path: rows[path] for path in paths})


def _stamps(root: Path, paths: Sequence[bytes]) -> Iterator[Stamp]:
    """Of all files, some looked up at once: a network's file system answers slowly."""

    def look(some: Sequence[bytes]) -> list[Stamp]:
        return [_stamp(os.path.join(os.fsencode(root), path)) for path in some]

    with ThreadPoolExecutor(ASKED) as pool:
        parts = (paths[i : i + TOGETHER] for i in range(0, len(paths), TOGETHER))
        for found in pool.map(look, parts):
            yield from found


def _stamp(path: bytes) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return Stamp(-1, 0)  # reading it says why
    return Stamp(status.st_size, status.st_mtime_ns)


def _read(
    root: Path,
    missing: Sequence[tuple[bytes, Stamp]],
    rows: dict[bytes, tuple[Stamp, Facts]],
    cache: Path,
    read: Probe,
) -> None:
    log.warning("reading %d media files for their index, once", len(missing))
    saved = time.monotonic()
    with ThreadPoolExecutor(cores()) as pool:
        found = pool.map(lambda one: read(root / os.fsdecode(one[0])), missing)
        show = {"description": "index", "transient": True, "disable": not sys.stderr.isatty()}
        for (path, stamp), facts in track(
            zip(missing, found, strict=True), total=len(missing), **show
        ):
            rows[path] = (stamp, facts)
            if time.monotonic() - saved > SAVED_EVERY:
                _save(cache, _table(rows))
                saved = time.monotonic()
    _save(cache, _table(rows))


def probe(path: Path) -> Facts:
    """What a file says of itself: all its packets are read, the first picture is decoded."""
    try:
        with reading():
            return _probed(path)
    except UnreadableError as error:
        return Facts(NONE, NONE, 0, 0.0, False, False, str(error))


def _probed(path: Path) -> Facts:
    with opened(path) as file:
        video = pictured(file)
        base, rate = float(video.time_base or 0), float(video.average_rate or 0)
        packets = [x for x in file.demux(video) if x.size]
        sounding = sounded(file) is not None
        container = file.format.name.split(",")
    with opened(path) as file:
        frames = islice(file.decode(pictured(file)), TRIED if GUESSED in container else 1)
        first = [frame.pts for frame in frames]
    if not first:
        raise UnreadableError("it has no pictures")
    times = [x.pts for x in packets]
    begun = [pts for pts in first if pts is not None]
    guessed = None in times or len(begun) < len(first) or begun != sorted(set(begun))
    if guessed or SPARSE in container:
        if rate <= 0:
            raise UnreadableError("its pictures have neither times nor a rate")
        counted = np.arange(len(packets), dtype=np.int64)
        return Facts(counted, counted[:1], len(packets), 1 / rate, False, sounding, "")
    pts = np.unique(np.array(times, dtype=np.int64))
    pts = pts[pts >= begun[0]]  # packets before the first picture give none
    keys = np.unique(np.array([x.pts for x in packets if x.is_keyframe], dtype=np.int64))
    last = max((x.duration or 0 for x in packets if x.pts == pts[-1]), default=0)
    step = int(pts[-1] - pts[-2]) if len(pts) > 1 else max(1, round(1 / (rate or 25) / base))
    return Facts(pts, keys, int(pts[-1]) + (last or step), base, True, sounding, "")


def _table(rows: dict[bytes, tuple[Stamp, Facts]]) -> Table:
    numbers = np.zeros((len(rows), 8), dtype=np.int64)
    times, keys = [NONE], [NONE]
    for i, (_, facts) in enumerate(rows.values()):
        steps = np.unique(np.diff(facts.pts))
        first = int(facts.pts[0]) if len(facts.pts) else 0
        step = int(steps[0]) if len(steps) == 1 else 0
        if len(steps) > 1:
            times.append(facts.pts)
        keys.append(facts.keys)
        known = (len(facts.pts), first, step, facts.end, facts.timed, facts.sounding)
        numbers[i] = (*known, len(facts.pts) * (len(steps) > 1), len(facts.keys))
    numbers[:, 6:] = numbers[:, 6:].cumsum(0)
    found = list(rows.values())
    return Table(
        np.array(list(rows), dtype=np.bytes_),
        np.array([stamp.size for stamp, _ in found], dtype=np.int64),
        np.array([stamp.changed for stamp, _ in found], dtype=np.int64),
        numbers,
        np.array([facts.base for _, facts in found], dtype=np.float64),
        np.concatenate(times),
        np.concatenate(keys),
        np.array([facts.reason.encode()[:500] for _, facts in found], dtype=np.bytes_),
    )


def _load(cache: Path) -> Table | None:
    try:
        with np.load(cache, allow_pickle=False) as saved:
            if str(saved["format"]) != FORMAT:
                return None
            found = Table(*(saved[name] for name in Table._fields))
    except Exception:  # zipfile and numpy raise nearly anything
        return None  # none yet, or damaged: it is made again
    return found if len(found.numbers) == len(found.paths) == len(found.reasons) else None


def _save(cache: Path, table: Table) -> None:
    with suppress(OSError):  # a read-only home costs time, not the run
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, format=np.array(FORMAT), **table._asdict())
        os.replace(file.name, cache)
