"""How far k-means of frozen features agrees with the classes.

Indices are of tables: torchmetrics' are of lists of labels, and a thousand resamples of a large
data set take it minutes.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.draws import seed_of
from unlabeled.evaluate.contract import Data, Features, Request, Result, Shapes
from unlabeled.evaluate.intervals import percentiles
from unlabeled.parts.clustering import kmeans_alone

RESAMPLES = 1000


class Clustering:
    """Normalised mutual information, adjusted Rand index and Hungarian accuracy.

    The images of one split are clustered by k-means, of several starts the one with the least
    distortion, and compared with their labels, which k-means never sees. Accuracy is the share
    of images in the cluster that stands for their class, under the one-to-one matching of
    clusters with classes that makes it largest (Kuhn, 1955): with more clusters than classes the
    others count as wrong.

    Args:
        clusters: k; None: the number of classes.
        stage: whose average-pooled features are clustered; "final" is the backbone's output.
        split: whose images.
        normalize: scale features to unit length first.
        iterations: of k-means.
        starts: of k-means.
        data: another data module than the run's.
    """

    def __init__(
        self,
        *,
        clusters: int | None = None,
        stage: str = "final",
        split: Literal["train", "test"] = "test",
        normalize: bool = True,
        iterations: int = 50,
        starts: int = 5,
        data: Data | None = None,
    ) -> None:
        for name, value in (
            *(("clusters", 2 if clusters is None else clusters), ("iterations", iterations)),
            ("starts", starts),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if split not in ("train", "test"):
            raise ValueError(f"split must be train or test, got {split!r}")
        self.clusters, self.stage, self.split, self.data = clusters, stage, split, data
        self.normalize, self.iterations, self.starts = normalize, iterations, starts
        self.splits = frozenset({split})

    def obstacle(self, data: Data) -> str | None:
        """Why these data cannot be clustered."""
        k = self.clusters or len(data.classes)
        n = data.size(self.split)
        return f"{n} images cannot make {k} clusters" if n < k else None

    def requests(self, shapes: Shapes) -> set[Request]:
        return {shapes.named(self.stage)}

    def __call__(self, features: Features) -> Result:
        request = features.shapes.named(self.stage)
        x = features.splits[self.split][request].flatten(1).float()
        y = features.labels[self.split]
        k = self.clusters or features.classes
        x = F.normalize(x, dim=1) if self.normalize else x
        found = self._assign(x, k, features)
        table = contingency(found, y, k, features.classes)
        right = matched(table)[found] == y
        values = {"nmi": nmi(table), "ari": ari(table), "accuracy": right.double().mean().item()}
        # Resampled images change the table as a multinomial draw of its cells does.
        generator = np.random.default_rng(seed_of(features.seed, "clustering", "bootstrap"))
        cells = generator.multinomial(len(y), (table / table.sum()).ravel(), RESAMPLES)
        drawn = cells.reshape(RESAMPLES, *table.shape)
        spread = {
            "nmi": percentiles([nmi(t) for t in drawn]),
            "ari": percentiles([ari(t) for t in drawn]),
        }
        details: dict[str, dict[str, Any]] = {
            f"k{k}/{name}": {
                "protocol": f"k-means of the {self.split} images' features",
                "stage": request.stage,
                "hyperparameters": {
                    "clusters": k,
                    "normalize": self.normalize,
                    "iterations": self.iterations,
                    "starts": self.starts,
                },
                "selection": "of several starts the one with the least distortion, without labels",
                **({"ci95": list(spread[name]), "n": len(y)} if name in spread else {}),
            }
            for name in values
        }
        scores = {f"k{k}/{name}": value for name, value in values.items()}
        return Result(scores, details, {f"k{k}/accuracy": right})

    def _assign(self, x: Tensor, k: int, features: Features) -> Tensor:
        best, least = torch.zeros(len(x), dtype=torch.int64), float("inf")
        for start in range(self.starts):
            seed = seed_of(features.seed, "clustering", start) % 2**31
            labels, centroids = kmeans_alone(x, k, iterations=self.iterations, seed=seed)
            # Chunks: n x d differences of a whole ImageNet would not fit.
            pieces = zip(x.split(1 << 16), labels.split(1 << 16), strict=True)
            distortion = sum(
                float((a.double() - centroids[b].double()).square().sum()) for a, b in pieces
            )
            if distortion < least:
                best, least = labels, distortion
            features.progress("clustering", start + 1, self.starts)
        return best


def contingency(clusters: Tensor, labels: Tensor, k: int, classes: int) -> np.ndarray:
    """(k, classes) numbers of images."""
    return (clusters * classes + labels).bincount(minlength=k * classes).view(k, classes).numpy()


def matched(table: np.ndarray) -> Tensor:
    """(k,) int64: the class that each cluster stands for, -1 for those left over."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    rows, columns = linear_sum_assignment(table, maximize=True)
    found = torch.full((len(table),), -1)
    found[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found


def nmi(table: np.ndarray) -> float:
    """Mutual information over the mean of both entropies; 1 where both partitions are trivial."""
    p = table / table.sum()
    rows, columns = p.sum(1), p.sum(0)
    h = _entropy(rows), _entropy(columns)
    if h[0] == 0 and h[1] == 0:
        return 1.0
    return max(0.0, 2 * (h[0] + h[1] - _entropy(p.ravel())) / (h[0] + h[1]))


def ari(table: np.ndarray) -> float:
    """Agreement of pairs beyond chance (Hubert and Arabie, 1985), 1 at most."""
    table = table.astype(np.float64)

    def pairs(x: np.ndarray) -> float:
        return float((x * (x - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    everything = pairs(np.array([table.sum()]))
    chance = rows * columns / everything if everything else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
