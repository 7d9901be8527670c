"""95 % confidence intervals."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlabeled.draws import seed_of


def bootstrap(values: Tensor, *key: int | str, resamples: int = 1000) -> list[tuple[float, float]]:
    """Percentile intervals of the means of columns, over resampled images.

    Columns share their resamples, and calls with one key and one n do too.

    Args:
        values: (n, scores), one row per image.
        key: names the draw, e.g. (seed, "bootstrap").
        resamples: sets of n images drawn with replacement.
    """
    n, values = len(values), values.double()
    generator = torch.Generator().manual_seed(seed_of(*key, n))
    chunk = max(1, 4_000_000 // n)  # 32 MB of positions at a time
    means = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        times = torch.zeros(rows, n, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand(rows, n))
        means.append(times @ values / n)
    bounds = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return [(low, high) for low, high in bounds.T.tolist()]


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The interval of a statistic from its values on resampled images."""
    x = torch.tensor(values, dtype=torch.float64)
    low, high = x.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean of one score over runs with different seeds, and its interval by Student's t."""
    from scipy.stats import t  # slow to import, and only tables of several seeds need it

    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 runs, got {len(values)}")
    x = torch.tensor(values, dtype=torch.float64)
    half = float(t.ppf(0.975, len(x) - 1)) * x.std().item() / len(x) ** 0.5
    mean = x.mean().item()
    return mean, (mean - half, mean + half)
