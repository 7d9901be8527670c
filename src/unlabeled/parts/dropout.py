"""Dropout whose masks are a function of seed and step."""

from torch import Tensor

from unlabeled.draws import Draws, to


def dropped(x: Tensor, share: float, draws: Draws | None) -> Tensor:
    """x (B, ...) without a random share of each row's numbers, the others raised to make up for it.

    Args:
        x: a row for each row of the draws.
        share: probability that a number is left out.
        draws: None: nothing is dropped.
    """
    if draws is None or not share:
        return x
    kept = to(draws.uniform(*x.shape[1:]) >= share, x.device)
    return x * kept / (1 - share)


def probability(dropout: float) -> float:
    """A share to be dropped, or a ValueError that says which it may be."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    return dropout
