"""Bootstrap Your Own Latent (BYOL).

Grill et al., NeurIPS 2020. https://arxiv.org/abs/2006.07733

    p = q(g(f(v))), z' = g'(f'(v'))          ' marks the moving average, never trained
    L = (2 - 2 cos(p_1, z'_2)) + (2 - 2 cos(p_2, z'_1))                        in [0, 8]
    f', g' <- tau f', g' + (1 - tau) f, g    after every update
    tau_k  = 1 - (1 - tau) (cos(pi k / K) + 1) / 2

L = 4 + 4 L_SimSiam on the same inputs. The target keeps batch-norm statistics of its own, in
training mode. The online network is the one that is evaluated.

The target starts as a copy of the online network; the official code draws it anew (`initial`).
What keeps the constant solution away can be taken out: the predictor; the average, by a
`constant` tau of 0 (the target is the online network) or of 1 (it stays a random network, which
does not collapse); the stop of gradients. Gradients mean nothing to weights that are an average,
so without the stop there is no target network: z' is the online projection, gradients and all.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim, cosine
from unlabeled.parts import ema
from unlabeled.parts.losses import negative_cosine
from unlabeled.parts.mlp import mlp
from unlabeled.parts.predictor import predictor as head
from unlabeled.parts.views import embed


def byol_loss(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, *, stop_gradient: bool = True
) -> Tensor:
    """Both orders of the regression of the targets z (N, D) by the predictions p (N, D)."""
    first = negative_cosine(p1, z2, stop_gradient=stop_gradient)
    return 4 + 2 * (first + negative_cosine(p2, z1, stop_gradient=stop_gradient))


class BYOL(Method):
    """BYOL with the paper's ImageNet numbers.

    Args:
        backbone: f.
        augment: gives two views of different chains.
        optim: see `Method`.
        hidden: width of the hidden layer of projector and predictor.
        dim: width of both outputs.
        tau: the target's momentum, the first one if it rises.
        schedule: how tau moves: "cosine", up to 1, or "constant".
        initial: the target starts as a "copy" of the online network, or is drawn "anew".
        predictor: q is an "mlp", "random" (not trained) or "none" (the identity).
        stop_gradient: False makes the online network its own target, with gradients.
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
        schedule: Literal["cosine", "constant"] = "cosine",
        initial: Literal["copy", "anew"] = "copy",
        predictor: Literal["mlp", "random", "none"] = "mlp",
        stop_gradient: bool = True,
        norm: str = "sync",
        joint: bool = False,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if not 0 <= tau <= 1:
            raise ValueError(f"tau must lie in [0, 1], got {tau}")
        if schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be cosine or constant, got {schedule!r}")
        if initial not in ("copy", "anew"):
            raise ValueError(f"initial must be copy or anew, got {initial!r}")
        self.tau, self.schedule, self.joint = tau, schedule, joint
        self.projector = mlp(self.feature_dim, hidden, dim, last_bias=False, norm=norm)
        self.predictor = head(predictor, dim, hidden, bias=True, last_bias=False, norm=norm)
        self.target: nn.Sequential | None = None
        if stop_gradient:
            self.target = ema.copy_of(self.backbone, self.projector)
            if initial == "anew":
                ema.draw_anew(self.target)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=self.joint)
        z1, z2 = online = embed(self.projector, h, joint=self.joint)
        p1, p2 = embed(self.predictor, online, joint=self.joint)
        if self.target is not None:
            with torch.no_grad():
                z1, z2 = embed(self.target, batch["views"], joint=self.joint)
        self.watch(features=h[0], embeddings=online[0])
        return {"regression": byol_loss(p1, p2, z1, z2, stop_gradient=self.target is not None)}

    def after_step(self) -> None:
        if self.target is None:
            return
        tau = cosine(self.tau, 1.0, self.progress) if self.schedule == "cosine" else self.tau
        ema.update(self.target, (self.backbone, self.projector), tau)
