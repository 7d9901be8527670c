"""Self-Supervised Learning of Pretext-Invariant Representations (PIRL).

Misra and van der Maaten, CVPR 2020. https://arxiv.org/abs/1912.01991

    v  = f(image), vt = g(its shuffled tiles, or the rotated image), m = the image's memory
    L  = lambda NCE(m, vt) + (1 - lambda) NCE(m, v)                         equation 5
    m <- norm(momentum m + (1 - momentum) v), with v of the untransformed image only

NCE(m, x), with scores s cosines over t, negatives n_j from the bank, S = sum_j exp s(x, n_j):
    paper    -log h(x, m) - sum_j log(1 - h(x, n_j)),  h(x, y) = exp s(x, y) / (exp s(x, y) + S)
    softmax  its first term alone
    binary   K + 1 two-way problems with noise 1 / n and a normaliser Z that the first batch fixes:
             as the official code (VISSL), whose negatives may be the image (`reappear`)
g: every tile through the trunk and one shared layer to D, the T outputs side by side in a random
order out of all T! (any number of orders: no parameter depends on it), and a last layer T D -> D.
lambda = 0 is instance discrimination (NPID), bit for bit; lambda = 1 the transformed branch alone.

VISSL's later variant (method=pirl_mlp): a hidden layer in f and g, nce=softmax, t = 0.1, SimCLR's
colours and blur. Transfer: the trunk alone.
Traps: tile i of image b is row T b + i; colours and flips are drawn per tile, places and turns per
image; the bank never sees vt; exp(1 / t) overflows half precision; the code's h is another.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.draws import Draws
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.memory import MemoryBank
from unlabeled.parts.mlp import mlp
from unlabeled.parts.nce import MemoryNCE, unit_rows
from unlabeled.parts.sharded_bank import ShardedBank
from unlabeled.parts.views import embed

TRANSFORMED, ORIGINAL = 0, 1


class PIRL(Method):
    """PIRL with the paper's ImageNet numbers.

    Args:
        backbone: the shared trunk.
        augment: gives the image (B, 3, H, W), and its tiles (B, T, 3, h, w) or a rotation of it.
        optim: see `Method`.
        hidden: width of a hidden layer with ReLU in f and before g's concatenation; null for
            the paper's linear heads.
        norm: of the heads, after every layer: "none" (the paper), "batch" or "sync". It centres
            a young network's embeddings, which short runs need.
        dim: D, width of the embedding.
        tiles: T of a Jigsaw branch; 0 for an image branch (rotation).
        negatives: K; 0 for nce=softmax over all images. `temperature` is t.
        lambd: weight of the transformed branch.
        momentum: of the memory bank.
        bank: makes it, see `memory_bank`.
        nce: "paper", "softmax" or "binary".
        reappear: an image's own memory may be among its negatives, as in the official code.
        shared_negatives: both branches have the same negatives; VISSL draws them anew.
        per_image: each image draws its own, as in the official code; see `MemoryNCE`.
        joint: branches of one size (rotation) in one forward, with common batch statistics.
    """

    revisits = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        hidden: int | None = None,
        norm: str = "none",
        dim: int = 128,
        tiles: int = 9,
        negatives: int = 32000,
        temperature: float = 0.07,
        lambd: float = 0.5,
        momentum: float = 0.5,
        bank: Callable[[int, int, float], MemoryBank | ShardedBank] = MemoryBank,
        nce: Literal["paper", "softmax", "binary"] = "paper",
        reappear: bool = False,
        shared_negatives: bool = False,
        per_image: bool = False,
        joint: bool = False,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if not 0 <= lambd <= 1 or tiles < 0:
            raise ValueError(f"lambd must lie in [0, 1], tiles be 0 or more: {lambd=}, {tiles=}")
        self.dim, self.tiles, self.momentum, self.bank = dim, tiles, momentum, bank
        self.lambd, self.joint = lambd, joint
        self.others = "negatives" if shared_negatives else "transformed negatives"
        widths = [self.feature_dim, *([] if hidden is None else [hidden]), dim]
        last = norm != "none"
        self.f = mlp(*widths, norm=norm, last_norm=last)
        self.g_tile = mlp(*widths, norm=norm, last_norm=last)
        self.g = mlp(tiles * dim, dim, norm=norm, last_norm=last) if tiles else nn.Identity()
        self.nce = MemoryNCE(
            nce,
            negatives=negatives,
            temperature=temperature,
            reappear=reappear,
            branches=2,
            per_image=per_image,
        )

    def prepare(self, count: int, classes: int) -> None:
        self.memory = self.bank(count, self.dim, self.momentum)
        self.memory.fill(Draws(self.seed, "memory"))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (image, changed), index = batch["views"], batch["index"]
        h, parts = embed(self.backbone, (image, self.parts(changed)), joint=self.joint)
        v = unit_rows(self.f(h))  # B D
        vt = unit_rows(self.g(self.g_tile(parts).view(len(v), -1)))  # B D
        self.watch(features=h, embeddings=v)
        drawn = partial(self.draws, rows=len(v)) if self.nce.per_image else self.shared_draws
        original = self.nce(v, self.memory, index, drawn("negatives"), ORIGINAL)
        transformed = self.nce(vt, self.memory, index, drawn(self.others), TRANSFORMED)
        self.memory.update(index, v.detach())
        return {"transformed": self.lambd * transformed, "original": (1 - self.lambd) * original}

    def parts(self, other: Tensor) -> Tensor:
        """What the trunk sees of tiles (B, T, 3, h, w), as rows, or of images (B, 3, H, W)."""
        if (other.shape[1] if other.ndim == 5 else 0) != self.tiles:
            raise ValueError(f"method.tiles={self.tiles} for views of shape {tuple(other.shape)}")
        return other.flatten(0, 1) if self.tiles else other
