"""A set of images: files on disk or one array in memory."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.rgb import pixels, stored
from unlabeled.draws import shuffled
from unlabeled.truth import Annotation


@dataclass(frozen=True)
class Files:
    """Images in files.

    Args:
        root: the folder that paths are relative to.
        paths: (N,) bytes.
        sizes: (N,) int64, bytes of each file.
        labels: (N,) int64 into `classes`, or None.
        classes: names of the classes; empty without labels.
        annotations: by kind, see `unlabeled.truth`.
        names: of key-points and factors, by kind.
    """

    root: Path
    paths: np.ndarray
    sizes: np.ndarray
    labels: Tensor | None
    classes: tuple[str, ...]
    annotations: Mapping[str, Annotation] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """What to call an image in a message."""
        return os.fsdecode(self.paths[i])

    def image(self, i: int) -> Tensor:
        """An image, RGB (3, h, w) uint8. Raises `UnreadableError`."""
        return pixels(self.root / self.name(i))

    def encoded(self, i: int) -> bytes:
        """The bytes of an image's file. Raises `UnreadableError`."""
        return stored(self.root / self.name(i))

    def take(self, positions: Tensor) -> "Files":
        """Some of the images, in the order of `positions`."""
        at = positions.numpy()
        labels = None if self.labels is None else self.labels[positions]
        known = {kind: x.take(positions) for kind, x in self.annotations.items()}
        rest = {"labels": labels, "annotations": known}
        return replace(self, paths=self.paths[at], sizes=self.sizes[at], **rest)

    def identity(self) -> str:
        """A hash of which images these are, in their order, with their labels."""
        names = b"\0".join(self.paths.tolist())
        return digest([names, self.sizes.tobytes()], self.labels, self.classes)


@dataclass(frozen=True)
class Array:
    """Images of one size in memory.

    Args:
        pixels: (N, 3, H, W) uint8; grey images are stored once and expanded.
        labels: (N,) int64 into `classes`, or None.
        classes: names of the classes; empty without labels.
        annotations: by kind, see `unlabeled.truth`.
        names: of key-points and factors, by kind.
    """

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]
    annotations: Mapping[str, Annotation] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, i: int) -> str:
        """What to call an image in a message."""
        return f"image {i}"

    def image(self, i: int) -> Tensor:
        """An image, RGB (3, H, W) uint8."""
        return self.pixels[i]

    def take(self, positions: Tensor) -> "Array":
        """Some of the images, in the order of `positions`."""
        labels = None if self.labels is None else self.labels[positions]
        known = {kind: x.take(positions) for kind, x in self.annotations.items()}
        pixels = rows(self.pixels, positions)
        return replace(self, pixels=pixels, labels=labels, annotations=known)

    def identity(self) -> str:
        """A hash of which images these are, in their order, with their labels."""
        return digest([_stored(self.pixels).contiguous().numpy().data], self.labels, self.classes)


class Split(Protocol):
    """A set of images, however they are kept."""

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64 into `classes`, or None."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty without labels."""
        ...

    @property
    def annotations(self) -> Mapping[str, Annotation]:
        """By kind, see `unlabeled.truth`."""
        ...

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Of key-points and factors, by kind."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What to call an image in a message."""
        ...

    def image(self, i: int) -> Tensor:
        """An image, RGB (3, h, w) uint8. Raises `UnreadableError`."""
        ...

    def take(self, positions: Tensor) -> "Split":
        """Some of the images, in the order of `positions`."""
        ...

    def identity(self) -> str:
        """A hash of which images these are, in their order, with their labels."""
        ...


def rows(pixels: Tensor, positions: Tensor) -> Tensor:
    """Some images (B, 3, H, W) of many; what was grey and expanded stays so."""
    return _stored(pixels)[positions].expand(-1, pixels.shape[1], -1, -1)


def _stored(pixels: Tensor) -> Tensor:
    return pixels[:, :1] if pixels.stride(1) == 0 else pixels


def digest(
    parts: Iterable[bytes | memoryview], labels: Tensor | None, classes: Iterable[str]
) -> str:
    """A hash of bytes, labels and class names, the same on every machine."""
    h = hashlib.blake2b(digest_size=16)
    y = b"none" if labels is None else labels.to(torch.int64).numpy().tobytes()
    for part in (*parts, y, "\0".join(classes).encode()):
        h.update(hashlib.blake2b(part).digest())
    return h.hexdigest()


def lies_in(split: Split) -> str:
    """Where files or shards lie whose identity says nothing of their contents, else nothing.

    Lists that came with a data set name the files alone, which a copy of other sizes has too, and
    of a URL no size is known.
    """
    archives: Any = getattr(split, "archives", None)
    if archives is not None:
        return "".join(f" {shard.place}" for shard in archives.sources if not shard.size)
    files: Any = getattr(split, "files", split)
    if getattr(files, "root", None) is None or getattr(files, "sizes", np.zeros(1)).any():
        return ""
    return f" in {Path(files.root).resolve()}"


def divide(labels: Tensor | None, n: int, share: float, *key: int | str) -> tuple[Tensor, Tensor]:
    """Sorted positions (rest, chosen) of n images: `share` of every class is chosen, by the key.

    Of a class of two and more images, at least one is chosen and at least one is not.
    """
    order = shuffled(n, *key)
    y = torch.zeros(n, dtype=torch.int64) if labels is None else labels[order]
    counts = y.bincount(minlength=1)
    quota = (counts * share).round().long().clamp(min=1).minimum(counts - 1)
    by_class = y.argsort(stable=True)
    place = torch.empty(n, dtype=torch.int64)  # an image's place within its class
    place[by_class] = torch.arange(n) - (counts.cumsum(0) - counts)[y[by_class]]
    chosen = place < quota[y]
    return order[~chosen].sort().values, order[chosen].sort().values


def parted(split: Split, share: float, *key: int | str) -> tuple[Tensor, Tensor]:
    """Sorted positions (rest, chosen) of a split, as `divide`; what is of one group stays together.

    Of a split with `groups` (N,), the share is one of groups, each of its first member's class.
    """
    groups: Tensor | None = getattr(split, "groups", None)
    if groups is None:
        return divide(split.labels, len(split), share, *key)
    names, unit = groups.unique(return_inverse=True)
    first = torch.full((len(names),), len(unit)).scatter_reduce(
        0, unit, torch.arange(len(unit)), "amin"
    )
    labels = None if split.labels is None else split.labels[first]
    chosen = torch.isin(unit, divide(labels, len(names), share, *key)[1])
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
