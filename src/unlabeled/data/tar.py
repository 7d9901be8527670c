"""Where the images of a tar archive lie, in WebDataset's format, also of a damaged archive.

Members that follow one another and whose names agree up to the first dot of the last part of
their path are one sample (`000012.jpg`, `000012.json`, `000012.cls`). Nothing is ever extracted.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from unlabeled.data.files import EXTENSIONS

BLOCK = tarfile.BLOCKSIZE
LOOK = 1 << 20  # bytes read at a time to find the next header
FORMAT = "1"  # of index files
DIGITS = 18  # of a class's number: more are too many for 64 bits
DAMAGED, OUTSIDE = -1, -2  # instead of a size: a header that is none, a path that leads outside


class Index(NamedTuple):
    """The images of an archive in their order; what is damaged has a row too."""

    names: np.ndarray  # (N,) bytes
    offsets: np.ndarray  # (N,) int64, of their bytes in the archive
    sizes: np.ndarray  # (N,) int64, bytes; negative: DAMAGED, OUTSIDE
    labels: np.ndarray  # (N,) int64 from the sample's `.cls`, or -1
    bytes: np.ndarray  # () int64, size of the archive
    changed: np.ndarray  # () int64, its modification time in ns; 0 where it does not matter


def scan(path: Path) -> Index:
    """The images of an archive, read from its headers.

    Raises:
        ValueError: it is compressed, which allows no access to single members.
        OSError: it cannot be read.
    """
    rows: list[tuple[bytes, int, int, int]] = []
    key, image, label = None, None, -1
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if file.read(6)[:2] in (b"\x1f\x8b", b"BZ") or _starts(
            file, b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"
        ):
            raise ValueError(
                f"{path} is compressed: images are compressed already, and single members of such "
                "an archive cannot be read; unpack it to a plain .tar"
            )
        if not status.st_size:
            rows.append((b"(an empty file)", 0, DAMAGED, -1))
        for name, offset, size in _members(file, status.st_size):
            if size == DAMAGED:
                rows.append((name, offset, size, -1))
                continue
            stem, _, extension = _split(name)
            if stem != key:
                if image is not None:
                    rows.append((*image, label))
                key, image, label = stem, None, -1
            if extension == b"cls" and 0 < size <= 20:
                label = _number(file, offset, size)
            elif image is None and f".{extension.decode('ascii', 'replace')}" in EXTENSIONS:
                image = (name, offset, OUTSIDE if _leads_outside(name) else size)
        if image is not None:
            rows.append((*image, label))
    names, *numbers = zip(*rows, strict=True) if rows else ([], [], [], [])
    offsets, sizes, labels = (np.array(x, dtype=np.int64) for x in numbers)
    known = np.array(status.st_size), np.array(status.st_mtime_ns)
    return Index(np.array(names, dtype=np.bytes_), offsets, sizes, labels, *known)


def save(path: Path, index: Index) -> None:
    """Writes an index beside others, at once or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.savez(file, format=np.array(FORMAT), **index._asdict())
    os.replace(partial, path)


def load(file: Path | BinaryIO) -> Index | None:
    """An index, or None if there is none or it is damaged: it can be made again."""
    try:
        with np.load(file, allow_pickle=False) as saved:
            if str(saved["format"]) != FORMAT:
                return None
            found = Index(*(saved[name] for name in Index._fields))
    except Exception:  # on damaged files zipfile and numpy raise nearly anything
        return None
    return found if len({len(x) for x in found[:4]}) == 1 else None


def _members(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of regular files, and (what, offset, DAMAGED) of broken headers."""
    start, last = 0, b"the beginning"
    while start < end:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    start, last = tar.offset, os.fsencode(member.name)
                    tar.members = []  # type: ignore[attr-defined]  # they would all be kept
                    if member.isreg() and not member.issparse():
                        yield last, member.offset_data, member.size
        except (tarfile.TarError, ValueError, OverflowError):
            pass
        file.seek(start)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            yield b"(whatever came after " + last + b": cut off)", start, DAMAGED
            return
        if not any(block):  # zeros end an archive; tarfile stops at anything else too
            return
        yield b"(a damaged header after " + last + b")", start, DAMAGED
        start = _next_header(file, start + BLOCK)


def _next_header(file: BinaryIO, start: int) -> int:
    """The first place from `start` on where a valid header of an archive stands, or the end."""
    while True:
        file.seek(start)
        data = file.read(LOOK)
        for at in range(0, len(data) - BLOCK + 1, BLOCK):
            block = data[at : at + BLOCK]
            if block[257:262] != b"ustar":
                continue
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                continue
            return start + at
        start += LOOK
        if len(data) < LOOK:
            return start


def _split(name: bytes) -> tuple[bytes, bytes, bytes]:
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    return folder + slash + stem, dot, extension.lower()


def _leads_outside(name: bytes) -> bool:
    return name.startswith((b"/", b"\\")) or b".." in name.replace(b"\\", b"/").split(b"/")


def _number(file: BinaryIO, offset: int, size: int) -> int:
    text = os.pread(file.fileno(), size, offset).strip()
    return int(text) if text.isdigit() and len(text) <= DIGITS else -1


def _starts(file: BinaryIO, *magic: bytes) -> bool:
    return os.pread(file.fileno(), 8, 0).startswith(magic)
