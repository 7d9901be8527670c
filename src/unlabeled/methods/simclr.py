"""A Simple Framework for Contrastive Learning of Visual Representations (SimCLR).

Chen, Kornblith, Norouzi and Hinton, ICML 2020. https://arxiv.org/abs/2002.05709

    z_1 .. z_2N = norm(g(f(two views of N images)))
    l(i, j)     = -log exp(z_i.z_j / t) / sum_{k != i} exp(z_i.z_k / t)
    L           = mean of l over both orders of the N positive pairs

Negatives come from the global batch, with gradients. The official code reports the sum of the
two orders, 2 L; its learning rates are for that, so `scale` is 2 in the paper's recipe. It also
feeds images in [0, 1] without mean and deviation; here every backbone takes normalised ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import gather
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.mlp import mlp
from unlabeled.parts.precision import full_precision
from unlabeled.parts.views import embed


@full_precision
def nt_xent(a: Tensor, b: Tensor, temperature: float, *, include_self: bool = False) -> Tensor:
    """Normalised-temperature cross-entropy of two views' unit embeddings (N, D) each.

    `include_self` keeps the anchor in its own denominator, a reading found in lectures; the
    loss can then not fall below log 2.
    """
    z = torch.cat([a, b])  # 2N D
    logits = z @ z.T / temperature  # 2N 2N
    if not include_self:
        logits = logits.masked_fill(
            torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf
        )
    rows = torch.arange(len(z), device=z.device)
    return F.cross_entropy(logits, (rows + len(a)) % len(z))


class SimCLR(Method):
    """SimCLR with the paper's ImageNet numbers.

    Args:
        backbone: f.
        augment: gives two views.
        optim: see `Method`.
        hidden: width of the projector g's hidden layers.
        dim: width of the embedding.
        depth: layers of g: 2 in the paper, 3 in version 2.
        temperature: t.
        include_self: see `nt_xent`.
        scale: factor of the loss.
        norm: batch norm of g: "batch", or "sync" over processes.
        joint: both views in one forward, as in the official code.
    """

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        hidden: int = 2048,
        dim: int = 128,
        depth: int = 2,
        temperature: float = 0.1,
        include_self: bool = False,
        scale: float = 1.0,
        norm: str = "sync",
        joint: bool = True,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature, self.include_self = temperature, include_self
        self.scale, self.joint = scale, joint
        widths = [hidden] * (depth - 1)
        self.projector = mlp(self.feature_dim, *widths, dim, bias=False, norm=norm, last_norm=True)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=self.joint)
        a, b = (F.normalize(z, dim=1) for z in embed(self.projector, h, joint=self.joint))
        self.watch(features=h[0], embeddings=a)
        loss = nt_xent(gather(a), gather(b), self.temperature, include_self=self.include_self)
        return {"contrast": self.scale * loss}
