"""Average precision of detections by the rules of COCO and of Pascal VOC.

Both walk a class's detections from the highest score down and mark each as right, wrong or not
counted, at thresholds of intersection over union (IoU); precision over recall is then summed
up on a grid of recalls. They differ in three things:

- COCO (Lin et al., 2014) gives a detection the best box that is still free, VOC (Everingham
  et al., 2010) the best box of all, and a second detection of a box is wrong;
- a difficult box is COCO's crowd: a detection of which a large enough share lies inside is not
  counted. VOC does not count one whose best box it is, by IoU;
- COCO reads precision at 101 recalls, VOC2007 at 11.

VOC's boxes are of whole pixels, both ends inside, and its areas add 1 to each difference of
coordinates. Boxes here have their edges at the pixels' edges (see `unlabeled.truth`), where the
plain difference is that same number, so both rules share one IoU.

torchmetrics hands COCO's rule on to pycocotools, with which a test compares; it has none of VOC's,
nor resamples.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from unlabeled.draws import seed_of

IOUS = np.linspace(0.5, 0.95, 10)
# The devkit's 0:0.1:1 counts up to the middle and down from the end: 0.1 * 3 > 0.3, as there.
RECALLS = {
    "coco": np.linspace(0, 1, 101),
    "voc07": np.array([0.1 * i if i <= 5 else 1 - 0.1 * (10 - i) for i in range(11)]),
}
RIGHT, WRONG, UNCOUNTED = 1, 0, -1
MOST = 100  # detections of a class in one image, best first, that COCO counts


class Boxes(NamedTuple):
    """Boxes of one image: found ones with scores, true ones with `difficult` flags."""

    corners: np.ndarray  # (M, 4): left, top, right, bottom
    labels: np.ndarray  # (M,) int64
    extra: np.ndarray  # (M,) scores, or bool: difficult


def overlaps(found: np.ndarray, true: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU (D, G) of boxes (D, 4) and (G, 4); of a crowd, the share of the found box inside."""
    corner = np.maximum(found[:, None, :2], true[None, :, :2])
    sides = np.minimum(found[:, None, 2:], true[None, :, 2:]) - corner
    inside = sides.clip(min=0).prod(2)
    area = (found[:, 2:] - found[:, :2]).prod(1)
    union = area[:, None] + (true[:, 2:] - true[:, :2]).prod(1)[None] - inside
    return inside / np.where(crowd[None], area[:, None], union).clip(min=1e-12)


def marks_coco(found: np.ndarray, true: np.ndarray, difficult: np.ndarray) -> np.ndarray:
    """Marks (D, T) of one class's boxes in one image, found ones from the highest score down."""
    iou = overlaps(found, true, difficult)
    marks = np.full((len(found), len(IOUS)), WRONG, dtype=np.int8)
    free = np.ones((len(IOUS), len(true)), dtype=bool)
    for i in range(len(found)) if len(true) else ():
        fits = iou[i][None] >= np.minimum(IOUS, 1 - 1e-10)[:, None]
        for counted in (True, False):  # a box that counts is taken before a crowd
            open_ = fits & (~difficult[None] & free if counted else difficult[None])
            open_ &= (marks[i] == WRONG)[:, None]
            some = np.flatnonzero(open_.any(1))
            # Of equals the last, as pycocotools does.
            value = np.where(open_[some], iou[i][None], -1.0)[:, ::-1]
            best = len(true) - 1 - value.argmax(1)
            marks[i, some] = RIGHT if counted else UNCOUNTED
            if counted:
                free[some, best] = False
    return marks


def marks_voc(found: np.ndarray, true: np.ndarray, difficult: np.ndarray) -> np.ndarray:
    """Likewise, by the devkit's rule."""
    iou = overlaps(found, true, np.zeros(len(true), dtype=bool))
    marks = np.full((len(found), len(IOUS)), WRONG, dtype=np.int8)
    free = np.ones((len(IOUS), len(true)), dtype=bool)
    for i in range(len(found)) if len(true) else ():
        best = int(iou[i].argmax())
        fits = np.flatnonzero(iou[i, best] >= IOUS)
        if difficult[best]:
            marks[i, fits] = UNCOUNTED
        else:
            marks[i, fits] = np.where(free[fits, best], RIGHT, WRONG)
            free[fits, best] = False
    return marks


def average(
    marks: np.ndarray, weights: np.ndarray, positives: float, grid: np.ndarray
) -> np.ndarray:
    """Average precision (T,) of one class from marks (K, T) in falling order of the scores.

    Args:
        marks: of all images' detections.
        weights: (K,) how often each counts.
        positives: boxes to be found; 0 gives NaN, as of a class that is absent.
        grid: recalls (R,) at which the best precision of at least that recall is read.
    """
    if positives == 0:
        return np.full(marks.shape[1], np.nan)
    found = np.zeros(marks.shape[1])
    right = np.cumsum((marks == RIGHT) * weights[:, None], axis=0)
    wrong = np.cumsum((marks == WRONG) * weights[:, None], axis=0)
    precision = right / np.maximum(right + wrong, np.finfo(np.float64).eps)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recall = right / positives
    for t in range(marks.shape[1]):
        at = np.searchsorted(recall[:, t], grid, side="left")
        found[t] = precision[at[at < len(recall)], t].sum() / len(grid)
    return found


class BoxPrecision:
    """Collects images' detections, a byte per threshold and rule of each, and sums them up."""

    def __init__(self, classes: int) -> None:
        self.classes, self.images = classes, 0
        self.marks: dict[str, list[list[np.ndarray]]] = {
            rule: [[] for _ in range(classes)] for rule in RECALLS
        }
        self.scores: list[list[np.ndarray]] = [[] for _ in range(classes)]
        self.image_of: list[list[np.ndarray]] = [[] for _ in range(classes)]
        self.positives: list[list[tuple[int, int]]] = [[] for _ in range(classes)]

    def add(self, found: Boxes, true: Boxes) -> None:
        """One image; either may have no boxes."""
        for c in np.union1d(found.labels, true.labels).astype(int):
            mine, ours = found.labels == c, true.labels == c
            order = np.flatnonzero(mine)[np.argsort(-found.extra[mine], kind="stable")][:MOST]
            boxes, difficult = true.corners[ours], true.extra[ours].astype(bool)
            corners = found.corners[order].astype(np.float64)
            for rule, mark in (("coco", marks_coco), ("voc07", marks_voc)):
                self.marks[rule][c].append(mark(corners, boxes.astype(np.float64), difficult))
            self.scores[c].append(found.extra[order])
            self.image_of[c].append(np.full(len(order), self.images))
            self.positives[c].append((self.images, int((~difficult).sum())))
        self.images += 1

    def by_class(self, rule: str, weights: np.ndarray | None = None) -> np.ndarray:
        """Average precision (C, T) of every class at every IoU; NaN where it is absent."""
        return self._by_class(rule, [weights])[0]

    def mean(self, rule: str) -> dict[str, float]:
        """AP (mean over IoU .5 to .95), AP50 and AP75 over the classes that occur; 0 if none."""
        return _summary(self.by_class(rule))

    def intervals(
        self, rule: str, *key: int | str, resamples: int = 200
    ) -> Mapping[str, tuple[float, float]]:
        """95 % percentile intervals of `mean` over resampled images."""
        drawn = np.random.Generator(np.random.PCG64(seed_of(*key, self.images)))
        weights: list[np.ndarray | None] = [
            np.bincount(drawn.integers(self.images, size=self.images), minlength=self.images)
            for _ in range(resamples)
        ]
        found = [_summary(x) for x in self._by_class(rule, weights)]
        bounds = {}
        for name in found[0]:
            low, high = np.quantile([f[name] for f in found], [0.025, 0.975])
            bounds[name] = (float(low), float(high))
        return bounds

    def _by_class(self, rule: str, weights: Sequence[np.ndarray | None]) -> np.ndarray:
        """(len(weights), C, T)."""
        out = np.full((len(weights), self.classes, len(IOUS)), np.nan)
        for c in range(self.classes):
            if not self.positives[c]:
                continue
            order = np.argsort(-np.concatenate(self.scores[c]), kind="stable")
            marks = np.concatenate(self.marks[rule][c])[order]
            image_of = np.concatenate(self.image_of[c])[order]
            at, count = np.array(self.positives[c]).T
            for i, w in enumerate(weights):
                w = np.ones(self.images) if w is None else w
                out[i, c] = average(marks, w[image_of], float(w[at] @ count), RECALLS[rule])
        return out


def _summary(by_class: np.ndarray) -> dict[str, float]:
    known = by_class[~np.isnan(by_class).all(1)]
    mean = known.mean(0) if len(known) else np.zeros(len(IOUS))
    return {"AP": float(mean.mean()), "AP75": float(mean[5]), "AP50": float(mean[0])}
