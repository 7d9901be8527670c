"""A Simple Framework for Contrastive Learning of Visual Representations (SimCLR).

Chen, Kornblith, Norouzi and Hinton, ICML 2020. https://arxiv.org/abs/2002.05709

    z_1 .. z_2N = norm(g(f(two views of N images)))
    l(i, j)     = -log exp(z_i.z_j / t) / sum_{k != i} exp(z_i.z_k / t)
    L           = mean of l over both orders of the N positive pairs

Negatives come from the global batch, with gradients. The official code reports the sum of the
two orders, 2 L, and its learning rate is for that (`scale` is 2 in experiment=imagenet). It also
feeds images in [0, 1] without mean and deviation: backbone=unit. Its projector has batch norm, the
last one with a scale and no shift, as here. The paper says none of this.
Lectures keep k = i in the sum (`include_self`), and name a hinge on norms (`norm_hinge`), which
acts on embeddings before they are normalised.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unlabeled.batch import Batch
from unlabeled.dist import gather
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.losses import norm_hinge
from unlabeled.parts.mlp import mlp
from unlabeled.parts.precision import full_precision
from unlabeled.parts.views import embed


@full_precision
def nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float,
    *,
    include_self: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Normalised-temperature cross-entropy of two views' unit embeddings (N, D) each.

    `include_self` keeps the anchor in its own denominator: InfoNCE as a lecture writes it, read
    literally. It is log 2N for equal embeddings, and cannot fall below log 2. With `chunk`, that
    many rows of similarities exist at a time and are computed again for the gradient: the same
    loss in chunk * 2N numbers instead of (2N)^2.
    """
    z = torch.cat([a, b])  # 2N D
    if chunk is None or chunk >= len(z):
        return _rows_loss(z, 0, len(z), temperature, include_self) / len(z)
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    starts = range(0, len(z), chunk)
    sums = [again(_rows_loss, z, i, i + chunk, temperature, include_self) for i in starts]
    return torch.stack(sums).sum() / len(z)


def _rows_loss(z: Tensor, start: int, stop: int, temperature: float, include_self: bool) -> Tensor:
    """The sum of l over the rows [start, stop) of z (2N, D)."""
    logits = z[start:stop] @ z.T / temperature
    if not include_self:
        logits.diagonal(start).fill_(-torch.inf)
    positive = torch.arange(start, start + len(logits), device=z.device) + len(z) // 2
    return F.cross_entropy(logits, positive % len(z), reduction="sum")


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
        chunk: see `nt_xent`; the loss is the same.
        norm_hinge: weight of a hinge on the norms of embeddings above sqrt(dim); 0: none.
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
        chunk: int | None = None,
        norm_hinge: float = 0.0,
        scale: float = 1.0,
        norm: str = "sync",
        joint: bool = True,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, or null for no chunks, got {chunk}")
        for name, value, least in (("norm_hinge", norm_hinge, 0), ("depth", depth, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.temperature, self.include_self, self.chunk = temperature, include_self, chunk
        self.scale, self.joint, self.hinge = scale, joint, norm_hinge
        widths = [hidden] * (depth - 1)
        self.projector = mlp(self.feature_dim, *widths, dim, bias=False, norm=norm, last_norm=True)
        if (shift := self.projector[-1].bias) is not None:
            shift.requires_grad_(False)  # type: ignore[union-attr, operator]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=self.joint)
        z1, z2 = embed(self.projector, h, joint=self.joint)
        a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        self.watch(features=h[0], embeddings=a)
        options = {"include_self": self.include_self, "chunk": self.chunk}
        loss = nt_xent(gather(a), gather(b), self.temperature, **options)
        terms = {"contrast": self.scale * loss}
        if self.hinge:
            terms["norm"] = self.hinge * norm_hinge(torch.cat([z1, z2]), math.sqrt(z1.shape[1]))
        return terms
