"""Exploring Simple Siamese Representation Learning (SimSiam).

Chen and He, CVPR 2021. https://arxiv.org/abs/2011.10566

    z = g(f(v)), p = h(z)                   f, g and h are shared by both views
    D(p, z) = -cos(p, sg(z))                sg: no gradient
    L = D(p_1, z_2) / 2 + D(p_2, z_1) / 2                                     in [-1, 1]

g: three linear layers without biases, each followed by batch norm, the last norm without scale
and shift; the official code has a frozen bias before it, which that norm takes out again. h: a
bottleneck, its last layer with a bias and without norm. The loss is negative by design.

Nothing but sg and h keeps the constant solution away. `stop_gradient`, `predictor` and
`last_norm` take them out: L then falls to -1 while the embeddings lose their spread. A last
norm without scale and shift cannot give a constant: what is left then is a direction or a few
outliers.

Traps: h keeps its learning rate (`optim.constant`), decay covers every parameter, no warm-up,
and the augmentation is MoCo v2's, not BYOL's.
"""

from typing import Literal

from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.losses import negative_cosine
from unlabeled.parts.mlp import mlp
from unlabeled.parts.predictor import predictor as head
from unlabeled.parts.views import embed


def simsiam_loss(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, *, stop_gradient: bool = True
) -> Tensor:
    """Both orders of the prediction of embeddings z (N, D) by p (N, D)."""
    first = negative_cosine(p1, z2, stop_gradient=stop_gradient)
    return (first + negative_cosine(p2, z1, stop_gradient=stop_gradient)) / 2


class SimSiam(Method):
    """SimSiam with the paper's ImageNet numbers.

    Args:
        backbone: f; the paper's blocks start as the identity (`zero_init_residual`).
        augment: gives two views.
        optim: see `Method`; the name of h is `predictor`.
        dim: width of the projector g, in and out.
        depth: layers of g; the paper takes 2 for CIFAR-10 (from memory).
        bottleneck: width of h's hidden layer.
        predictor: h is an "mlp", "random" (not trained) or "none" (the identity).
        stop_gradient: whether z is a constant to its prediction.
        last_norm: what ends g: "fixed", a norm without scale and shift; "affine", one with
            both; "none".
        norm: batch norm of both heads: "batch", or "sync" over processes.
        joint: both views in one forward; the official code separates them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        dim: int = 2048,
        depth: int = 3,
        bottleneck: int = 512,
        predictor: Literal["mlp", "random", "none"] = "mlp",
        stop_gradient: bool = True,
        last_norm: Literal["fixed", "affine", "none"] = "fixed",
        norm: str = "sync",
        joint: bool = False,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if last_norm not in ("fixed", "affine", "none"):
            raise ValueError(f"last_norm must be fixed, affine or none, got {last_norm!r}")
        self.stop_gradient, self.joint = stop_gradient, joint
        self.projector = mlp(
            self.feature_dim,
            *[dim] * depth,
            bias=False,
            norm=norm,
            last_norm=last_norm != "none",
            last_affine=last_norm == "affine",
        )
        self.predictor = head(predictor, dim, bottleneck, bias=False, last_bias=True, norm=norm)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=self.joint)
        z1, z2 = embed(self.projector, h, joint=self.joint)
        p1, p2 = embed(self.predictor, [z1, z2], joint=self.joint)
        self.watch(features=h[0], embeddings=z1)
        return {"similarity": simsiam_loss(p1, p2, z1, z2, stop_gradient=self.stop_gradient)}
