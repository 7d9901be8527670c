"""Bootstrap Your Own Latent (BYOL).

Grill et al., NeurIPS 2020. https://arxiv.org/abs/2006.07733

    p = q(g(f(v))), z' = g'(f'(v'))          ' marks the moving average, never trained
    L = (2 - 2 cos(p_1, z'_2)) + (2 - 2 cos(p_2, z'_1))                        in [0, 8]
    f', g' <- tau f', g' + (1 - tau) f, g    after every update
    tau_k  = 1 - (1 - tau) (cos(pi k / K) + 1) / 2

L = 4 + 4 L_SimSiam on the same inputs. The target starts as a copy of the online network (the
official code draws it anew) and keeps batch-norm statistics of its own, in training mode. The
online network is the one that is evaluated.
"""

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim, cosine
from unlabeled.parts import ema
from unlabeled.parts.losses import negative_cosine
from unlabeled.parts.mlp import mlp
from unlabeled.parts.views import embed


def byol_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Both orders of the regression of the targets z (N, D) by the predictions p (N, D)."""
    return 4 + 2 * negative_cosine(p1, z2) + 2 * negative_cosine(p2, z1)


class BYOL(Method):
    """BYOL with the paper's ImageNet numbers.

    Args:
        backbone: f.
        augment: gives two views of different chains.
        optim: see `Method`.
        hidden: width of the hidden layer of projector and predictor.
        dim: width of both outputs.
        tau: the target's first momentum; it rises to 1.
        norm: batch norm of both heads: "batch", or "sync" over processes.
        joint: both views in one forward; the official code separates them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        hidden: int = 4096,
        dim: int = 256,
        tau: float = 0.996,
        norm: str = "sync",
        joint: bool = False,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if not 0 <= tau <= 1:
            raise ValueError(f"tau must lie in [0, 1], got {tau}")
        self.tau, self.joint = tau, joint
        self.projector = mlp(self.feature_dim, hidden, dim, last_bias=False, norm=norm)
        self.predictor = mlp(dim, hidden, dim, last_bias=False, norm=norm)
        self.target = ema.copy_of(self.backbone, self.projector)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=self.joint)
        online = embed(self.projector, h, joint=self.joint)
        p1, p2 = embed(self.predictor, online, joint=self.joint)
        with torch.no_grad():
            z1, z2 = embed(self.target, batch["views"], joint=self.joint)
        self.watch(features=h[0], embeddings=online[0])
        return {"regression": byol_loss(p1, p2, z1, z2)}

    def after_step(self) -> None:
        tau = cosine(self.tau, 1.0, self.progress)
        ema.update(self.target, (self.backbone, self.projector), tau)
