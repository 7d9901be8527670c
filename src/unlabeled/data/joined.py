"""Which rows of metadata the images of shards are, by what they are called.

Both sides are spread over files by 64 bits of their names and met file by file: in memory there
is one part of them at a time, whatever their number.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from unlabeled.data.archives import Archives
from unlabeled.data.columns import Columns
from unlabeled.data.selection import ranks

PARTS = 64  # 50 MB each of a hundred million photographs
BLOCK = 1 << 18  # rows written together
WIDTH = 32  # bytes of the longest name: a hash
PAIR = np.dtype([("key", "<u8"), ("row", "<i8")])


def join(archives: Archives, ids: np.ndarray, hashes: np.ndarray, folder: Path) -> None:
    """Writes at.npy, positions of images in the shards, ascending, and rows.npy, their rows.

    A member belongs to the photograph whose id or hash its name is, up to the first dot.

    Raises:
        ValueError: a shard cannot be read, or no name fits.
    """
    found = np.memmap(folder / "found", np.int64, "w+", shape=(len(archives),))
    found[:] = -1
    _spread(_of_members(archives), folder, "members")
    _spread(_of_metadata(ids, hashes), folder, "metadata")
    for part in range(PARTS):
        ours, theirs = (_part(folder, side, part) for side in ("members", "metadata"))
        if len(ours) and len(theirs):
            theirs = theirs[np.argsort(theirs["key"], kind="stable")]
            near = np.searchsorted(theirs["key"], ours["key"]).clip(max=len(theirs) - 1)
            same = theirs["key"][near] == ours["key"]
            found[ours["row"][same]] = theirs["row"][near[same]]
    with Columns(folder, {"at": np.int64, "rows": np.int64}) as columns:
        for start in range(0, len(found), BLOCK):
            rows = np.asarray(found[start : start + BLOCK])
            some = np.flatnonzero(rows >= 0)
            columns.add(at=start + some, rows=rows[some])
    (folder / "found").unlink()
    if not columns.count:
        raise ValueError(
            f"none of the {len(archives)} images of the shards, first {archives.name(0)}, is "
            "called by the id or the hash of a photograph in the metadata, as in 4812.jpg: write "
            "shards with such names, or leave out data.layout.target and have "
            "data.layout.metadata=null"
        )


def _of_members(archives: Archives) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    start = 0
    for shard in range(len(archives.counts)):
        stems = [x.rpartition(b"/")[2].partition(b".")[0] for x in archives.names(shard).tolist()]
        names = [x.lower() if len(x) <= WIDTH else b"" for x in stems]
        yield _keys(np.array(names, f"S{WIDTH}")), start + np.arange(len(names))
        start += len(names)


def _of_metadata(ids: np.ndarray, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(ids), BLOCK):
        rows = start + np.arange(len(ids[start : start + BLOCK]))
        for names in (ids, hashes):
            yield _keys(names[start : start + BLOCK].astype(f"S{WIDTH}")), rows


def _keys(names: np.ndarray) -> np.ndarray:
    """(N,) uint64 of names (N,) of 32 bytes; two of 1e8 agree in one of some thousand sets."""
    key = np.zeros(len(names), np.uint64)
    for word in np.ascontiguousarray(names).view("<u8").reshape(len(names), -1).T:
        key = ranks(key ^ word, 0)
    return key


def _spread(blocks: Iterator[tuple[np.ndarray, np.ndarray]], folder: Path, side: str) -> None:
    with ExitStack() as stack:
        files = [
            stack.enter_context(open(folder / f"{side}-{part}", "wb")) for part in range(PARTS)
        ]
        for keys, rows in blocks:
            pairs = np.empty(len(keys), PAIR)
            pairs["key"], pairs["row"] = keys, rows
            part = keys % np.uint64(PARTS)
            pairs = pairs[np.argsort(part, kind="stable")]
            ends = np.bincount(part.astype(np.int64), minlength=PARTS).cumsum()
            for file, some in zip(files, np.split(pairs, ends[:-1]), strict=True):
                some.tofile(file)


def _part(folder: Path, side: str, part: int) -> np.ndarray:
    file = folder / f"{side}-{part}"
    pairs = np.fromfile(file, PAIR)
    file.unlink()
    return pairs
