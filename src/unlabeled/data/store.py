"""The images of a data module: its splits, and the pixels of those that live in memory."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from unlabeled.batch import Batch
from unlabeled.data.decode import Decode
from unlabeled.data.layouts import Layout
from unlabeled.data.reading import PlainRows, Unreadable, labelled, load
from unlabeled.data.sampler import Loader, Order, Orders
from unlabeled.data.splits import Array, Split
from unlabeled.draws import Draws, Key, subset


class Store:
    """Reads a root once.

    The arguments are those of `unlabeled.data.images.Images`.

    Raises:
        ValueError: the root does not hold what the layout expects, or fewer training images
            than `limit`.
    """

    def __init__(
        self,
        root: Path,
        layout: Layout,
        *,
        limit: int | None,
        tier: str,
        size: int | None,
        max_unreadable: float,
        seed: int,
    ) -> None:
        self.root, self.tier, self.size = root, tier, size
        self.splits = dict(layout(root, seed))
        if limit is not None:
            train = self.splits["train"]
            if limit > len(train):
                raise ValueError(f"data.limit={limit} is more than the {len(train)} images")
            labels = None if train.labels is None else train.labels.tolist()
            kept = subset(labels, len(train), limit, seed, "limit")
            self.splits["train"] = train.take(kept)
        self.unreadable = {
            side: Unreadable(split, max_unreadable) for side, split in self.splits.items()
        }
        self._pixels: dict[str, Tensor] = {}

    def split(self, side: str) -> Split:
        """A split by name. Raises ValueError if there is none."""
        if side not in self.splits:
            raise ValueError(f"{self.root} has no {side} images, only {sorted(self.splits)}")
        return self.splits[side]

    def in_memory(self, side: str) -> bool:
        """Whether a split is kept as one tensor."""
        return self.tier == "memory" or (
            self.tier == "auto" and isinstance(self.split(side), Array)
        )

    def pixels(self, side: str) -> Tensor:
        """The images (N, 3, H, W) uint8 of a split in memory, read when they are first asked for.

        Raises:
            ValueError: their size is not known, or too many of them are unreadable.
        """
        if side not in self._pixels:
            split = self.split(side)
            if isinstance(split, Array) and self.size in (None, split.pixels.shape[-1]):
                self._pixels[side] = split.pixels
            elif self.size is None:
                raise ValueError("data.tier=memory needs data.size, the side of the images kept")
            else:
                pixels, bad = load(split, self.size, cores())
                self.unreadable[side](bad)
                self._pixels[side] = pixels
        return self._pixels[side]

    def order(self, batch_size: int, *key: int | str) -> Order | None:
        """An epoch's order of the training images, where reading them in any costs too much."""
        split = self.split("train")
        if isinstance(split, Orders) and not self.in_memory("train"):
            return split.order(batch_size, *key)
        return None

    def scan(
        self,
        side: str,
        parts: Sequence[Sequence[int]],
        decode: Decode,
        workers: int,
        key: Key = ("plain",),
    ) -> Iterator[Batch]:
        """The images at the positions of each part, decoded, as one batch.

        `key` fixes what is random in their crops.
        """
        split = self.split(side)
        if not self.in_memory(side):
            rows, report = PlainRows(split, decode, key), self.unreadable[side]
            yield from Loader(rows, parts, workers=workers, report=report, persistent=False)
            return
        pixels = self.pixels(side)
        for part in parts:
            index = torch.tensor(part)
            found = pixels[part.start : part.stop] if isinstance(part, range) else pixels[index]
            crops = decode.batched(found, Draws(*key, part[0], rows=len(part)))
            yield labelled(crops, index, split)


def check(
    tier: str, *, batch_size: int, limit: int | None, workers: int | None, size: int | None
) -> None:
    """Raises ValueError for settings of `unlabeled.data.images.Images` that cannot be."""
    if tier not in ("auto", "memory", "folder", "gpu"):
        raise ValueError(f"data.tier must be auto, memory, folder or gpu, got {tier!r}")
    if tier == "gpu" and not torch.cuda.is_available():
        raise ValueError("data.tier=gpu needs a CUDA device to decode on: choose data.tier=folder")
    for name, value, low in (
        *(("batch_size", batch_size, 1), ("limit", limit, 1)),
        *(("workers", workers, 0), ("size", size, 1)),
    ):
        if value is not None and value < low:
            raise ValueError(f"data.{name} must be at least {low}, got {value}")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
