"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction.

Zbontar, Jing, Misra, LeCun and Deny, ICML 2021. https://arxiv.org/abs/2103.03230

    z1, z2 = g(f(view 1)), g(f(view 2))                        N x D
    C      = norm(z1)' norm(z2) / N                            D x D, over the global batch
    L      = scale * (sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2)

norm centres and scales every column over the batch. The lecture writes C without centring:
`centred=False`. The official code reduces C without gradients, so that its gradient is 1 / W of
this one on W processes; `scale` is where a recipe says so.
"""

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import gather
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.mlp import mlp
from unlabeled.parts.precision import full_precision
from unlabeled.parts.views import embed


@full_precision
def barlow_twins_loss(
    z1: Tensor, z2: Tensor, lambd: float, *, centred: bool = True, eps: float = 1e-5
) -> dict[str, Tensor]:
    """The invariance and redundancy terms for two batches of embeddings (N, D)."""
    c = _unit_columns(z1, centred, eps).T @ _unit_columns(z2, centred, eps) / len(z1)  # D D
    on = c.diagonal()
    off = c - torch.diag(on)
    return {
        "invariance": (1 - on).square().sum(),
        "redundancy": lambd * off.square().sum(),
    }


def _unit_columns(z: Tensor, centred: bool, eps: float) -> Tensor:
    if centred:
        z = z - z.mean(0)
    return z * (z.square().mean(0) + eps).rsqrt()


class BarlowTwins(Method):
    """Barlow Twins with the paper's ImageNet numbers.

    Args:
        backbone: f.
        augment: gives two views of different chains.
        optim: see `Method`.
        width: of every layer of the projector g, the embedding's too.
        depth: layers of g.
        lambd: weight of redundancy.
        centred: centre embeddings over the batch, as the paper does.
        scale: factor of the loss.
        norm: batch norm of g: "batch", or "sync" over processes.
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
        lambd: float = 0.0051,
        centred: bool = True,
        scale: float = 1.0,
        norm: str = "sync",
        joint: bool = False,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if lambd <= 0:
            raise ValueError(f"lambd must be positive, got {lambd}")
        self.lambd, self.centred, self.scale, self.joint = lambd, centred, scale, joint
        self.projector = mlp(self.feature_dim, *[width] * depth, bias=False, norm=norm)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=self.joint)
        z1, z2 = embed(self.projector, h, joint=self.joint)
        self.watch(features=h[0], embeddings=z1)
        terms = barlow_twins_loss(gather(z1), gather(z2), self.lambd, centred=self.centred)
        return {name: self.scale * term for name, term in terms.items()}
