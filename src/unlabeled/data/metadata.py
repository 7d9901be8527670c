"""The rows of YFCC100M's official metadata, read as a stream: 100 million never lie in memory.

Thomee et al., 2016, https://arxiv.org/abs/1503.01817. Two forms are in use: tab-separated files
`yfcc100m_dataset` (plain or .bz2, in parts or whole; 23 columns, or 25 with line number and hash)
and the SQLite file `yfcc100m_dataset.sql` of the Multimedia Commons.
"""

import bz2
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from hashlib import md5
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_plus

SQLITE = b"SQLite format 3\0"
COLUMNS = "photoid, downloadurl, usertags, longitude, latitude, marker"
PLACES = {  # columns -> where id, hash, tags, longitude, latitude, URL and marker stand
    23: (0, None, 8, 10, 11, 14, 22),
    25: (1, 2, 10, 12, 13, 16, 24),
}


class Photo(NamedTuple):
    """One photograph."""

    id: int
    hash: bytes  # what its file is called
    tags: str  # its user's, joined by commas
    place: tuple[float, float] | None  # longitude and latitude, degrees


def photos(files: list[Path]) -> Iterator[Photo]:
    """The photographs of all files, in their order, without the videos.

    Raises:
        ValueError: a file is not such metadata; naming file and line.
    """
    for path in files:
        with open(path, "rb") as file:
            start = file.read(len(SQLITE))
        yield from _of_database(path) if start == SQLITE else _of_lines(path)


def file_name(url: str) -> bytes:
    """The hash that names a file: MD5 of its URL, whose bytes are written without leading zeros."""
    return "".join(
        f"{byte:x}" for byte in md5(url.encode(), usedforsecurity=False).digest()
    ).encode()


def _of_lines(path: Path) -> Iterator[Photo]:
    opener = bz2.open if path.suffix == ".bz2" else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row = line.rstrip(b"\r\n").split(b"\t")
            if (places := PLACES.get(len(row))) is None:
                raise ValueError(
                    f"{path}, line {number}: {len(row)} columns separated by tabs, not the 23 or "
                    "25 of yfcc100m_dataset"
                )
            i, name, tags, longitude, latitude, url, marker = places
            if row[marker] == b"0":
                try:
                    photo = int(row[i])
                    place = (
                        (float(row[longitude]), float(row[latitude])) if row[longitude] else None
                    )
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                hash = file_name(row[url].decode()) if name is None else row[name]
                if not hash.isalnum():  # it becomes part of a path
                    raise ValueError(f"{path}, line {number}: {hash.decode()!r} is no hash")
                yield Photo(photo, hash, row[tags].decode("utf-8", "replace"), place)


def _of_database(path: Path) -> Iterator[Photo]:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            for row in database.execute(f"SELECT {COLUMNS} FROM yfcc100m_dataset"):
                photo, url, tags, longitude, latitude, marker = row
                if int(marker) == 0:
                    there = longitude not in (None, "")
                    place = (float(longitude), float(latitude)) if there else None
                    yield Photo(int(photo), file_name(url), tags or "", place)
    except sqlite3.Error as error:
        raise ValueError(
            f"{path} is not the SQLite file of YFCC100M's metadata: {error}"
        ) from error


def words(tags: str) -> list[str]:
    """A user's tags, each once, without their URL encoding, in lower case."""
    found = (unquote_plus(tag).strip().lower() for tag in tags.split(","))
    return list(dict.fromkeys(tag for tag in found if tag))
