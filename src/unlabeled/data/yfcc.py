"""YFCC100M: a hundred million photographs of Flickr, whole or a subset fixed by a seed."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.files import cache_folder
from unlabeled.data.metadata import photos
from unlabeled.data.order import BufferedOrder
from unlabeled.data.rgb import pixels, stored
from unlabeled.data.selection import Selection, ranks
from unlabeled.data.shards import Archived, Shards
from unlabeled.data.splits import Split, digest
from unlabeled.truth import Annotation, Kept

BLOCK = 50_000  # photographs that the order of an epoch moves together: a shard's worth
FORMAT = "1"  # of what is kept
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
        images: path of an image below the root: see `Photos`.
        shards: shards of the images instead (see `Shards`); metadata is not read then, and a
            subset is one of the places in the shards.
        count: photographs of the subset; None: all.
        subset_seed: fixes the subset; no function of the run's seed.
        target: labels for `supervised`. "tags": of the `classes` tags that most photographs of
            the subset have, one that the photograph has, drawn once (Joulin et al., 2016,
            https://arxiv.org/abs/1511.02251), and all of them as annotation `tags`; "geo": the
            cell of `cell` degrees that it was taken in, of the `classes` that have most.
            Photographs without are left out of the subset.
        classes: at most so many.
        cell: side of a cell in degrees of latitude; cells are as wide as that on the equator.
        buffer: see `Shards`.
    """

    def __init__(
        self,
        *,
        metadata: str = "yfcc100m_dataset*",
        images: str = "data/images/{a}/{b}/{hash}.jpg",
        shards: str | Sequence[str] | None = None,
        count: int | None = 1_000_000,
        subset_seed: int = 0,
        target: Literal["tags", "geo"] | None = None,
        classes: int = 1000,
        cell: float = 1.0,
        buffer: int = 100_000,
    ) -> None:
        if target is not None and (count is None or shards is not None):
            raise ValueError(
                "data.layout.target needs metadata and a subset: set data.layout.count and "
                "data.layout.shards=null"
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
        if self.shards is not None:
            return {"train": self._of_shards(self.shards(root, seed)["train"])}
        files = sorted(path for path in root.glob(self.metadata) if path.is_file())
        if not files:
            raise ValueError(
                f"{root} has no metadata {self.metadata}: point data.root at the folder of "
                f"yfcc100m_dataset ({WHERE}), or name it by data.layout.metadata"
            )
        folder = self._kept(files)
        ids, hashes = (np.load(folder / f"{x}.npy", mmap_mode="r") for x in ("ids", "hashes"))
        split = Photos(root, self.images, ids, hashes)
        if not (root / split.name(0)).is_file():
            raise ValueError(
                f"the first photograph is not there: {root / split.name(0)}; name the paths of "
                "your images by data.layout.images, with {hash} or {id}"
            )
        if self.selection.target is None:
            return {"train": split}
        labels = torch.from_numpy(np.load(folder / "labels.npy"))
        classes = tuple(json.loads((folder / "classes.json").read_text()))
        values, ends = np.load(folder / "tags.npy"), np.load(folder / "ends.npy")
        tags = [torch.from_numpy(x) for x in np.split(values, ends[:-1])]
        known: dict[str, Annotation] = (
            {"tags": Kept(tags)} if self.selection.target == "tags" else {}
        )
        return {"train": replace(split, labels=labels, classes=classes, annotations=known)}

    def _of_shards(self, split: Split) -> Split:
        assert isinstance(split, Archived)
        count = self.selection.count
        if count is None:
            return split
        if count > len(split):
            raise ValueError(f"data.layout.count={count} is more than the {len(split)} images")
        near = ranks(np.arange(len(split)), self.selection.seed)
        chosen = np.argpartition(near, count - 1)[:count]
        return split.take(torch.from_numpy(np.sort(chosen)))

    def _kept(self, files: list[Path]) -> Path:
        """The folder with what these files give, made if it is not there."""
        known = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        name = blake2b(repr((known, FORMAT, self.selection)).encode(), digest_size=16).hexdigest()
        folder = cache_folder().parent / "yfcc" / name
        if not folder.is_dir():
            partial = folder.with_name(f".{name}.{os.getpid()}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            try:
                self.selection.write(photos(files), partial)
                if not folder.is_dir():
                    partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return folder
