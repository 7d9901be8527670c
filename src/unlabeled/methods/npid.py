"""Unsupervised Feature Learning via Non-Parametric Instance Discrimination (NPID).

Wu, Xiong, Yu and Lin, CVPR 2018. https://arxiv.org/abs/1805.01978

    v_i = norm(W f(x_i)), V_i = the memory of image i, one for each of the n images
    P(i | v) = exp(V_i.v / t) / Z                                              equation 2
    h(i, v) = P(i | v) / (P(i | v) + K / n)                                    equation 6
    L = -log h(i, v_i) - sum_{j=1..K} log(1 - h(i_j, v_i)),  i_j uniform on all images   7
    Z ~ n / m sum_j exp(V_j.v / t), of the first batch, then frozen            equation 8
    V_i <- norm(momentum V_i + (1 - momentum) v_i)

nce=softmax chooses among the image and K others instead (the official code's later result), with
negatives=0 among all images, which is equation 2 itself.

Paper and official code (zhirongw/lemniscate.pytorch): the paper adds lambda |v_i - V_i|^2, which
keeps an image's embedding near its last one (lambda = 30), and starts from random unit memories:
both, and the numbers of equations, from memory. The code has no such term, starts from memories
uniform in a cube, of norms near 1, and draws negatives for each image (per_image), here for each
batch. The published numbers are the code's, whose settings are `experiment=imagenet/npid`.

Invariants: equal scores with P = 1 / n give log(K + 1) + K log(1 + 1 / K); an update bisects
memory and embedding at momentum 0.5; only rows of the batch move; V = 0 gives log n at K = 0.
Traps: `index` must be the image's place in the training set; Z and V belong in checkpoints;
exp(1 / t) overflows half precision; every process must see the updates of all.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.draws import Draws
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.memory import MemoryBank
from unlabeled.parts.mlp import mlp
from unlabeled.parts.nce import MemoryNCE, unit_rows
from unlabeled.parts.precision import full_precision
from unlabeled.parts.sharded_bank import ShardedBank


@full_precision
def proximity(v: Tensor, memory: Tensor) -> Tensor:
    """Mean of |v_i - V_i|^2 over rows (B, D)."""
    return (v - memory).square().sum(1).mean()


class NPID(Method):
    """Instance discrimination with the paper's ImageNet numbers.

    Args:
        backbone: f.
        augment: gives one view.
        optim: see `Method`.
        hidden: width of a hidden layer of the head; null for the paper's linear one.
        norm: of the head, after every layer: "none", "batch" or "sync". The paper has none.
            Embeddings of a young network all point the same way; a norm centres them, which
            short runs need.
        dim: width of the embedding.
        negatives: K; 0 for nce=softmax over all images.
        temperature: t.
        momentum: of the memory bank.
        bank: makes it: see `memory_bank`.
        nce: "binary" or "softmax".
        reappear: an image's own memory may be among its negatives, as in the official code.
        per_image: each image draws its own negatives, as in the official code; costs memory, see
            `MemoryNCE`.
        proximal: lambda; 0 leaves that term out.
        init: of the bank, "unit" (random directions) or "uniform" (the official code).
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
        negatives: int = 4096,
        temperature: float = 0.07,
        momentum: float = 0.5,
        bank: Callable[[int, int, float], MemoryBank | ShardedBank] = MemoryBank,
        nce: Literal["binary", "softmax"] = "binary",
        reappear: bool = True,
        per_image: bool = False,
        proximal: float = 30.0,
        init: Literal["unit", "uniform"] = "unit",
    ) -> None:
        super().__init__(backbone, augment, optim)
        if nce not in ("binary", "softmax"):
            raise ValueError(f"nce must be binary or softmax, got {nce!r}")
        if proximal < 0:
            raise ValueError(f"proximal must not be negative, got {proximal}")
        if init not in ("unit", "uniform"):
            raise ValueError(f"init must be unit or uniform, got {init!r}")
        self.dim, self.momentum, self.bank = dim, momentum, bank
        self.proximal, self.init = proximal, init
        widths = [] if hidden is None else [hidden]
        self.f = mlp(self.feature_dim, *widths, dim, norm=norm, last_norm=norm != "none")
        self.nce = MemoryNCE(
            nce,
            negatives=negatives,
            temperature=temperature,
            reappear=reappear,
            per_image=per_image,
        )

    def prepare(self, count: int, classes: int) -> None:
        self.memory = self.bank(count, self.dim, self.momentum)
        self.memory.fill(Draws(self.seed, "memory"), unit=self.init == "unit")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (image,), index = batch["views"], batch["index"]
        h = self.backbone(image)
        v = unit_rows(self.f(h))  # B D
        self.watch(features=h, embeddings=v)
        own = self.nce.per_image
        draws = self.draws("negatives", len(v)) if own else self.shared_draws("negatives")
        terms = {"original": self.nce(v, self.memory, index, draws)}
        if self.proximal:
            terms["proximal"] = self.proximal * proximity(v, self.memory[index])
        self.memory.update(index, v.detach())
        return terms
