"""Linear SVMs on frozen features of a few images of each class (Goyal et al., 2019)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from unlabeled.draws import seed_of
from unlabeled.evaluate import pooling as pools
from unlabeled.evaluate import svm as machines
from unlabeled.evaluate.contract import Data, Features, Request, Result, Shapes
from unlabeled.evaluate.fewshot import Answer
from unlabeled.evaluate.intervals import over_seeds
from unlabeled.evaluate.pooling import Pooling, Stages
from unlabeled.evaluate.svm import SVM, unit

Array = np.ndarray


class Curve(ABC):
    """What both have in common: settings, draws, costs and the curve over k.

    Every draw picks other training images, the same for all stages and for the baselines. A
    class with fewer than k images gives all it has, which the details say; a k that no class
    has is left out.

    Args:
        k: numbers of images.
        draws: of images, for each k; scores are means over them.
        costs: to choose among.
        selection: "cv": the cost by cross-validation within the drawn images, with a single
            image of a class the middle of the list; "test": the cost with the best mean over
            draws on the test images, as published, which the scores' names say.
        folds: of the cross-validation.
        max_iter: most passes of a machine over its images.
        stages: "all", so many of the deepest, or names.
        pooling: "published" windows where a map is one of ResNet-50's at 224 pixels, or
            "adaptive" cells of the same number.
        max_features: of a stage, where there is no published window.
        jobs: processes; null: one per core, at most 8.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})
    metric: ClassVar[str]
    name: ClassVar[str]
    protocol: ClassVar[str]
    title: ClassVar[str]

    def __init__(
        self,
        *,
        k: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 96),
        draws: int = 5,
        costs: Sequence[float] = (0.01, 0.1, 1.0, 10.0, 100.0),
        selection: Literal["cv", "test"] = "cv",
        folds: int = 3,
        max_iter: int = 2000,
        stages: Stages = 2,
        pooling: Pooling = "published",
        max_features: int = 9216,
        jobs: int | None = None,
        data: Data | None = None,
    ) -> None:
        pools.checked(stages, pooling, max_features)
        machines.checked(costs, folds, max_iter, jobs)
        if not k or min(k) < 1:
            raise ValueError(f"k must list numbers of images of at least 1, got {list(k)}")
        if draws < 2:
            raise ValueError(f"draws must be at least 2, for a deviation, got {draws}")
        if selection not in ("cv", "test"):
            raise ValueError(f"selection must be cv or test, got {selection!r}")
        self.k, self.draws, self.selection = tuple(sorted(set(k))), draws, selection
        self.costs = tuple(sorted(map(float, costs)))
        self.folds, self.max_iter, self.jobs = folds, max_iter, jobs
        self.stages: Stages = stages if isinstance(stages, str | int) else tuple(stages)
        self.pooling: Pooling = pooling
        self.max_features, self.data = max_features, data

    def requests(self, shapes: Shapes) -> set[Request]:
        return set(self._requests(shapes))

    def _requests(self, shapes: Shapes) -> list[Request]:
        return pools.pooled(shapes, self.stages, self.pooling, self.max_features)

    @abstractmethod
    def counts(self, features: Features) -> Array:
        """(C,) training images of each class."""

    @abstractmethod
    def picks(self, features: Features, draw: int, k: int) -> list[tuple[Array, Array, Any]]:
        """(rows, their classes, what is to be told of the test images) of every job of a draw."""

    def classes_each(self, features: Features) -> int:
        """How many classes a job learns."""
        return 1

    @abstractmethod
    def job(self) -> Callable[..., Answer]:
        """What is done with (machine, features, test features, pick ...): see `fewshot`."""

    def __call__(self, features: Features) -> Result:
        counts = self.counts(features)
        ks = [k for k in self.k if k <= counts.max()]
        if not ks:
            raise ValueError(f"k={list(self.k)}: no class has more than {counts.max()} images")
        requests, made = self._requests(features.shapes), 0
        total = len(requests) * len(ks)

        scores: dict[str, float] = {}
        details: dict[str, dict[str, Any]] = {}
        curve = {request.stage: np.empty((2, len(ks))) for request in requests}
        for request in requests:
            test = _unit(features.splits["test"][request])
            for i, k in enumerate(ks):
                answers = self._answers(features, request, test, k)
                values, chosen = self._values(answers)
                made += 1
                features.progress("low-shot machines", made, total)
                mean, (low, high) = over_seeds(values.tolist())
                curve[request.stage][:, i] = mean, values.std(ddof=1)
                name = self._score(request.stage, k)
                scores[name] = mean
                details[name] = {
                    **self._details(features, request),
                    "k": k,
                    "draws": values.tolist(),
                    "std": float(values.std(ddof=1)),
                    "ci95": [max(0.0, low), min(1.0, high)],
                    "interval": "Student's t over draws of the training images",
                    "n": len(test),
                    "cost": chosen,
                    "not_converged": sum(a.unconverged for row in answers for a in row),
                    "classes_with_fewer": {
                        str(features.data.classes[c]): int(n) for c, n in enumerate(counts) if n < k
                    },
                    "k_left_out": [k for k in self.k if k not in ks],
                }
        return Result(scores, details, {}, {"curve": self._figure(ks, curve)})

    def _score(self, stage: str, k: int) -> str:
        suffix = "" if self.selection == "cv" else "_cost_chosen_on_test"
        return f"{stage}/k{k}/{self.metric}{suffix}"

    def _answers(
        self, features: Features, request: Request, test: Array, k: int
    ) -> list[list[Answer]]:
        """What every job of every draw of k images says."""
        picks = [self.picks(features, draw, k) for draw in range(self.draws)]
        used = np.unique(np.concatenate([rows for each in picks for rows, _, _ in each]))
        x = _unit(features.splits["train"][request][used])
        svm = SVM(seed_of(features.seed, self.name) % 2**31, self.max_iter)
        settings = (self.costs, self.folds if self.selection == "cv" else 0)
        jobs = [
            partial(self.job(), svm, x, test, np.searchsorted(used, rows), y, truth, *settings)
            for each in picks
            for rows, y, truth in each
        ]
        largest = max(len(rows) for each in picks for rows, _, _ in each)
        machines_each = len(self.costs) * (self.folds + 1) * self.classes_each(features)
        found = machines.run(jobs, largest * x.shape[1], each=machines_each, processes=self.jobs)
        per_draw = len(jobs) // self.draws
        return [found[i : i + per_draw] for i in range(0, len(found), per_draw)]

    def _values(self, answers: list[list[Answer]]) -> tuple[Array, Any]:
        """The score of every draw (draws,), and the cost, or how often each was chosen."""
        table = np.array([[answer.scores for answer in row] for row in answers])
        means = np.nanmean(table, axis=1)  # over classes; (draws, costs or 1)
        if self.selection == "test":
            best = int(means.mean(0).argmax())
            return means[:, best], self.costs[best]
        places = [answer.chosen for row in answers for answer in row]
        return means[:, 0], {f"{cost:g}": places.count(i) for i, cost in enumerate(self.costs)}

    def _details(self, features: Features, request: Request) -> dict[str, Any]:
        return {
            "protocol": self.protocol,
            "stage": request.stage,
            "hyperparameters": {
                "costs": list(self.costs),
                "folds": self.folds,
                "max_iter": self.max_iter,
                "pooling": pools.said(request),
                "features": features.splits["train"][request][0].numel(),
            },
            "selection": "the cost with the best mean over draws on the TEST images, as published"
            if self.selection == "test"
            else f"cost by {self.folds}-fold cross-validation within the drawn images; with one "
            "image of a class, the middle of the list",
        }

    def _figure(self, ks: Sequence[int], curve: dict[str, Array]) -> dict[str, Any]:
        mean, std = np.stack(list(curve.values()), axis=1)
        ylabel = {"map": "mAP", "top1": "top-1 accuracy"}[self.metric] + (
            " (cost chosen on test)" if self.selection == "test" else ""
        )
        return {
            "kind": np.array("curves"),
            "title": np.array(self.title),
            "note": np.array(f"Mean of {self.draws} draws; the band is one standard deviation."),
            "x": np.array(ks),
            "names": np.array(list(curve)),
            "scores": np.array([[self._score(stage, k) for k in ks] for stage in curve]),
            "y": mean,
            "low": mean - std,
            "high": mean + std,
            "xlabel": np.array("positive images per class"),
            "ylabel": np.array(ylabel),
            "log": np.array(True),
            "percent": np.array(True),
        }


def _unit(x: Tensor) -> Array:
    """`svm.unit` as float32, which a large test set still fits into."""
    return np.concatenate(
        [unit(part.flatten(1).float().numpy()).astype(np.float32) for part in x.split(8192)]
    )
