"""Linear support vector machines on frozen features, many at once.

Nothing here needs torch, so that the processes which train them start quickly.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

Array = np.ndarray
T = TypeVar("T")
EPS = 1e-5  # added to norms
SMALL = 1e8  # numbers of all jobs' machines: fewer are read before another process has started
MEMORY = 12 << 30  # bytes of all processes together; liblinear copies features, 16 bytes each


class Plane(NamedTuple):
    """A trained machine: x @ weight + bias > 0 where the class is."""

    weight: Array  # (d,)
    bias: float
    converged: bool


@dataclass(frozen=True)
class SVM:
    """How a machine is trained: scikit-learn's LinearSVC with Goyal et al.'s settings.

    The squared hinge loss with an L2 penalty, solved in the dual, positive images weighing
    twice.

    Args:
        seed: of the order in which images are visited.
        max_iter: most passes.
    """

    seed: int
    max_iter: int = 2000

    def fit(self, x: Array, y: Array, cost: float) -> Plane:
        """One machine on features (n, d) float64 and classes (n,) of 1 and -1."""
        from sklearn.svm import LinearSVC  # slow to import

        machine = LinearSVC(
            C=cost,
            class_weight={1: 2, -1: 1},
            penalty="l2",
            loss="squared_hinge",
            tol=1e-4,
            dual=True,  # type: ignore[arg-type]
            intercept_scaling=1.0,  # type: ignore[arg-type]
            max_iter=self.max_iter,
            random_state=self.seed,
        ).fit(x, y)
        done = int(np.max(machine.n_iter_)) < self.max_iter
        return Plane(machine.coef_[0], float(np.ravel(machine.intercept_)[0]), done)

    def held_out(self, x: Array, y: Array, cost: float, folds: int) -> float:
        """Mean average precision of each fold under the machine of the others.

        Folds are stratified and contiguous, as scikit-learn cuts them without shuffling.
        """
        from sklearn.metrics import average_precision_score
        from sklearn.model_selection import StratifiedKFold

        found = []
        for fit, rest in StratifiedKFold(folds).split(x, y):
            plane = self.fit(x[fit], y[fit], cost)
            scores = x[rest] @ plane.weight + plane.bias
            found.append(average_precision_score(y[rest] == 1, scores))
        return float(np.mean(found))


def validate(svm: SVM, x: Array, rows: Array, y: Array, cost: float, folds: int) -> float:
    """`SVM.held_out` of some rows of x, classes y: a job for `run`."""
    return svm.held_out(x[rows], y, cost, folds)


def fit(svm: SVM, x: Array, rows: Array, y: Array, cost: float) -> Plane:
    """`SVM.fit` on some rows of x, classes y: a job for `run`."""
    return svm.fit(x[rows], y, cost)


def checked(costs: Sequence[float], folds: int, max_iter: int, jobs: int | None) -> None:
    """Raises ValueError for settings that cannot be."""
    if not costs or min(costs) <= 0:
        raise ValueError(f"costs must list positive numbers, got {list(costs)}")
    for name, value, low in (("folds", folds, 2), ("max_iter", max_iter, 1)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1 process, or null, got {jobs}")


def unit(x: Array) -> Array:
    """Rows of length 1 (all but: `EPS` is added to their length), float64."""
    x = x.astype(np.float64)
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + EPS)


def compact(x: Array) -> tuple[Array, Array | None]:
    """Features z (n, n) and a basis q (d, n), x = z q', where there are fewer rows than columns.

    A machine depends on its features through their inner products alone, and those of z are
    those of x: a machine w of z is the machine q w of x, found in a fraction of the time. With
    as many columns or fewer, (x, None).
    """
    if len(x) >= x.shape[1]:
        return x, None
    q, r = np.linalg.qr(x.T)
    return np.ascontiguousarray(r.T), q


def expanded(plane: Plane, basis: Array | None) -> Plane:
    """A machine of compact features as one of the features themselves."""
    return plane if basis is None else plane._replace(weight=basis @ plane.weight)


def folds_of(y: Array, most: int) -> int:
    """How many folds both classes can fill; below 2 there is no cross-validation."""
    return int(min(most, (y == 1).sum(), (y == -1).sum()))


def run(
    jobs: Sequence[Callable[[], T]],
    size: int,
    *,
    each: int = 1,
    processes: int | None = None,
    done: Callable[[], Any] | None = None,
) -> list[T]:
    """The answers of all jobs, in their order, from several processes where that pays.

    Not threads: liblinear draws from one generator for all of them, so that answers would
    depend on who came first.

    Args:
        jobs: what to do; what they hold must be picklable.
        size: numbers in the features that one job reads.
        each: machines that one job trains.
        processes: at most so many; None: one per core, at most 8.
        done: called after each.
    """
    from joblib import Parallel, delayed
    from sklearn.exceptions import ConvergenceWarning

    many = min(_cores(), 8) if processes is None else processes
    many = max(1, min(many, len(jobs), int(MEMORY / (16 * max(1, size)))))
    answers: list[T] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted in the details
        if many == 1 or len(jobs) * each * size < SMALL:
            found: Any = (job() for job in jobs)
        else:
            found = Parallel(many, return_as="generator")(delayed(_quiet)(job) for job in jobs)
        for answer in found:
            answers.append(answer)
            if done:
                done()
    return answers


def _quiet(job: Callable[[], T]) -> T:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return job()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
