"""What an evaluation is given, what it returns, and what it expects of the data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


class Request(NamedTuple):
    """One set of features: a stage's maps, averaged over a grid of `grid` x `grid` cells."""

    stage: str  # one of backbone.stages, or "final": what forward returns
    grid: int = 1
    window: tuple[int, ...] = ()  # (side, stride, padding) of windows that make this grid


FINAL = Request("final")


@runtime_checkable
class Data(Protocol):
    """The part of a data module that evaluations use."""

    classes: Sequence[str]

    def has(self, split: str) -> bool: ...
    def size(self, split: str) -> int: ...
    def labels(self, split: str) -> Tensor | None: ...
    def selection(self) -> tuple[Tensor, Tensor]: ...
    def split_hash(self) -> str: ...
    def fingerprint(self, split: str) -> str: ...
    def thumbnail(self, split: str, position: int) -> Tensor: ...
    def scan(
        self, split: str, start: int = 0, stop: int | None = None, batch_size: int = 256
    ) -> Iterable[Batch]: ...


@dataclass(frozen=True)
class Shapes:
    """What a backbone makes of one image."""

    maps: Mapping[str, tuple[int, int, int]]  # (channels, height, width) of every stage, in order
    dim: int  # of what forward returns
    pooled: bool  # whether forward returns the average of the last stage's map

    def named(self, stage: str) -> Request:
        """The average-pooled features of a stage. Raises ValueError if there is no such stage.

        The pixel baseline has one stage of pictures, whatever the backbone's.
        """
        if "pixels" in self.maps and (stage == "final" or stage not in self.maps):
            return FINAL
        if stage != "final" and stage not in self.maps:
            raise ValueError(f"the backbone has no stage {stage!r}; it has {[*self.maps, 'final']}")
        return Request(stage)

    def resolve(self, request: Request) -> Request:
        """The request under the one name its features are kept by."""
        return Request(list(self.maps)[-1]) if request == FINAL and self.pooled else request

    def of(self, request: Request) -> tuple[int, int, int]:
        """(channels, grid, grid) of one image. Raises ValueError if that is finer than the map."""
        channels, *sides = self.maps.get(request.stage, (self.dim, 1, 1))
        if request.grid > min(sides) and not request.window:  # padded windows may
            raise ValueError(
                f"{request.stage} has maps of {sides[0]} x {sides[1]}; "
                f"a grid of {request.grid} is finer than that"
            )
        return channels, request.grid, request.grid


@dataclass(frozen=True)
class Features:
    """What one backbone gives an evaluation: cached features, labels and the split to choose on."""

    splits: Mapping[str, Mapping[Request, Tensor]]  # (n, channels, grid, grid) each
    labels: Mapping[str, Tensor]  # (n,) int64 of each split
    classes: int
    selection: tuple[Tensor, Tensor]  # positions in the training set: to fit on, to choose on
    shapes: Shapes
    seed: int
    device: torch.device
    progress: Progress
    data: Any = None  # the data module, for annotations: see `unlabeled.truth`


@dataclass(frozen=True)
class Result:
    """Scores under names like `k20_t0.07/top1`, and under each name what must stand beside it.

    Args:
        scores: numbers; accuracies are shares in [0, 1].
        details: protocol, stage, hyperparameters and selection of every score, and `better`,
            "lower" or "neither", where a higher score is not a better one. `share` is false
            where a score that may lie in [0, 1] is none, and no percentage.
        per_image: values (n,) whose mean is the score, for the bootstrap; a score that is not
            a mean over images has its own `ci95` in its details instead.
        figures: arrays of what the report draws, by name. Each has a `kind`, a `title` and may
            have a `note`; by kind: "neighbours", as `evaluate.figures.neighbours`; "sheet",
            `titles` (c,) and `column0` ... uint8 (n, h, w, 3), a row per image; "curves", `x`
            (n,), `names` (s,), `y` (s, n) and optionally `low`, `high`, `ticks` (n,), `xlabel`,
            `ylabel`, `log`, `percent`, `scores` (s, n), names of what is drawn, which puts the
            curves of baselines into the same picture, `panel` and `part`, titles of a panel that
            small drawings share and of this one, number `order` in it; "points", `x`, `y`, `names`
            (n,) and optionally `group`, `xlabel`, `ylabel`, `percent`.
    """

    scores: Mapping[str, float]
    details: Mapping[str, dict[str, Any]]
    per_image: Mapping[str, Tensor]
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A backbone that an evaluation may train, and what it trains it on."""

    backbone: nn.Module  # a copy of its own, on the device
    data: Any  # the whole data module: `Data`, and whatever else its images allow
    seed: int
    device: torch.device
    progress: Progress
    # of each split that one pass went over for evaluations of frozen features, in float32
    features: Mapping[str, Mapping[Request, Tensor]] = field(default_factory=dict)

    def kept(self, split: str, request: Request, rows: Tensor) -> Tensor | None:
        """Features (n, D) of the images at positions `rows`, if a pass left them."""
        found = self.features.get(split, {}).get(request)
        return None if found is None else found[rows].flatten(1)


def none_to_choose_on(data: Data) -> str | None:
    """Why nothing can be chosen on held-out training images, or None."""
    counts = [len(rows) for rows in data.selection()]
    if all(counts):
        return None
    return (
        f"of the {sum(counts)} training images none is left to choose settings on: it takes "
        "a class with two"
    )


class Tuned(Protocol):
    """An evaluation that trains the backbone itself, or needs more of it than pooled maps.

    It runs in every process, on the backbone and on its random twin, and on raw pixels if it
    says `reads_pixels = True`. Where it has `requests(shapes)`, the pass that others need over
    its splits extracts these too, for `Subject.kept`. With `trains = True` it takes long, and is
    left until what is quicker has its scores. For `needs_labels`, `hears`, `obstacle` and
    `misfit` see `Evaluation`.
    """

    data: Data | None  # its own data module, or the run's
    splits: frozenset[str]  # the splits it reads, of "train" and "test"

    def tune(self, subject: Subject) -> Result:
        """Trains and scores the subject; the first process's result counts."""
        ...


class Evaluation(Protocol):
    """Settings in, one call, scores out: an evaluation of frozen features.

    It may say `needs_labels = False` where it reads none, and `hears = True` where sound will do
    without pictures. It may have `obstacle(data)`, which says why data with its splits and labels
    still do not do, or None, and `misfit(backbone)`, which says why that backbone does not.
    """

    data: Data | None  # its own data module, or the run's
    splits: frozenset[str]  # the splits it reads, of "train" and "test"

    def requests(self, shapes: Shapes) -> set[Request]:
        """The features it needs of a backbone."""
        ...

    def __call__(self, features: Features) -> Result:
        """Trains whatever heads it has and scores the features."""
        ...
