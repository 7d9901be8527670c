"""Images in WebDataset shards, as img2dataset and scripts/make_shards.py write them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.archives import Archives
from unlabeled.data.copies import Copies
from unlabeled.data.order import BufferedOrder
from unlabeled.data.remote import find, located, read_beside
from unlabeled.data.rgb import pixels
from unlabeled.data.splits import Split, digest, divide
from unlabeled.data.tree import TEST, TRAIN
from unlabeled.truth import Annotation

MOST = 1 << 24  # classes; numbers beyond are of something else


@dataclass(frozen=True)
class Archived:
    """Images in shards.

    Args:
        archives: the shards.
        at: (N,) int64 sorted positions among all images of the shards; None: all.
        labels: (N,) int64 into `classes`, or None.
        classes: names of the classes; empty without labels.
        buffer: images that are shuffled together.
        lanes: see `BufferedOrder`.
        annotations: by kind, see `unlabeled.truth`.
        names: of key-points and factors, by kind.
    """

    archives: Archives
    at: np.ndarray | None
    labels: Tensor | None
    classes: tuple[str, ...]
    buffer: int
    lanes: int
    annotations: Mapping[str, Annotation] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.archives) if self.at is None else len(self.at)

    def name(self, i: int) -> str:
        """What to call an image in a message."""
        return self.archives.name(self._at(i))

    def image(self, i: int) -> Tensor:
        """An image, RGB (3, h, w) uint8. Raises `UnreadableError`."""
        return pixels(self.archives.read(self._at(i)))

    def encoded(self, i: int) -> bytes:
        """The bytes of an image's file. Raises `UnreadableError`."""
        return self.archives.read(self._at(i)).getvalue()

    def take(self, positions: Tensor) -> "Archived":
        """Some of the images, in the order of `positions`, which must be sorted."""
        at = positions.numpy() if self.at is None else self.at[positions.numpy()]
        if (np.diff(at) < 0).any():
            raise ValueError("images of shards keep their order: sort the positions")
        labels = None if self.labels is None else self.labels[positions]
        known = {kind: x.take(positions) for kind, x in self.annotations.items()}
        return replace(self, at=at, labels=labels, annotations=known)

    def identity(self) -> str:
        """A hash of which images these are, in their order, with their labels."""
        shards = [f"{s.name} {s.size}".encode() for s in self.archives.sources]
        at = b"all" if self.at is None else self.at.tobytes()
        parts = [b"\0".join(shards), self.archives.counts.tobytes(), at]
        return digest(parts, self.labels, self.classes)

    def order(self, batch_size: int, *key: int | str) -> BufferedOrder:
        """An epoch's order of the images: near those that lie near."""
        counts = self.archives.counts
        if self.at is not None:
            shard = np.searchsorted(self.archives.ends, self.at, "right")
            counts = np.bincount(shard, minlength=len(counts))
        return BufferedOrder(counts, batch_size, self.buffer, self.lanes, *key)

    def _at(self, i: int) -> int:
        return i if self.at is None else int(self.at[i])


class Shards:
    """Tar archives of images, on the disk or wherever fsspec or a command reads from.

    Labels are the integers in members `.cls`, if every image has one; `classes.txt` in the root
    names them, one a line.

    Args:
        train: shards to train on: a pattern, or several. Braces count ({00000..00099}.tar) or
            choose, * and ? list; relative to the root, or whole: s3://bucket/*.tar,
            "pipe:curl -s https://host/{0..9}.tar". None: *.tar in the root's folder train or
            training, else in the root.
        test: those to test on. None: those in the folder test, val, valid or validation, if any.
        test_share: where there are none, the share of the images set aside to test on.
        split_seed: fixes that choice; no function of the run's seed.
        labels: whether to read them.
        buffer: images that are shuffled together; they need no memory, but this many images'
            shards are read by turns (and, if they are remote, should fit on the disk).
        lanes: independent runs through the shards, each with an equal share of every batch. With
            a multiple of the number of nodes, a node reads only its share of the shards. It
            belongs to the order of images, as the seed does.
        cache: folder for copies of remote shards, one on each node's disk. None: below
            `UNLABELED_CACHE`, by default ~/.cache/unlabeled.
        cache_gb: how much to keep there; the longest unused are deleted. None: everything.
    """

    def __init__(
        self,
        *,
        train: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        test_share: float = 0.0,
        split_seed: int = 0,
        labels: bool = True,
        buffer: int = 100_000,
        lanes: int = 1,
        cache: str | None = None,
        cache_gb: float | None = None,
    ) -> None:
        if not 0 <= test_share < 1:
            raise ValueError(f"test_share must be in [0, 1), got {test_share}")
        for name, value in (("buffer", buffer), ("lanes", lanes)):
            if value < 1:
                raise ValueError(f"data.layout.{name} must be at least 1, got {value}")
        if cache_gb is not None and cache_gb <= 0:
            raise ValueError(f"data.layout.cache_gb must be above 0, got {cache_gb}")
        self.patterns = {"train": _several(train), "test": _several(test)}
        self.test_share, self.split_seed, self.labels = test_share, split_seed, labels
        self.buffer, self.lanes = buffer, lanes
        self.copies = Copies(cache, None if cache_gb is None else int(cache_gb * 1e9))

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        train = self._open(root, self.patterns["train"], (*TRAIN, ""))
        if train is None:
            raise ValueError(
                f"no shards (*.tar) in {located(root, '')} or its folder train: point data.root "
                "at them or name them by data.layout.train; scripts/make_shards.py makes some"
            )
        test = self._open(root, self.patterns["test"], TEST)
        both = [train] if test is None else [train, test]
        classes = self._classes(root, both)
        splits = [self._split(archives, classes) for archives in both]
        if test is not None:
            return {"train": splits[0], "test": splits[1]}
        if not self.test_share:
            return {"train": splits[0]}
        whole = splits[0]
        rest, chosen = divide(whole.labels, len(whole), self.test_share, self.split_seed)
        return {"train": whole.take(rest), "test": whole.take(chosen)}

    def _open(
        self, root: Path, patterns: Sequence[str] | None, folders: Sequence[str]
    ) -> Archives | None:
        """The shards of patterns, or of the first folder that has any."""
        if patterns is None:
            tried = (find(root, f"{name}/*.tar" if name else "*.tar") for name in folders)
            sources = next((found for found in tried if found), [])
        else:
            sources = [source for pattern in patterns for source in find(root, pattern)]
            if not sources:
                raise ValueError(f"no shards match {list(patterns)} in {located(root, '')}")
        if len({source.place for source in sources}) < len(sources):
            raise ValueError(f"{list(patterns or ())} name a shard twice")
        return Archives(sources, self.copies) if sources else None

    def _classes(self, root: Path, archives: Sequence[Archives]) -> tuple[str, ...] | None:
        """Names of classes; None without labels."""
        found = [each.labels() for each in archives] if self.labels else [None]
        if any(labels is None for labels in found):
            return None
        text = read_beside(located(root, "classes.txt"))
        count = max(int(labels.max()) for labels in found if labels is not None) + 1
        if text is None and count > MOST:
            raise ValueError(
                f"a member .cls of {located(root, '')} is {count - 1}, which can be no class's "
                "number: number classes from 0, or say data.layout.labels=false"
            )
        names = [str(i) for i in range(count)] if text is None else text.splitlines()
        if len(names) < count:
            raise ValueError(
                f"{located(root, 'classes.txt')} names {len(names)} of {count} classes"
            )
        return tuple(names)

    def _split(self, archives: Archives, classes: tuple[str, ...] | None) -> Archived:
        labels = None if classes is None else archives.labels()
        y = None if labels is None else torch.from_numpy(labels)
        return Archived(archives, None, y, classes or (), self.buffer, self.lanes)


def _several(patterns: str | Sequence[str] | None) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)
