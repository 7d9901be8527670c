"""Angular errors of predicted surface normals on a test set, and pictures of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.batch import normalize
from unlabeled.draws import subset
from unlabeled.evaluate.angles import Angles, degrees
from unlabeled.evaluate.annotated import resized
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.directions import KNOWN, Words, coloured
from unlabeled.evaluate.iterations import ahead
from unlabeled.evaluate.shares import share

PIXELS = 1 << 20  # that are predicted at once
RESAMPLES = 500

Network = Callable[[Tensor, tuple[int, int]], list[Tensor]]


@dataclass(frozen=True)
class Scored:
    """Errors by name, their intervals, those of a constant, and rows of pictures."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    constant: dict[str, float]  # of the mean direction of the training set at every pixel
    sheet: list[tuple[np.ndarray, ...]]  # image, truth, prediction, each (h, w, 3) uint8


@torch.no_grad()
def predict(
    network: Network, whole: Sequence[Tensor], centres: Tensor, sides: Sequence[int | None]
) -> Tensor:
    """Directions (B, 3, h, w) float64 of images (3, h, w) uint8 of one size.

    Args:
        network: gives logits of the words, first in its list.
        whole: the images.
        centres: (W, 3) the words' directions, on the network's device.
        sides: short sides over which the softmax is averaged.
    """
    h, w = whole[0].shape[1:]
    chance = torch.zeros(len(whole), len(centres), h, w, device=centres.device)
    for side in sides:
        x = normalize(torch.stack([resized(image, side) for image in whole]).to(centres.device))
        chance += network(x, (h, w))[0].float().softmax(1)
    summed = torch.einsum("bkhw,kd->bdhw", chance.double(), centres.double())
    return F.normalize(summed, dim=1)


def score(
    network: Network, subject: Subject, known: Words, sides: Sequence[int | None], pictures: int
) -> Scored:
    """Errors on every known pixel of the test images, in their own resolution.

    Processes share the images: the network must be the same in all of them.
    """
    data, n = subject.data, subject.data.size("test")
    truths = data.annotation("test", "normals")
    centres, average = known.centres.to(subject.device), known.mean.to(subject.device)
    mine = share(n)
    first, stop = (mine.stop, mine.stop) if mine.spare else (mine.start, mine.stop)
    key = (subject.seed, "normals", "bootstrap")
    found = Angles(n, *key, resamples=RESAMPLES, start=first)
    constant = Angles(n, resamples=0, start=first)
    shown = subset(None, n, min(pictures, n), subject.seed, "normals", "sheet").tolist()
    sheet: list[tuple[np.ndarray, ...]] = []
    h, w = data.image("test", 0).shape[1:]
    each = max(1, PIXELS // (h * w * len(sides)))
    parts = [list(range(i, min(i + each, stop))) for i in range(first, stop, each)]

    def read(part: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        return [data.image("test", i) for i in part], list(truths.several(part))

    for part, (whole, normals) in zip(parts, ahead(read, parts, most=4), strict=True):
        same = len({x.shape for x in whole}) == 1
        groups = [whole] if same else [[x] for x in whole]
        said = [x for group in groups for x in predict(network, group, centres, sides)]
        for true, made in zip(normals, said, strict=True):
            here = true.to(subject.device)
            at = here.norm(dim=0) > KNOWN
            found.add(degrees(made[:, at].T, here[:, at].T).cpu())
            constant.add(degrees(average.expand(int(at.sum()), 3), here[:, at].T).cpu())
        subject.progress("normals", part[-1] + 1 - first, stop - first)
    for i in shown:
        (image,), (true,) = read([i])
        (made,) = predict(network, [image], centres, sides)
        sheet.append((image.permute(1, 2, 0).numpy(), coloured(true), coloured(made)))
    found.from_all(subject.device)
    constant.from_all(subject.device)
    scores = found.scores()
    return Scored(
        {name: value for name, (value, _) in scores.items()},
        {name: interval for name, (_, interval) in scores.items()},
        {name: value for name, (value, _) in constant.scores().items()},
        sheet,
    )


def figure(made: Scored) -> dict[str, Mapping[str, Any]]:
    """The sheet of pictures, where there are some and all are of one size."""
    if len({picture.shape for row in made.sheet for picture in row}) != 1:
        return {}
    values, constant = made.values["median_degrees"], made.constant["median_degrees"]
    return {
        "sheet": {
            "kind": "sheet",
            "title": "Surface normals",
            "note": "Red points right, green up, blue to the viewer; grey is unknown. Median "
            f"error {values:.1f} degrees; of one direction for all pixels, the mean of the "
            f"training set, {constant:.1f}.",
            "titles": np.array(["image", "truth", "prediction"]),
            **{f"column{i}": np.stack([row[i] for row in made.sheet]) for i in range(3)},
        }
    }
