"""Low-shot classification: of VOC's images with several classes, and of images with one."""

from collections.abc import Callable
from typing import Any

import numpy as np

from unlabeled.draws import shuffled
from unlabeled.evaluate.contract import Features
from unlabeled.evaluate.fewshot import Answer, one_class, whole
from unlabeled.evaluate.lowshot_curve import Curve
from unlabeled.evaluate.svm_voc07 import no_presence, presence

Array = np.ndarray


class LowShotVOC07(Curve):
    """k positive images of each class and k for every other class without it; mAP.

    For each class on its own, k images that show it and 19 k that do not, those with difficult
    objects only being neither. Average precision is the area under the interpolated curve. The
    arguments are those of `Curve`.
    """

    needs_labels = False
    metric, name, title = "map", "lowshot_voc07", "Low-shot classification of VOC"
    protocol = "one-versus-rest linear SVMs on k positive and (C - 1) k negative images, mAP"

    def obstacle(self, data: Any) -> str | None:
        """Why these data have no mAP."""
        return no_presence(data)

    def counts(self, features: Features) -> Array:
        return (presence(features, "train") == 1).sum(0)

    def picks(self, features: Features, draw: int, k: int) -> list[tuple[Array, Array, Any]]:
        known, test = presence(features, "train"), presence(features, "test")
        found = []
        for c in range(known.shape[1]):
            key = (features.seed, self.name, draw, k, c)
            present = _some(np.flatnonzero(known[:, c] == 1), k, *key, "present")
            absent = np.flatnonzero(known[:, c] == -1)
            absent = _some(absent, (known.shape[1] - 1) * k, *key, "absent")
            y = np.repeat([1, -1], [len(present), len(absent)])
            if len(present) and len(absent) and (test[:, c] == 1).any():
                found.append((np.concatenate([present, absent]), y, test[:, c]))
        if not found:
            raise ValueError("no class has both training and positive test images: there is no mAP")
        return found

    def job(self) -> Callable[..., Answer]:
        return one_class


class LowShot(Curve):
    """k images of each class, for data whose images have one class; top-1 accuracy.

    A machine for each class against the others; the class whose machine is surest is predicted.
    The arguments are those of `Curve`.
    """

    metric, name, title = "top1", "lowshot", "Low-shot classification"
    protocol = "one-versus-rest linear SVMs on k images of each class, top-1 accuracy"

    def counts(self, features: Features) -> Array:
        return features.labels["train"].bincount(minlength=features.classes).numpy()

    def picks(self, features: Features, draw: int, k: int) -> list[tuple[Array, Array, Any]]:
        y = features.labels["train"].numpy()
        key = (features.seed, self.name, draw, k)
        rows = [_some(np.flatnonzero(y == c), k, *key, int(c)) for c in np.unique(y)]
        rows = np.concatenate(rows)
        return [(rows, y[rows], features.labels["test"].numpy())]

    def classes_each(self, features: Features) -> int:
        return features.classes

    def job(self) -> Callable[..., Answer]:
        return whole


def _some(rows: Array, n: int, *key: int | str) -> Array:
    """n of the rows, all if there are fewer, by the key."""
    return rows[shuffled(len(rows), *key)[:n].numpy()]
