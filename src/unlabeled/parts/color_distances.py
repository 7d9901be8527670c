"""How far colour fields lie apart, by the terms of a VAE's loss (Deshpande et al., 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.dist import world_size
from unlabeled.parts.precision import full_precision

FLOOR = 1e-4  # of variances along principal components, of fields in [-1, 1]


@full_precision
def kl_divergence(mu: Tensor, log_var: Tensor, reduction: str = "mean") -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) of rows (B, d), summed over d.

    Args:
        mu: (B, d).
        log_var: log sigma^2.
        reduction: over rows, "mean", or "sum" over the global batch (the official code).
    """
    each = (mu.square() + log_var.exp() - log_var - 1).sum(1) / 2
    return each.mean() if reduction == "mean" else each.sum() * world_size()


@full_precision
def weighted_distance(field: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Mean over fields (B, 2, S, S) of sqrt(sum_p w_p |C_p - C'_p|^2), weight (B, S, S)."""
    difference = (field - truth) * weight.sqrt()[:, None]
    return torch.linalg.vector_norm(difference.flatten(1), dim=1).mean()


@full_precision
def gradient_distance(field: Tensor, truth: Tensor) -> Tensor:
    """Mean over fields of the norm of the difference of their gradients, to right and down."""
    difference = field - truth
    steps = [difference.diff(dim=d).flatten(1) for d in (-1, -2)]
    return torch.linalg.vector_norm(torch.cat(steps, 1), dim=1).mean()


@full_precision
def principal_distance(field: Tensor, truth: Tensor, axes: Tensor, variances: Tensor) -> Tensor:
    """Mean over fields of their squared distance, along every axis in units of its variance.

    sum_k (P_k.(C - C'))^2 / v_k + |rest of C - C'|^2 / v_K.

    Args:
        field: (B, 2, S, S).
        truth: likewise.
        axes: (K, 2 S S), orthonormal: P_1, ..., P_K of the training set's fields.
        variances: (K,) of these along the axes, in descending order.
    """
    difference = (field - truth).flatten(1)
    along = (difference @ axes.T).square()  # B K
    rest = difference.square().sum(1) - along.sum(1)
    return ((along / variances).sum(1) + rest.clamp(min=0) / variances[-1]).mean()


def principal_axes(fields: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal axes (count, D) of fields (n, ...), and variances along them.

    Variances are kept above a floor; where there are fewer axes, they are 0.
    """
    x = fields.flatten(1).double()
    _, s, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    axes, variances = axes[:count], s[:count].square() / len(x)
    missing = count - len(axes)
    axes = F.pad(axes * (variances > 0)[:, None], (0, 0, 0, missing))
    return axes.float(), F.pad(variances, (0, missing)).clamp(min=FLOOR).float()
