"""Linear SVMs for the classes of VOC 2007 on frozen features (Goyal et al., 2019)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from unlabeled.draws import seed_of
from unlabeled.evaluate import pooling as pools
from unlabeled.evaluate import svm as machines
from unlabeled.evaluate.contract import Data, Features, Request, Result, Shapes
from unlabeled.evaluate.pooling import Pooling, Stages
from unlabeled.evaluate.precision import DEFINITIONS, mean_average_precision, resamples
from unlabeled.evaluate.svm import SVM, Plane, compact, expanded, folds_of, unit
from unlabeled.truth import Annotated

Array = np.ndarray
CHUNK = 1024  # test images at a time


class Learned(NamedTuple):
    """The machines of one stage."""

    planes: dict[int, Plane]  # by class; classes without two kinds of training images have none
    costs: dict[int, float]
    held_out: Array  # (C, costs) mean average precision of the folds, NaN without folds


class SVMVOC07:
    """One-versus-rest linear SVMs on the pooled, L2-normalised features of every stage; mAP.

    For each class, the cost with the best mean average precision under cross-validation on the
    training images trains the machine that is tested. A class with too few training images for
    two folds takes the cost that is best for the others on average. Scores are the mean over
    classes of average precision under its three definitions: `map` is the benchmark's, the area
    under the interpolated curve.

    Args:
        stages: "all", so many of the deepest, or names.
        costs: to choose among.
        folds: of the cross-validation.
        max_iter: most passes of a machine over its images.
        difficult: of training images that show a class in difficult objects only: "ignore"
            leaves them out of its machine, "negative" takes them for images without it, as both
            published codes do. In tests they are left out.
        pooling: "published" windows where a map is one of ResNet-50's at 224 pixels, or
            "adaptive" cells of the same number.
        max_features: of a stage, where there is no published window.
        jobs: processes; null: one per core, at most 8.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})
    needs_labels = False

    def __init__(
        self,
        *,
        stages: Stages = "all",
        costs: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
        folds: int = 3,
        max_iter: int = 2000,
        difficult: Literal["ignore", "negative"] = "ignore",
        pooling: Pooling = "published",
        max_features: int = 9216,
        jobs: int | None = None,
        data: Data | None = None,
    ) -> None:
        pools.checked(stages, pooling, max_features)
        machines.checked(costs, folds, max_iter, jobs)
        if difficult not in ("ignore", "negative"):
            raise ValueError(f"difficult must be ignore or negative, got {difficult!r}")
        self.stages: Stages = stages if isinstance(stages, str | int) else tuple(stages)
        self.costs = tuple(sorted(map(float, costs)))
        self.folds, self.max_iter, self.jobs = folds, max_iter, jobs
        self.difficult = difficult
        self.pooling: Pooling = pooling
        self.max_features, self.data = max_features, data

    def obstacle(self, data: Any) -> str | None:
        """Why these data have no mAP."""
        return no_presence(data)

    def requests(self, shapes: Shapes) -> set[Request]:
        return set(self._requests(shapes))

    def _requests(self, shapes: Shapes) -> list[Request]:
        return pools.pooled(shapes, self.stages, self.pooling, self.max_features)

    def __call__(self, features: Features) -> Result:
        train, test = (presence(features, split) for split in ("train", "test"))
        requests = self._requests(features.shapes)
        drawn = resamples(len(test), features.seed, "svm_voc07", "bootstrap")
        total, done = len(requests) * train.shape[1] * (len(self.costs) + 1), 0

        def tick() -> None:
            nonlocal done
            done = min(done + 1, total)
            features.progress("support vector machines", done, total)

        learned = {r: self._learn(features, r, train, tick) for r in requests}
        means = {r: _mean(found.held_out.max(1)) for r, found in learned.items()}
        best = max(requests, key=lambda r: means[r]).stage
        scores: dict[str, float] = {}
        details: dict[str, dict[str, Any]] = {}
        for request, found in learned.items():
            x = features.splits["test"][request]
            ranking = dict(
                zip(found.planes, decisions(x, list(found.planes.values())), strict=True)
            )
            values, spread, single = mean_average_precision(ranking, test, drawn)
            common = self._details(features, request, found, best, list(single))
            for place, (kind, value) in enumerate(values.items()):
                name = f"{request.stage}/{kind}"
                own = {features.data.classes[c]: ap[place] for c, ap in single.items()}
                scores[name] = value
                details[name] = {
                    **common,
                    "definition": DEFINITIONS[kind],
                    "average_precision": own,
                    "ci95": spread[kind],
                    "interval": "bootstrap over test images",
                    "n": len(test),
                }
        return Result(scores, details, {})

    def _learn(
        self, features: Features, request: Request, known: Array, tick: Callable[[], None]
    ) -> Learned:
        x, basis = compact(unit(features.splits["train"][request].flatten(1).float().numpy()))
        svm = SVM(seed_of(features.seed, "svm_voc07") % 2**31, self.max_iter)
        sides: dict[int, tuple[Array, Array]] = {}
        for c in range(known.shape[1]):
            counts = known[:, c] != 0 if self.difficult == "ignore" else known[:, c] < 2
            rows = np.flatnonzero(counts)
            y = np.where(known[rows, c] == 1, 1, -1)
            if folds_of(y, 1):
                sides[c] = rows, y
        run = partial(machines.run, size=x.size, each=self.folds, processes=self.jobs, done=tick)
        folds = {c: folds_of(y, self.folds) for c, (_, y) in sides.items()}
        tried = [(c, i) for c in sides if folds[c] > 1 for i in range(len(self.costs))]
        held_out = np.full((known.shape[1], len(self.costs)), np.nan)
        jobs = [
            partial(machines.validate, svm, x, *sides[c], self.costs[i], folds[c]) for c, i in tried
        ]
        for (c, i), value in zip(tried, run(jobs), strict=True):
            held_out[c, i] = value
        chosen = {c: self.costs[place] for c, place in best_costs(held_out).items() if c in sides}
        run = partial(machines.run, size=x.size, processes=self.jobs, done=tick)
        planes = run([partial(machines.fit, svm, x, *sides[c], chosen[c]) for c in sides])
        whole = {c: expanded(plane, basis) for c, plane in zip(sides, planes, strict=True)}
        return Learned(whole, chosen, held_out)

    def _details(
        self, features: Features, request: Request, found: Learned, best: str, tested: list[int]
    ) -> dict[str, Any]:
        names = list(features.data.classes)
        return {
            "protocol": "one-versus-rest linear SVMs on frozen, L2-normalised features, mAP",
            "stage": request.stage,
            "hyperparameters": {
                "costs": list(self.costs),
                "folds": self.folds,
                "max_iter": self.max_iter,
                "difficult": f"{self.difficult} in training, left out in testing",
                "pooling": pools.said(request),
                "features": features.splits["train"][request][0].numel(),
            },
            "selection": f"cost of each class with the best mean average precision of {self.folds}"
            "-fold cross-validation on the training images",
            "cost": {names[c]: cost for c, cost in found.costs.items()},
            "tried": [
                {"cost": cost, "held_out_map": _mean(found.held_out[:, i])}
                for i, cost in enumerate(self.costs)
            ],
            "best_stage": best,  # by the same cross-validation
            "classes_left_out": [name for c, name in enumerate(names) if c not in tested],
            "not_converged": [names[c] for c, p in found.planes.items() if not p.converged],
        }


def no_presence(data: Any) -> str | None:
    """Why data do not say which classes their images show, if they do not."""
    for split in ("train", "test"):
        if not isinstance(data, Annotated) or "presence" not in data.kinds(split):
            return (
                f"the {split} images have no annotation `presence`, the classes each of them "
                "shows; data=voc07 has it"
            )
    return None


def presence(features: Features, split: str) -> Array:
    """(n, C) int64: 1, -1, or 0 where an image does not count for a class."""
    return features.data.annotation(split, "presence").stacked().numpy()


def best_costs(held_out: Array) -> dict[int, int]:
    """The place of the best cost of every class (C, costs), the first of equals.

    Without values a class takes what is best for the others on average, and if there are none
    the middle.
    """
    known = held_out[np.isfinite(held_out).all(axis=1)]
    shared = int(known.mean(0).argmax()) if len(known) else held_out.shape[1] // 2
    return {
        c: int(row.argmax()) if np.isfinite(row).all() else shared for c, row in enumerate(held_out)
    }


def decisions(x: Tensor, planes: Sequence[Plane]) -> Array:
    """(planes, n) float64: on which side of each plane, and how far, every image is."""
    weight = np.stack([plane.weight for plane in planes], axis=1)
    bias = np.array([plane.bias for plane in planes])
    parts = [unit(part.flatten(1).float().numpy()) @ weight + bias for part in x.split(CHUNK)]
    return np.concatenate(parts).T


def _mean(values: Array) -> float:
    """Over what is known; 0 where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0
