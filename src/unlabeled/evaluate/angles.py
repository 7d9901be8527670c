"""Angles between directions, and their statistics over any number of pixels in bounded memory."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlabeled import dist
from unlabeled.draws import seed_of
from unlabeled.evaluate.intervals import percentiles

WIDTH = 0.01  # degrees of a bin
BINS = round(180 / WIDTH)
WITHIN = (30.0, 22.5, 11.25)  # degrees (Fouhey et al., 2013); tables end with the strictest
TOGETHER = 64  # images whose histograms are added at once


def degrees(a: Tensor, b: Tensor) -> Tensor:
    """Angles (B, ...) between directions (B, 3, ...) of any length but 0, in float64.

    Exact for small angles too, where the arc cosine of a product is not.
    """
    a, b = a.double(), b.double()
    sine = torch.linalg.cross(a, b, dim=1).norm(dim=1)
    return torch.atan2(sine, (a * b).sum(1)).rad2deg()


class Angles:
    """Mean, median and shares of angles pooled over the pixels of all images.

    Only counts in bins of 0.01 degrees are kept, once for the images as they are and once for
    each resample of them, which is drawn beforehand: memory does not grow with pixels or images.

    Args:
        images: how many will be added.
        key: names the resamples.
        resamples: sets of images drawn with replacement, for intervals.
        start: the image that is added first; other processes add those before.
    """

    def __init__(self, images: int, *key: int | str, resamples: int = 500, start: int = 0) -> None:
        generator = np.random.default_rng(seed_of(*key, images))
        drawn = generator.multinomial(images, np.full(images, 1 / images), size=resamples)
        # The first row counts every image once.
        self.times = np.concatenate([np.ones((1, images)), drawn]).astype(np.float64)
        self.counts = np.zeros((1 + resamples, BINS))
        self.sums = np.zeros(1 + resamples)
        self.added = start
        self._waiting: list[tuple[np.ndarray, float]] = []

    def add(self, angles: Tensor) -> None:
        """The angles (P,) in degrees of the known pixels of the next image; there may be none."""
        bins = (angles / WIDTH).floor().long().clamp(0, BINS - 1)
        self._waiting.append((torch.bincount(bins, minlength=BINS).numpy(), float(angles.sum())))
        if len(self._waiting) == TOGETHER:
            self._flush()

    def from_all(self, device: torch.device | str) -> None:
        """Adds what other processes counted, each of which calls."""
        self._flush()
        if dist.world_size() > 1:
            self.counts, self.sums = (
                dist.reduce_sum(torch.from_numpy(x).to(device)).cpu().numpy()
                for x in (self.counts, self.sums)
            )

    def scores(self) -> dict[str, tuple[float, tuple[float, float]]]:
        """Each statistic with its interval over resampled images.

        Raises:
            ValueError: no pixel has an angle.
        """
        self._flush()
        total = self.counts.sum(1)
        if not total[0]:
            raise ValueError("no pixel of any test image has a known normal")
        some = total > 0  # a resample may hold nothing but images without any
        counts, total, sums = self.counts[some], total[some], self.sums[some]
        upto = counts.cumsum(1)
        found = {"mean_degrees": sums / total, "median_degrees": _median(counts, upto, total)}
        for limit in WITHIN:
            found[f"within_{limit:g}"] = upto[:, round(limit / WIDTH) - 1] / total
        return {
            name: (float(x[0]), percentiles(x[1:].tolist() or [float(x[0])]))
            for name, x in found.items()
        }

    def _flush(self) -> None:
        if self._waiting:
            columns = self.times[:, self.added : self.added + len(self._waiting)]
            self.counts += columns @ np.stack([h for h, _ in self._waiting]).astype(np.float64)
            self.sums += columns @ np.array([s for _, s in self._waiting])
            self.added += len(self._waiting)
            self._waiting = []


def _median(counts: np.ndarray, upto: np.ndarray, total: np.ndarray) -> np.ndarray[Any, Any]:
    """The median of every row, as if angles were spread evenly within their bin."""
    half = total / 2
    at = (upto >= half[:, None]).argmax(1)
    row = np.arange(len(counts))
    inside = (half - (upto[row, at] - counts[row, at])) / counts[row, at]
    return (at + inside) * WIDTH
