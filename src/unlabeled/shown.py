"""What dashboards are given of a run, in words that none of them owns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Image = np.ndarray  # uint8 (h, w, 3)
GAP = 4  # pixels between the images of a montage


@dataclass(frozen=True)
class Source:
    """A checkpoint that a run starts from.

    Args:
        file: the checkpoint.
        run: the folder of the run that made it, if one did.
        id: that run's at Weights & Biases, if it has one.
        project: its project there.
        entity: its entity there.
    """

    file: Path
    run: Path | None = None
    id: str | None = None
    project: str | None = None
    entity: str | None = None


@dataclass(frozen=True)
class About:
    """What a dashboard is told of a run before it begins.

    Args:
        folder: the run's.
        config: resolved, without secrets.
        facts: what it was made with: commit, versions, command.
        name: what to call it.
        group: the sweep that it is a member of.
        tags: words to find it by.
        kind: whether it pretrains or only evaluates.
        sources: the checkpoints that it starts from, by their key in the config.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    kind: Literal["pretrain", "evaluate"] = "pretrain"
    sources: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """Pictures that belong together, each with its caption."""

    name: str  # neighbours/test: what stands before the slash groups them
    images: Sequence[Image]
    captions: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of words, numbers and pictures, and how to draw them.

    Args:
        name: as of `Images`.
        title: of the drawing.
        columns: their names.
        rows: a value for each column.
        chart: what a dashboard with charts of its own may draw: "bars" of the second column over
            the first, "points" of the first two, "lines" of the second over the first, one for
            each value of the third.
        drawing: the same as a picture, for those that have none.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    chart: Literal["bars", "points", "lines"] | None = None
    drawing: Image | None = None


@dataclass(frozen=True)
class Files:
    """Files of a run that others may start from.

    Args:
        kind: what they are.
        paths: files or folders.
        facts: what stands beside them.
        stay: whether they will be there after the run.
    """

    kind: Literal["checkpoint", "features"]
    paths: Sequence[Path]
    facts: Mapping[str, Any] = field(default_factory=dict)
    stay: bool = True


class Dashboard(Protocol):
    """Where a run's numbers and pictures are shown."""

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Shows the config."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Adds to the curves, at an update counted from 0."""

    def log_images(self, images: Images, step: int) -> None:
        """Shows pictures."""

    def log_table(self, table: Table, step: int) -> None:
        """Shows a table, and its chart."""

    def log_files(self, files: Files) -> None:
        """Keeps files, or notes where they are."""

    def close(self, state: str) -> None:
        """Ends it: finished, failed, interrupted or requeued."""


def montage(rows: Sequence[Sequence[Image]]) -> Image:
    """Images of any sizes in rows on white, each row as high as its highest."""
    height = [max(image.shape[0] for image in row) for row in rows]
    width = max(sum(image.shape[1] + GAP for image in row) for row in rows) - GAP
    sheet = np.full((sum(height) + GAP * (len(rows) - 1), width, 3), 255, dtype=np.uint8)
    top = 0
    for row, high in zip(rows, height, strict=True):
        left = 0
        for image in row:
            h, w = image.shape[:2]
            sheet[top : top + h, left : left + w] = image
            left += w + GAP
        top += high + GAP
    return sheet
