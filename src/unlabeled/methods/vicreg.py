"""VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning.

Bardes, Ponce and LeCun, ICLR 2022. https://arxiv.org/abs/2105.04906

    z, z'   = expander(f(view 1)), expander(f(view 2))         N x D, of the global batch
    s(z,z') = mean over rows and columns of (z - z')^2
    v(z)    = mean_j max(0, 1 - sqrt(Var(z_j) + 1e-4))
    c(z)    = 1/D sum_{i != j} Cov(z)_ij^2                     Var and Cov divide by N - 1
    L       = lambda s(z, z') + mu (v(z) + v(z')) + nu (c(z) + c(z'))

The official code halves the variance sum, v/2 + v'/2 (`halve_variance`); that factor is behind
the published 73.2. From memory: equation 5 sums s over columns, while the paper's pseudo-code and
the official code take the mean, which lambda = 25 is for, and which is taken here.

Invariants (from memory): equal views cost nothing in s; a constant batch costs mu 2 (1 - 1e-2) and
no covariance; columns of deviation 1 or more cost nothing in v; an orthogonal turn of both z leaves
s. Traps: variance and covariance of one process's rows, not of the global batch; statistics in
half precision; the mean over N where N - 1 is meant; a diagonal that counts in c.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import gather
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.losses import norm_hinge
from unlabeled.parts.mlp import mlp
from unlabeled.parts.precision import full_precision
from unlabeled.parts.views import embed


@full_precision
def variance(z: Tensor, eps: float = 1e-4) -> Tensor:
    """v: how far the deviations of columns (N, D) over the batch stay below 1."""
    return F.relu(1 - (z.var(0) + eps).sqrt()).mean()


@full_precision
def covariance(z: Tensor) -> Tensor:
    """c: the squared covariances of different columns (N, D), per column."""
    z = z - z.mean(0)
    cov = z.T @ z / (len(z) - 1)  # D D
    return (cov.square().sum() - cov.diagonal().square().sum()) / z.shape[1]


@full_precision
def vicreg_loss(
    z1: Tensor, z2: Tensor, lambd: float, mu: float, nu: float, *, halve_variance: bool = False
) -> dict[str, Tensor]:
    """The three weighted terms for two batches of embeddings (N, D)."""
    share = 0.5 if halve_variance else 1.0
    return {
        "invariance": lambd * F.mse_loss(z1, z2),
        "variance": mu * share * (variance(z1) + variance(z2)),
        "covariance": nu * (covariance(z1) + covariance(z2)),
    }


class VICReg(Method):
    """VICReg with the paper's ImageNet numbers.

    Args:
        backbone: f.
        augment: gives two views.
        optim: see `Method`.
        width: of every layer of the expander, the embedding's too: D.
        depth: layers of the expander.
        lambd: weight of invariance.
        mu: weight of variance.
        nu: weight of covariance.
        halve_variance: the official code's factor.
        norm_hinge: weight of a hinge on the norms of embeddings above sqrt(D), the norm of entries
            of deviation 1, as lectures have it; 0: none.
        norm: batch norm of the expander: "batch", or "sync" over processes.
        joint: both views in one forward; the official code separates them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        width: int = 8192,
        depth: int = 3,
        lambd: float = 25.0,
        mu: float = 25.0,
        nu: float = 1.0,
        halve_variance: bool = False,
        norm_hinge: float = 0.0,
        norm: str = "sync",
        joint: bool = False,
    ) -> None:
        super().__init__(backbone, augment, optim)
        weights = {"lambd": lambd, "mu": mu, "nu": nu, "norm_hinge": norm_hinge}
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} is a weight, at least 0, got {weight}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.lambd, self.mu, self.nu, self.halve_variance = lambd, mu, nu, halve_variance
        self.hinge, self.joint = norm_hinge, joint
        self.expander = mlp(self.feature_dim, *[width] * depth, last_bias=False, norm=norm)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=self.joint)
        z1, z2 = embed(self.expander, h, joint=self.joint)
        self.watch(features=h[0], embeddings=z1)
        weights = (self.lambd, self.mu, self.nu)
        all1, all2 = gather(z1), gather(z2)
        terms = vicreg_loss(all1, all2, *weights, halve_variance=self.halve_variance)
        if self.hinge:
            terms["norm"] = self.hinge * norm_hinge(torch.cat([z1, z2]), math.sqrt(z1.shape[1]))
        return terms
