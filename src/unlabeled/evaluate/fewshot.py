"""The jobs of low-shot classification: what one process learns from one draw, without torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unlabeled.evaluate.precision import average_precision
from unlabeled.evaluate.svm import SVM, Plane, compact, expanded, folds_of

Array = np.ndarray
CHUNK = 8192  # test images at a time
AREA = 2  # the place of the benchmark's definition of average precision


class Answer(NamedTuple):
    """How well the machines of a draw do on the test images."""

    scores: list[float]  # of each cost, or of the chosen one alone
    chosen: int  # its place; -1 if none was chosen
    unconverged: int  # machines that reached their last pass


def one_class(
    svm: SVM, x: Array, test: Array, rows: Array, y: Array, marks: Array,
    costs: Sequence[float], folds: int,
) -> Answer:  # fmt: skip
    """Average precision of one class.

    Args:
        svm: settings.
        x: (N, d) float32 training features.
        test: (n, d) float32.
        rows: those of x that were drawn.
        y: their classes, 1 or -1.
        marks: (n,) 1, -1, or 0 where a test image does not count.
        costs: of the machines.
        folds: to choose the cost by; 0: one score for each cost.
    """
    z, basis = compact(x[rows].astype(np.float64))
    chosen = -1
    if folds:
        chosen, parts = len(costs) // 2, folds_of(y, folds)
        if parts > 1:
            chosen = int(np.argmax([svm.held_out(z, y, cost, parts) for cost in costs]))
    planes = [svm.fit(z, y, cost) for cost in (costs if chosen < 0 else [costs[chosen]])]
    ranking = _decisions(test, [expanded(plane, basis) for plane in planes])
    counts = marks != 0
    scores = [average_precision(s[counts], marks[counts] == 1)[AREA, 0].item() for s in ranking.T]
    return Answer(scores, chosen, sum(not plane.converged for plane in planes))


def whole(
    svm: SVM, x: Array, test: Array, rows: Array, y: Array, truth: Array,
    costs: Sequence[float], folds: int,
) -> Answer:  # fmt: skip
    """Top-1 accuracy of all classes together; y and truth are numbers of classes.

    The other arguments are those of `one_class`.
    """
    from sklearn.model_selection import StratifiedKFold

    z, basis = compact(x[rows].astype(np.float64))
    kinds, unconverged = np.unique(y), 0

    def machines(part: Array, cost: float) -> list[Plane]:
        return [svm.fit(z[part], np.where(y[part] == c, 1, -1), cost) for c in kinds]

    chosen = -1
    if folds:
        chosen, parts = len(costs) // 2, min(folds, int(np.bincount(y)[kinds].min()))
        if parts > 1:
            right = np.zeros(len(costs))
            for fit, rest in StratifiedKFold(parts).split(z, y):
                for i, cost in enumerate(costs):
                    found = kinds[_decisions(z[rest], machines(fit, cost)).argmax(1)]
                    right[i] += (found == y[rest]).sum()
            chosen = int(right.argmax())
    scores = []
    for cost in costs if chosen < 0 else [costs[chosen]]:
        planes = machines(np.arange(len(y)), cost)
        unconverged += sum(not plane.converged for plane in planes)
        found = kinds[_decisions(test, [expanded(p, basis) for p in planes]).argmax(1)]
        scores.append(float((found == truth).mean()))
    return Answer(scores, chosen, unconverged)


def _decisions(x: Array, planes: Sequence[Plane]) -> Array:
    """(n, planes) float64."""
    weight = np.stack([plane.weight for plane in planes], axis=1)
    bias = np.array([plane.bias for plane in planes])
    parts = range(0, len(x), CHUNK)
    return np.concatenate([x[i : i + CHUNK].astype(np.float64) @ weight + bias for i in parts])
