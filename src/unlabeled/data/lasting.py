"""Recordings that have as many pictures as a decode takes; those with fewer are set aside."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unlabeled.data.layouts import Layout
from unlabeled.data.splits import Split
from unlabeled.draws import shuffled, subset

log = logging.getLogger(__name__)
NAMED = 5  # recordings that are named one by one


@runtime_checkable
class Lengths(Protocol):
    """A split that knows how many pictures its recordings have before they are decoded."""

    def lengths(self) -> Tensor:
        """(N,) int64; 0 where a recording cannot be read."""
        ...


def lasting(split: Split, least: int) -> Tensor:
    """Positions of what has so many pictures, or cannot be read and is counted where it is met."""
    if least < 2 or not isinstance(split, Lengths):
        return torch.arange(len(split))
    counts = split.lengths()
    return ((counts >= least) | (counts == 0)).nonzero().flatten()


class Lasting:
    """The recordings of a layout, of whose training set too short ones are left out.

    Test recordings stay, for evaluations that read them otherwise.

    Args:
        layout: of recordings.
        least: pictures that a recording needs.
    """

    def __init__(self, layout: Layout, least: int) -> None:
        self.layout, self.least = layout, least

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        splits = dict(self.layout(root, seed))
        train = splits["train"]
        kept = lasting(train, self.least)
        if len(kept) < len(train):
            short = sorted({*range(len(train))} - {*kept.tolist()})
            log.warning(
                "train: of %d recordings, %d have fewer pictures than the %d that decode takes, "
                "and are left out: %s",
                *(len(train), len(short), self.least, few([train.name(i) for i in short])),
            )
        if not len(kept):
            raise ValueError(
                f"no training recording has the {self.least} pictures that decode takes: choose "
                "other recordings, or settings of decode that take fewer (decode.tau_min)"
            )
        splits["train"] = train.take(kept)
        return splits


def few(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more])


def unseen(split: Split, count: int, decode: Any, seed: int) -> Tensor:
    """Positions of about `count` images that a decode can cut, balanced over classes, shuffled."""
    able = lasting(split, getattr(decode, "least", 1))
    if not len(able):
        return able
    labels = None if split.labels is None else split.labels[able].tolist()
    chosen = able[subset(labels, len(able), min(count, len(able)), seed, "unseen")]
    return chosen[shuffled(len(chosen), seed, "unseen order")]
