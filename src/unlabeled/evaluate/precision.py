"""Average precision under the three definitions in use, and intervals of its mean.

torchmetrics has the first definition only, and no weights, which is what resamples are.
"""

from collections.abc import Mapping

import numpy as np

Array = np.ndarray
CHUNK = 8_000_000  # numbers of one array where many resamples are scored at once
DEFINITIONS = {
    "map_stepwise": "sum of precision times the gain in recall, as scikit-learn's "
    "average_precision_score",
    "map_11point": "mean of the best precision at a recall of at least 0, 0.1 ... 1 (VOC 2007)",
    "map": "area under the interpolated precision-recall curve (VOC 2010 and later)",
}


def average_precision(scores: Array, positive: Array, weights: Array | None = None) -> Array:
    """Average precision of a ranking under each of `DEFINITIONS`, in that order: (3, R) float64.

    Images with equal scores come in together, whatever their order, so there is a point of the
    curve for each different score; without ties that is the devkit's curve. NaN where there is
    no positive image.

    Args:
        scores: (n,) higher is more likely.
        positive: (n,) bool. Images that do not count must be left out.
        weights: (R, n) how often each image counts, e.g. in resamples; None: once, and R is 1.

    Raises:
        ValueError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise ValueError("a score is NaN, which has no place in a ranking")
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)])
    every = max(1, CHUNK // max(1, len(scores)))
    parts = []
    for start in range(0, len(weights), every):
        w = weights[start : start + every, order].astype(np.float64)
        seen = w.cumsum(1)[:, last]
        right = (w * positive[order]).cumsum(1)[:, last]
        parts.append(_areas(right, seen, (w * positive[order]).sum(1)))
    return np.concatenate(parts, axis=1)


def _areas(right: Array, seen: Array, total: Array) -> Array:
    """From true and all positives (R, points) at falling thresholds, and all there are (R,)."""
    precision = np.divide(right, seen, out=np.zeros_like(right), where=seen > 0)
    gain = np.diff(right, axis=1, prepend=0.0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    stepwise, area = (gain * precision).sum(1), (gain * best).sum(1)
    points = np.zeros(len(right))
    for tenth in range(11):  # whole numbers: 3 of 10 is a recall of 0.3, which 3 * 0.1 is not
        reached = 10 * right >= tenth * total[:, None]
        points += np.where(reached, precision, 0.0).max(axis=1, initial=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.stack([stepwise / total, points / 11, area / total])
    found[:, total == 0] = np.nan
    return found


def resamples(n: int, *key: int | str, count: int = 1000) -> Array:
    """(count, n) uint16: how often each of n images is drawn when n are, with replacement."""
    from unlabeled.draws import seed_of  # needs torch, which processes of machines do without

    generator = np.random.default_rng(seed_of(*key, n))
    drawn = np.empty((count, n), dtype=np.uint16)
    for row in drawn:
        row[:] = np.bincount(generator.integers(n, size=n), minlength=n)
    return drawn


def mean_average_precision(
    scores: Mapping[int, Array], presence: Array, drawn: Array
) -> tuple[dict[str, float], dict[str, list[float]], dict[int, list[float]]]:
    """mAP, its 95 % interval over resampled images, and every class's average precisions.

    Args:
        scores: (n,) by class; classes without scores are left out.
        presence: (n, C): 1, -1, or 0 where an image does not count for a class.
        drawn: (R, n), of `resamples`.

    Returns:
        By definition, the mean over classes with a positive image; its interval, in whose
        resamples a class without a positive image is left out of the mean; by class, the values
        under `DEFINITIONS`.

    Raises:
        ValueError: no class has both scores and a positive image.
    """
    single, many = {}, []
    for kind, ranking in scores.items():
        counts = presence[:, kind] != 0
        positive = presence[counts, kind] == 1
        if not positive.any():
            continue
        single[kind] = average_precision(ranking[counts], positive)[:, 0].tolist()
        many.append(average_precision(ranking[counts], positive, drawn[:, counts]))
    if not single:
        raise ValueError("no class with a positive test image was learned: there is no mAP")
    means = np.mean(list(single.values()), axis=0)
    spread = np.nanquantile(np.nanmean(many, axis=0), [0.025, 0.975], axis=1)
    values = dict(zip(DEFINITIONS, means.tolist(), strict=True))
    return values, dict(zip(DEFINITIONS, spread.T.tolist(), strict=True)), single
