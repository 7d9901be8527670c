"""Official splits, evaluated one after the other: the mean over them and its interval."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unlabeled.draws import seed_of
from unlabeled.evaluate.contract import Result
from unlabeled.evaluate.intervals import percentiles

RESAMPLES = 1000


def distinct(folds: Sequence[int]) -> tuple[int, ...]:
    """The numbers of the splits. Raises ValueError if one is named twice."""
    if len(set(folds)) < len(folds):
        raise ValueError(f"folds names a split twice: {[*folds]}")
    return tuple(folds)


def missing(folds: Sequence[int], data: Any) -> str | None:
    """Why a data module of recordings has no such splits, if it has none."""
    if folds and not hasattr(data.layout, "fold"):
        return f"these data have no official splits {[*folds]}: set folds=[]"
    return None


def together(found: Mapping[int, Result], *key: int | str) -> Result:
    """One result of those of several splits, by their numbers.

    Each score is the mean over splits; its interval is over test recordings, resampled within
    each split. Details are those of the first split, with what every split has.

    Args:
        found: with `per_image` of every score, and `hyperparameters` and `tried` in its details.
        key: names the draw of the interval.
    """
    first = next(iter(found.values()))
    scores, details = {}, {}
    for name, known in first.details.items():
        each = {n: r.per_image[name].double() for n, r in found.items()}
        means = {n: x.mean().item() for n, x in each.items()}
        scores[name] = sum(means.values()) / len(means)
        details[name] = {
            **known,
            "by_fold": means,
            "hyperparameters_by_fold": {
                n: r.details[name]["hyperparameters"] for n, r in found.items()
            },
            "tried": {n: r.details[name]["tried"] for n, r in found.items()},
            "n": sum(len(x) for x in each.values()),
            "ci95": list(_interval([*each.values()], *key)),
        }
    return Result(scores, details, {})


def _interval(each: Sequence[Tensor], *key: int | str) -> tuple[float, float]:
    """Of the mean over splits of the means over recordings (n,) of each."""
    generator = torch.Generator().manual_seed(seed_of(*key))
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    for x in each:
        for i in range(RESAMPLES):
            drawn = torch.randint(len(x), (len(x),), generator=generator)
            means[i] += x[drawn].mean() / len(each)
    return percentiles(means.tolist())
