"""From positions in a split to batches, and what happens to images that cannot be read."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unlabeled.batch import Batch
from unlabeled.data.decode import Center, Decode
from unlabeled.data.recordings import Blank, Recorded, sample
from unlabeled.data.rgb import UnreadableError
from unlabeled.data.sampler import Bad, Key
from unlabeled.data.splits import Array, Split, rows
from unlabeled.data.tasks import Cut, by_task, filled
from unlabeled.errors import InputError

log = logging.getLogger(__name__)
GREY = torch.full((3, 256, 256), 128, dtype=torch.uint8)
NAMED = 10  # unreadable images that are named one by one


class Unreadable:
    """Counts the unreadable images of a split and stops the run when there are too many.

    Each image counts once, in the process that trains; what its workers meet is reported to it.

    Args:
        split: the images.
        share: of all its images, that may be unreadable (`data.max_unreadable`).
    """

    def __init__(self, split: Split, share: float) -> None:
        self.split, self.share = split, share
        self.found: dict[int, str] = {}  # position -> reason

    @property
    def allowed(self) -> int:
        """How many there may be."""
        return int(self.share * len(self.split))

    def __call__(self, bad: Bad) -> None:
        for i, reason in bad:
            if i not in self.found:
                self.found[i] = reason
                if len(self.found) <= NAMED:
                    log.warning("cannot read %s (%s)", self.split.name(i), reason)
        if len(self.found) > self.allowed:
            root = getattr(self.split, "root", None)
            if root is not None and not root.exists():
                raise FileNotFoundError(
                    f"the folder of the images, {root}, is gone: bring it back and start the same "
                    "command again, to go on from the newest checkpoint"
                )
            raise InputError(self.message())

    def message(self) -> str:
        """How many, what share, which, and what to do."""
        n, count = len(self.split), len(self.found)
        names = "".join(
            f"\n  {self.split.name(i)} ({reason})" for i, reason in list(self.found.items())[:5]
        )
        more = f"\n  and {count - 5} more" if count > 5 else ""
        return (
            f"{count} of {n} images ({count / n:.1%}) met so far cannot be read, more than "
            f"data.max_unreadable={self.share:g} allows; repair or remove them, or raise it:"
            f"{names}{more}"
        )


class TrainingRows:
    """Keys to random crops. An unreadable image is replaced by the next readable one.

    The replacement comes with its own index and label, but with the crop boxes of the image it
    stands for, so that an image that is met twice in an epoch is not cropped twice alike.
    """

    def __init__(self, split: Split, decode: Decode, seed: int, tries: int) -> None:
        self.split, self.decode, self.seed, self.tries = split, decode, seed, tries

    def __getitem__(self, keys: Sequence[Key]) -> tuple[Batch | None, Bad]:
        bad: Bad = []
        step = keys[0][2]
        decodes = by_task(self.decode, step)
        cut: dict[str, list[Cut]] = {task: [] for task in decodes}
        index = []
        for wanted, epoch, _ in keys:
            found = self._cut(wanted, decodes, (self.seed, epoch, wanted), bad)
            if found is None:
                return None, bad
            index.append(found[0])
            for task, each in found[1].items():
                cut[task].append(each)
        batch = labelled([], torch.tensor(index), self.split)
        batch["step"] = step
        return filled(batch, {task: stacked(each) for task, each in cut.items()}), bad

    def _cut(
        self, wanted: int, decodes: Mapping[str, Any], key: tuple[int, ...], bad: Bad
    ) -> tuple[int, dict[str, Cut]] | None:
        i = wanted
        for _ in range(self.tries):
            try:
                found = sample(self.split, i)
                return i, {task: decode(found, *key) for task, decode in decodes.items()}
            except UnreadableError as error:
                bad.append((i, str(error)))
                i = (i + error.hop) % len(self.split)
        return None


class PlainRows:
    """Positions to crops, random by the key. An unreadable image is grey and keeps its label."""

    def __init__(self, split: Split, decode: Any, key: tuple[int | str, ...]) -> None:
        self.split, self.decode, self.key = split, decode, key

    def __getitem__(self, positions: Sequence[int]) -> tuple[Batch, Bad]:
        bad: Bad = []
        cut = [self._cut(i, bad) for i in positions]
        batch = labelled([], torch.tensor(positions), self.split)
        return filled(batch, {"": stacked(cut)}), bad

    def _cut(self, i: int, bad: Bad) -> Cut:
        try:
            return self.decode(sample(self.split, i), *self.key, i)
        except UnreadableError as error:
            bad.append((i, str(error)))
            return self.decode(_instead(self.split), *self.key, i)


def _instead(split: Split) -> Any:
    """What stands for one that cannot be read."""
    if isinstance(split, Recorded):
        return Blank(pictured=getattr(split, "pictured", True))
    return GREY


class MemoryRows:
    """Keys to whole images, to be cropped on the device.

    Args:
        pixels: (N, 3, S, S) uint8.
        split: the images.
        bad: positions of unreadable images, replaced by the next readable one.
    """

    def __init__(self, pixels: Tensor, split: Split, bad: Iterable[int]) -> None:
        self.pixels, self.split = pixels, split
        self.instead = torch.arange(len(pixels))
        for i in sorted(bad, reverse=True):  # backwards, so that a run of them ends at the same
            self.instead[i] = self.instead[(i + 1) % len(pixels)]

    def __getitem__(self, keys: Sequence[Key]) -> tuple[Batch, Bad]:
        index = self.instead[torch.tensor([index for index, _, _ in keys])]
        batch = labelled([rows(self.pixels, index)], index, self.split)
        batch["step"] = keys[0][2]
        return batch, []


def load(split: Split, size: int, threads: int) -> tuple[Tensor, Bad]:
    """All images as one uint8 tensor (N, 3, size, size), short side resized, centre cut.

    Unreadable images are grey, and listed.
    """
    pixels = torch.empty(len(split), 3, size, size, dtype=torch.uint8)
    bad: Bad = []
    square = Center(size=size)

    def put(i: int) -> None:
        pixels[i] = square(_image(split, i, bad))[0]

    if isinstance(split, Array):
        threads = 0
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for _ in pool.map(put, range(len(split))):
            pass
    return pixels, sorted(bad)


def _image(split: Split, i: int, bad: Bad) -> Tensor:
    try:
        return split.image(i)
    except UnreadableError as error:
        bad.append((i, str(error)))
        return GREY


def stacked(samples: Sequence[Cut]) -> Cut:
    """What decodes made of several samples, as a batch has it."""
    if isinstance(samples[0], list):
        return [torch.stack(parts) for parts in zip(*samples, strict=True)]  # type: ignore
    each: Sequence[dict[str, Any]] = samples  # type: ignore[assignment]
    crops = stacked([one["crops"] for one in each])
    rest = {k: torch.stack([one[k] for one in each]) for k in each[0] if k != "crops"}
    return Batch(crops=crops, **rest)  # type: ignore


def answers(split: Split) -> frozenset[str]:
    """What batches of a split have for supervised learning: "label", "tags"."""
    has = {"label": split.labels is not None, "tags": "tags" in split.annotations}
    return frozenset(name for name, there in has.items() if there)


def labelled(crops: list[Tensor], index: Tensor, split: Split) -> Batch:
    """A batch of crops of the images at `index`, with labels, tags and groups if there are any."""
    batch = Batch(crops=crops, index=index)
    if split.labels is not None:
        batch["label"] = split.labels[index]
    if (groups := getattr(split, "groups", None)) is not None:
        batch["group"] = groups[index]
    if (tags := split.annotations.get("tags")) is not None:
        several = list(tags.several(index.tolist()))
        batch["tags"] = pad_sequence(several, batch_first=True, padding_value=-1)
    return batch
