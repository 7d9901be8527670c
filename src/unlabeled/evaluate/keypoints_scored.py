"""Key-points that a network finds in a test set: scores and pictures."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unlabeled.batch import normalize
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.frozen import same_everywhere
from unlabeled.evaluate.iterations import ahead
from unlabeled.evaluate.pck import areas, interval, pck, right
from unlabeled.evaluate.posed import Cutter, Objects, inside, outside, picture
from unlabeled.evaluate.regressor import Regressor
from unlabeled.evaluate.shares import share

BATCH = 64  # crops that are read and predicted at once


class Limits(NamedTuple):
    """What counts as right."""

    metric: str  # pck or pckh
    threshold: float  # share of an object's unit
    least: float  # visibility from which a key-point counts

    @property
    def name(self) -> str:
        """What the score is called."""
        return f"{self.metric}@{self.threshold:g}"


def predicted(network: Regressor, cutter: Cutter, found: Objects, subject: Subject) -> Tensor:
    """Key-points (N, K, 2) of every test object, in pixels of its image.

    Processes share the objects.
    """
    same_everywhere(network)  # running statistics
    mine = share(len(found))
    parts = torch.arange(mine.start, mine.stop).split(BATCH)
    places = []

    def read(part: Tensor) -> list[Any]:
        return [cutter(found, "test", i) for i in part.tolist()]

    for number, examples in enumerate(ahead(read, parts, most=4)):
        x = normalize(torch.stack([example.crop for example, _ in examples]))
        said = network(x.to(subject.device)).float().cpu()
        windows = [window for _, window in examples]
        places += [outside(p, w) for p, w in zip(said, windows, strict=True)]
        subject.progress("key-points", number + 1, len(parts))
    return mine.all(torch.stack(places), subject.device)


def scored(
    places: Tensor,
    found: Objects,
    names: Sequence[str],
    counted: Tensor,
    limits: Limits,
    seed: int,
) -> dict[str, tuple[float, tuple[float, float]]]:
    """Scores of places (N, K, 2) and their intervals: of each key-point, the area, and of all.

    Args:
        places: in pixels of the images.
        found: the objects.
        names: (K,) of key-points.
        counted: (K,) bool, those that are part of the score of all.
        limits: what is right.
        seed: of intervals.

    Raises:
        ValueError: no key-point counts.
    """
    errors = (places.double() - found.points[..., :2].double()).norm(dim=-1)
    known = found.points[..., 2] >= limits.least
    key = (seed, "keypoints", "bootstrap")
    made: dict[str, tuple[float, tuple[float, float]]] = {}
    chosen = {f"{n}/": torch.arange(len(names)) == k for k, n in enumerate(names)}
    chosen[""] = counted
    for prefix, columns in chosen.items():
        counts = known & columns
        if not bool(counts.any()):
            if prefix:
                continue  # a key-point that is given nowhere
            raise ValueError("none of the counted key-points is given in any test image")
        if not prefix:
            under = (areas(errors, found.units, limits.threshold) * counts).sum(1)
            value = (under.sum() / counts.sum()).item()
            made["auc"] = (value, interval(under, counts.sum(1), found.owner, *key))
        hits = (right(errors, found.units, limits.threshold) & counts).sum(1)
        value = pck(errors, counts, found.units, limits.threshold)
        made[prefix + limits.name] = (value, interval(hits, counts.sum(1), found.owner, *key))
    return made


def sheet(
    cutter: Cutter, found: Objects, places: Tensor, rows: Tensor, least: float, note: str
) -> dict[str, dict[str, Any]]:
    """Pictures of some test objects with true and predicted key-points."""
    if not len(rows):
        return {}
    columns: list[list[np.ndarray]] = [[], []]
    for i in rows.tolist():
        example, window = cutter(found, "test", i)
        counts = (example.points[:, 2:] >= least).float()
        true = torch.cat([example.points[:, :2], counts], 1)
        made = inside(torch.cat([places[i], counts], 1), window)
        columns[0].append(picture(example.crop, true, cross=False))
        columns[1].append(picture(example.crop, made, cross=True))
    return {
        "sheet": {
            "kind": "sheet",
            "title": "Key-points",
            "note": "Test objects with their true key-points (circles) and those predicted "
            f"(crosses), a colour each. {note}",
            "titles": np.array(["truth", "prediction"]),
            "column0": np.stack(columns[0]),
            "column1": np.stack(columns[1]),
        }
    }
