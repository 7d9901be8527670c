"""How far predicted colour fields lie from the true ones (Deshpande et al., 2017)."""

from collections.abc import Iterable

from torch import Tensor


def errors(fields: Tensor, truth: Tensor, counts: Iterable[int]) -> dict[str, Tensor]:
    """Means over images: error of best, of all and of so many fields, of the mean; variance.

    Args:
        fields: (B, K, 2, S, S).
        truth: (B, 2, S, S).
        counts: each at most K.
    """
    best = error_of_best(fields, truth).mean(0)
    found = {f"error_of_best_{k}": best[k - 1] for k in (*counts, len(best))}
    variance = fields.var(1, correction=0).sum(1).mean()
    return {**found, "error_of_mean": error_of_mean(truth).mean(), "variance": variance}


def error_of_best(fields: Tensor, truth: Tensor) -> Tensor:
    """Root mean squared error (B, K) of the best among the first 1, ..., K fields.

    Args:
        fields: (B, K, 2, S, S).
        truth: (B, 2, S, S).
    """
    error = (fields - truth[:, None]).square().sum(2).mean((2, 3)).sqrt()
    return error.cummin(1).values


def error_of_mean(truth: Tensor) -> Tensor:
    """That error (B,) of the mean colour of all these fields (B, 2, S, S), the same everywhere.

    What looks at no image cannot do better with one colour.
    """
    return error_of_best(truth.mean((0, 2, 3), keepdim=True).expand_as(truth)[:, None], truth)[:, 0]
