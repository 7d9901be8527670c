"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction.

Zbontar, Jing, Misra, LeCun and Deny, ICML 2021. https://arxiv.org/abs/2103.03230

    z1, z2 = g(f(view 1)), g(f(view 2))                        N x D
    C      = norm(z1)' norm(z2) / N                            D x D, over the global batch
    L      = scale * (sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2)

norm centres and scales every column over the batch. The lecture writes C without centring:
`centred=False`. The official code reduces C where autograd does not see it, so that on W processes
its gradient is 1 / W of this one (`undivided=False`); LARS hides that for weights, not for biases
and norm layers.

Invariants: identical whitened embeddings cost 0, opposite ones 4 D, constant ones D; scales and
shifts of dimensions do not matter, nor does the order of views.
Traps: C or batch norm of one process, deviations over N - 1 with C over N, a diagonal overwritten.
"""

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import gather, world_size
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
        undivided: the gradient is that of the loss; False: 1 / W of it, as in the official code.
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
        undivided: bool = True,
        norm: str = "sync",
        joint: bool = False,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if lambd <= 0:
            raise ValueError(f"lambd must be positive, got {lambd}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.lambd, self.centred, self.scale, self.joint = lambd, centred, scale, joint
        self.undivided = undivided
        self.projector = mlp(self.feature_dim, *[width] * depth, bias=False, norm=norm)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=self.joint)
        z1, z2 = embed(self.projector, h, joint=self.joint)
        self.watch(features=h[0], embeddings=z1)
        terms = barlow_twins_loss(gather(z1), gather(z2), self.lambd, centred=self.centred)
        share = 1.0 if self.undivided else 1 / world_size()
        return {
            name: self.scale * torch.lerp(term.detach(), term, share)
            for name, term in terms.items()
        }
