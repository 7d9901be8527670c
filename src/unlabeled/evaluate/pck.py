"""The percentage of correct key-points (Yang and Ramanan, 2013) and its interval."""

import torch
from torch import Tensor

from unlabeled.draws import seed_of
from unlabeled.evaluate.intervals import percentiles

RESAMPLES = 1000


def right(errors: Tensor, units: Tensor, threshold: float) -> Tensor:
    """Which key-points (N, K) are no further off than threshold * unit.

    Args:
        errors: (N, K) distances.
        units: (N,) of every object, in the same unit of length.
        threshold: a share of it; what is exactly so far off is right.
    """
    return errors.double() <= threshold * units.double()[:, None]


def pck(errors: Tensor, counts: Tensor, units: Tensor, threshold: float) -> float:
    """The share that is right of the key-points (N, K) that count."""
    hits = right(errors, units, threshold) & counts
    return hits.sum().item() / counts.sum().item()


def areas(errors: Tensor, units: Tensor, most: float) -> Tensor:
    """Of each key-point (N, K), the share of thresholds from 0 to `most` at which it is right.

    Their mean over key-points is the area under the curve of PCK over the threshold, exactly:
    1 for no error.
    """
    return (1 - errors.double() / (most * units.double()[:, None])).clamp(min=0)


def interval(hits: Tensor, counts: Tensor, owner: Tensor, *key: int | str) -> tuple[float, float]:
    """Of hits.sum() / counts.sum() over resampled images.

    Args:
        hits: (N,) what is right of every object; may be fractions.
        counts: (N,) of how much.
        owner: (N,) the image of every object: objects of one are drawn together.
        key: names the draw.
    """
    images, place = owner.unique(return_inverse=True)
    n = len(images)
    both = torch.zeros(n, 2, dtype=torch.float64)
    both.index_add_(0, place, torch.stack([hits.double(), counts.double()], 1))
    generator = torch.Generator().manual_seed(seed_of(*key, n))
    sums = torch.stack(
        [both[torch.randint(n, (n,), generator=generator)].sum(0) for _ in range(RESAMPLES)]
    )
    sums = sums[sums[:, 1] > 0]  # a resample may hold no key-point that counts
    return percentiles((sums[:, 0] / sums[:, 1]).tolist())
