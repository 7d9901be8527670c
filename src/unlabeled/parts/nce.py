"""An embedding against its image's memory, and others drawn from the bank (NPID, PIRL)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.dist import gather
from unlabeled.draws import Draws, to
from unlabeled.parts.losses import binary_nce
from unlabeled.parts.memory import MemoryBank
from unlabeled.parts.precision import full_precision
from unlabeled.parts.sharded_bank import ShardedBank

FORMS = ("paper", "softmax", "binary")


@full_precision
def pirl_nce(scores: Tensor, *, both: bool) -> Tensor:
    """Equation 4 of Misra & van der Maaten (`both`), or its first term alone (B, 1 + K) -> ().

    With S the sum of exp s over the negatives and h(x) = exp x / (exp x + S),
        l = -log h(s_0) - sum_j log(1 - h(s_j)).

    Args:
        scores: over the temperature already, the positive's first, -inf where a negative is
            not one.
        both: False is the softmax of InfoNCE.
    """
    log_s = scores[:, 1:].logsumexp(1, keepdim=True)  # B 1
    positive = F.softplus(log_s - scores[:, :1]).mean()
    # 1 - h = S / (exp s + S), so -log(1 - h) = log(1 + exp s / S)
    return positive + F.softplus(scores[:, 1:] - log_s).sum(1).mean() if both else positive


@full_precision
def unit_rows(x: Tensor) -> Tensor:
    """Rows (B, D) over their norms, in at least single precision."""
    return F.normalize(x, dim=1)


@full_precision
def cosines(x: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """(B, 1 + K): of unit rows x (B, D) with their positives (B, D) and with K negatives.

    Args:
        x: unit rows.
        positive: unit rows.
        negatives: (K, D) for all rows, or (B, K, D), each row's own.
    """
    own = negatives.ndim == 3
    others = torch.einsum("bd,bkd->bk", x, negatives) if own else x @ negatives.T
    return torch.cat([(x * positive).sum(1, keepdim=True), others], 1)


@full_precision
def exact_softmax(x: Tensor, bank: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Cross-entropy over all n images: equation 2 of Wu et al., without an approximation."""
    return F.cross_entropy(x @ bank.T / temperature, index)


class MemoryNCE(nn.Module):
    """The loss of unit embeddings against a memory bank, mean over the batch.

    The K negatives are drawn uniformly with replacement from all n rows. By default the batch
    shares them, one matrix product; rows of each image's own, as in the official codes, are
    gathered as B x K x D numbers (0.5 GB for 256 images, K = 4096, D = 128).

    Args:
        form: "binary" (K + 1 two-way problems, see `binary_nce`), "softmax" (one choice out of
            K + 1) or "paper" (equation 4 of PIRL, see `pirl_nce`).
        negatives: K; 0 is the exact softmax over all images.
        temperature: t.
        reappear: an image's own row may be drawn as its negative, as in the official codes;
            False masks it.
        branches: losses that have a normaliser Z of their own.
        per_image: each image draws its own negatives.
    """

    alike = True  # Z is the same in every process
    log_z: Tensor

    def __init__(
        self,
        form: str,
        *,
        negatives: int,
        temperature: float,
        reappear: bool,
        branches: int = 1,
        per_image: bool = False,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"nce must be one of {', '.join(FORMS)}, got {form!r}")
        if negatives < 0 or (negatives == 0 and form != "softmax"):
            raise ValueError(
                f"negatives must be positive, or 0 for nce=softmax over all images, got {negatives}"
            )
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.form, self.negatives, self.temperature = form, negatives, temperature
        self.reappear, self.per_image = reappear, per_image
        if form == "binary":  # nan: not estimated yet
            self.register_buffer("log_z", torch.full((branches,), torch.nan))

    def forward(
        self,
        x: Tensor,
        memory: MemoryBank | ShardedBank,
        index: Tensor,
        draws: Draws,
        branch: int = 0,
    ) -> Tensor:
        """The loss of the embeddings x (B, D) of the images `index` (B,).

        Args:
            x: unit rows.
            memory: the bank; it may be updated before the backward pass.
            index: each image's row.
            draws: of the negatives: one row, the same in every process, or with `per_image` a row
                for each image.
            branch: which Z.
        """
        count = memory.size
        if not self.negatives:
            return exact_softmax(x, memory.everything(), index, self.temperature)
        rows = to(draws.integers(count, self.negatives), x.device)  # B K
        rows = rows if self.per_image else rows[0]
        others = memory[rows] if self.per_image else memory.shared(rows)
        scores = cosines(x, memory[index], others)
        if not self.reappear:
            own = F.pad(rows == index[:, None], (1, 0))
            scores = scores.masked_fill(own, -torch.inf)
        if self.form == "binary":
            return binary_nce(
                scores, self._normaliser(scores, branch, count), count, self.temperature
            )
        return pirl_nce(scores / self.temperature, both=self.form == "paper")

    @torch.no_grad()
    def _normaliser(self, scores: Tensor, branch: int, count: int) -> Tensor:
        """Log of Z = n * mean exp(s / t), estimated on the first global batch and then frozen."""
        total = gather((scores / self.temperature).logsumexp((0, 1))[None]).logsumexp(0)
        number = gather(scores.isfinite().sum()[None]).sum().to(total.dtype).log()
        estimate = total - number + math.log(count)
        self.log_z[branch] = torch.where(self.log_z[branch].isnan(), estimate, self.log_z[branch])
        return self.log_z[branch].clone()
