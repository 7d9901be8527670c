"""Self-Supervised Learning of Pretext-Invariant Representations (PIRL).

Misra and van der Maaten, CVPR 2020. https://arxiv.org/abs/1912.01991

    v  = f(image), vt = g(its shuffled tiles, or the rotated image), m = the image's memory
    L  = lambda NCE(m, vt) + (1 - lambda) NCE(m, v)                         equation 5
    m <- norm(momentum m + (1 - momentum) v), with v of the untransformed image only

NCE(m, x), with scores s cosines over t, negatives n_j from the bank, S = sum_j exp s(x, n_j):
    paper    -log h(x, m) - sum_j log(1 - h(x, n_j)),  h(x, y) = exp s(x, y) / (exp s(x, y) + S)
    softmax  its first term alone
    binary   K + 1 two-way problems with noise 1 / n and a normaliser Z that the first batch
             fixes: what the official code computes
Negatives are shared by the batch; the image's own row is never one of them. lambda = 0 is NPID.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import gather
from unlabeled.draws import Draws, to
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.losses import binary_nce
from unlabeled.parts.memory import MemoryBank
from unlabeled.parts.precision import full_precision


@full_precision
def pirl_nce(scores: Tensor, *, both: bool) -> Tensor:
    """Equation 4 of the paper (`both`), or its first term alone (B, 1 + K) -> ().

    Scores are over t already, the positive's first, -inf where a negative is not one.
    """
    log_s = scores[:, 1:].logsumexp(1, keepdim=True)  # B 1
    positive = F.softplus(log_s - scores[:, :1]).mean()
    # 1 - h = S / (exp s + S), so -log(1 - h) = log(1 + exp s / S)
    return positive + F.softplus(scores[:, 1:] - log_s).sum(1).mean() if both else positive


class PIRL(Method):
    """PIRL with the paper's ImageNet numbers.

    Args:
        backbone: the shared trunk.
        augment: gives the image (B, 3, H, W), and its tiles (B, T, 3, h, w) or a rotation of it.
        optim: see `Method`.
        dim: width of the embedding.
        tiles: T of a Jigsaw branch; 0 for an image branch (rotation).
        negatives: K.
        temperature: t.
        lambd: weight of the transformed branch.
        momentum: of the memory bank.
        nce: "paper", "softmax" or "binary".
    """

    log_z: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        dim: int = 128,
        tiles: int = 9,
        negatives: int = 32000,
        temperature: float = 0.07,
        lambd: float = 0.5,
        momentum: float = 0.5,
        nce: str = "paper",
    ) -> None:
        super().__init__(backbone, augment, optim)
        if nce not in ("paper", "softmax", "binary"):
            raise ValueError(f"nce must be paper, softmax or binary, got {nce!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if not 0 <= lambd <= 1:
            raise ValueError(f"lambd must lie in [0, 1], got {lambd}")
        self.dim, self.negatives, self.temperature = dim, negatives, temperature
        self.lambd, self.momentum, self.nce = lambd, momentum, nce
        self.f = nn.Linear(self.feature_dim, dim)
        self.g_tile = nn.Linear(self.feature_dim, dim)
        self.g = nn.Linear(tiles * dim, dim) if tiles else nn.Identity()
        # Z of the binary form, one per branch (transformed, original), fixed by the first batch
        self.register_buffer("log_z", torch.full((2,), torch.nan))

    def prepare(self, count: int, classes: int) -> None:
        self.memory = MemoryBank(count, self.dim, self.momentum)
        self.memory.fill(Draws(self.seed, "memory"))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        image, other = batch["views"]
        h = self.backbone(image)
        v = F.normalize(self.f(h), dim=1)  # B D
        parts = other.flatten(0, 1) if other.ndim == 5 else other
        vt = self.g(self.g_tile(self.backbone(parts)).view(len(v), -1))  # B D
        self.watch(features=h, embeddings=v)
        index = batch["index"]
        terms = {
            "transformed": self.lambd * self._nce(0, F.normalize(vt, dim=1), index),
            "original": (1 - self.lambd) * self._nce(1, v, index),
        }
        self.memory.update(index, v.detach())
        return terms

    def _nce(self, branch: int, x: Tensor, index: Tensor) -> Tensor:
        count = len(self.memory.bank)
        draws = self.shared_draws(f"negatives{branch}")
        rows = to(draws.integers(count, self.negatives)[0], x.device)  # K
        positive = (x.float() * self.memory[index]).sum(1, keepdim=True)
        scores = torch.cat([positive, x.float() @ self.memory[rows].T], 1)  # B 1+K
        own = F.pad(rows == index[:, None], (1, 0))  # the image's own row among the negatives
        scores = scores.masked_fill(own, -torch.inf)
        if self.nce == "binary":
            return binary_nce(scores, self._normaliser(branch, scores), count, self.temperature)
        return pirl_nce(scores / self.temperature, both=self.nce == "paper")

    @torch.no_grad()
    def _normaliser(self, branch: int, scores: Tensor) -> Tensor:
        """Log of Z = n * mean exp(s / t), estimated on the first global batch and then frozen."""
        own = gather((scores / self.temperature).logsumexp((0, 1))[None])
        share = len(self.memory.bank) / (scores.numel() * len(own))
        estimate = own.logsumexp(0) + math.log(share)
        self.log_z[branch] = torch.where(self.log_z[branch].isnan(), estimate, self.log_z[branch])
        return self.log_z[branch]
