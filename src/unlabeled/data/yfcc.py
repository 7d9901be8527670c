"""YFCC100M: a hundred million photographs of Flickr, whole or a subset fixed by a seed."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.joined import join
from unlabeled.data.metadata import photos
from unlabeled.data.order import BufferedOrder
from unlabeled.data.rgb import pixels, stored
from unlabeled.data.selection import Selection, ranks
from unlabeled.data.shards import Archived, Shards
from unlabeled.data.splits import Split, digest
from unlabeled.data.yfcc_table import Table, kept
from unlabeled.truth import Annotation

log = logging.getLogger(__name__)
BLOCK = 50_000  # photographs that the order of an epoch moves together: a shard's worth
FORMAT = "2"  # of what is kept
WHERE = "https://multimediacommons.wordpress.com/yfcc100m-core-dataset"


@dataclass(frozen=True)
class Photos:
    """Photographs in a tree of files named after their hash.

    Args:
        root: the folder that `images` starts from.
        images: a path with {hash}, {id}, and {a} and {b}, the first three and the next three
            characters of the hash.
        ids: (N,) int64 of Flickr.
        hashes: (N,) bytes.
        labels: (N,) int64 into `classes`, or None.
        classes: names of the classes; empty without labels.
        annotations: by kind; `tags` (M,) int64 into `classes`, all of a photograph's.
        names: none.
    """

    root: Path
    images: str
    ids: np.ndarray
    hashes: np.ndarray
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    annotations: Mapping[str, Annotation] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, i: int) -> str:
        """What to call an image in a message."""
        name = os.fsdecode(self.hashes[i])
        return self.images.format(hash=name, id=int(self.ids[i]), a=name[:3], b=name[3:6])

    def image(self, i: int) -> Tensor:
        """An image, RGB (3, h, w) uint8. Raises `UnreadableError`."""
        return pixels(self.root / self.name(i))

    def encoded(self, i: int) -> bytes:
        """The bytes of an image's file. Raises `UnreadableError`."""
        return stored(self.root / self.name(i))

    def take(self, positions: Tensor) -> "Photos":
        """Some of the images, in the order of `positions`."""
        at = positions.numpy()
        labels = None if self.labels is None else self.labels[positions]
        known = {kind: x.take(positions) for kind, x in self.annotations.items()}
        kept = {"ids": self.ids[at], "hashes": self.hashes[at]}
        return replace(self, **kept, labels=labels, annotations=known)

    def identity(self) -> str:
        """A hash of which images these are, in their order, with their labels."""
        return digest([np.ascontiguousarray(self.ids).data], self.labels, self.classes)

    def order(self, batch_size: int, *key: int | str) -> BufferedOrder:
        """An epoch's order, without a list of all images."""
        whole, rest = divmod(len(self), BLOCK)
        counts = np.array([BLOCK] * whole + [rest] * (rest > 0))
        return BufferedOrder(counts, batch_size, 20 * BLOCK, 1, *key)


class YFCC:
    """YFCC100M's metadata with its images, in a tree or in shards.

    A subset has the photographs whose ids have the smallest hashes under `subset_seed`: the same
    ones whatever the order or form of the metadata. What is found is kept in the cache.

    Args:
        metadata: pattern of the metadata files below the root: see `unlabeled.data.metadata`.
            None: there is none, and the images are in shards.
        images: path of an image below the root: see `Photos`.
        shards: shards of the images instead (see `Shards`). Where metadata is there, a subset and
            labels come from it, of the members that are called by a photograph's id or hash
            (4812.jpg); where none is, a subset is one of the places in the shards.
        count: photographs of the subset; None: all.
        subset_seed: fixes the subset; no function of the run's seed.
        target: labels for `supervised`. "tags": of the `classes` tags that most photographs of
            the subset have, one that the photograph has, drawn once (Joulin et al., 2016,
            https://arxiv.org/abs/1511.02251), and all of them as annotation `tags`; "geo": the
            cell of `cell` degrees that it was taken in, of the `classes` that have most, which
            is its one tag too. Photographs without are left out. Of all photographs
            (`count=None`) that takes two passes over the metadata, once.
        classes: at most so many.
        cell: side of a cell in degrees of latitude; cells are as wide as that on the equator.
        buffer: see `Shards`.
    """

    def __init__(
        self,
        *,
        metadata: str | None = "yfcc100m_dataset*",
        images: str = "data/images/{a}/{b}/{hash}.jpg",
        shards: str | Sequence[str] | None = None,
        count: int | None = 1_000_000,
        subset_seed: int = 0,
        target: Literal["tags", "geo"] | None = None,
        classes: int = 1000,
        cell: float = 1.0,
        buffer: int = 100_000,
    ) -> None:
        if metadata is None and (target is not None or shards is None):
            raise ValueError(
                "data.layout.metadata may be null for shards without data.layout.target alone: "
                "name the files of the metadata, e.g. yfcc100m_dataset*"
            )
        try:
            images.format(hash="", id=0, a="", b="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"data.layout.images may have {{hash}}, {{id}}, {{a}} and {{b}}, got {images!r}"
            ) from error
        self.selection = Selection(count, subset_seed, target, classes, cell)
        self.metadata, self.images = metadata, images
        self.shards = None if shards is None else Shards(train=shards, labels=False, buffer=buffer)

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        files = [] if self.metadata is None else sorted(root.glob(self.metadata))
        files = [path for path in files if path.is_file()]
        unread = self.selection.whole or (not files and self.selection.target is None)
        if self.shards is not None and unread:
            return {"train": self._of_shards(self.shards(root, seed)["train"])}
        if not files:
            raise ValueError(
                f"{root} has no metadata {self.metadata}: point data.root at the folder of "
                f"yfcc100m_dataset ({WHERE}), or name it by data.layout.metadata"
            )
        known = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        key = repr((known, FORMAT, self.selection))
        table = kept(key, partial(self.selection.write, partial(photos, files)), Table.read)
        if self.shards is not None:
            return {"train": self._joined(self.shards(root, seed)["train"], table, key)}
        ids, hashes, labels, classes, known = table
        split = Photos(root, self.images, ids, hashes, labels, classes, known)
        if not (root / split.name(0)).is_file():
            raise ValueError(
                f"the first photograph is not there: {root / split.name(0)}; name the paths of "
                "your images by data.layout.images, with {hash} or {id}"
            )
        return {"train": split}

    def _of_shards(self, split: Split) -> Split:
        """A subset of places in the shards, where nothing is known of the images."""
        assert isinstance(split, Archived)
        count = self.selection.count
        if count is None:
            return split
        if count > len(split):
            raise ValueError(f"data.layout.count={count} is more than the {len(split)} images")
        near = ranks(np.arange(len(split)), self.selection.seed)
        chosen = np.argpartition(near, count - 1)[:count]
        return split.take(torch.from_numpy(np.sort(chosen)))

    def _joined(self, split: Split, table: Table, key: str) -> Split:
        """The images of the shards that are in the table, with what it says of them."""
        assert isinstance(split, Archived)
        archives = split.archives
        both = repr((key, archives.sources, archives.counts.tolist()))
        at, rows = kept(both, partial(join, archives, table.ids, table.hashes), _read_join)
        if len(at) < len(table.ids):
            log.warning(
                "the shards hold %d of the %d photographs chosen from the metadata",
                *(len(at), len(table.ids)),
            )
        labels = None if table.labels is None else table.labels[torch.from_numpy(rows)]
        tags = {kind: x.take(torch.from_numpy(rows)) for kind, x in table.annotations.items()}
        return replace(split, at=at, labels=labels, classes=table.classes, annotations=tags)


def _read_join(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    at, rows = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("at", "rows"))
    if len(at) != len(rows):
        raise ValueError(f"{len(at)} positions and {len(rows)} rows")
    return at, rows
