"""Unsupervised Visual Representation Learning by Context Prediction (relative position).

Doersch, Gupta and Efros, ICCV 2015. https://arxiv.org/abs/1505.05192

    classes   0 1 2
              3 a 4     of the query q, seen from its anchor a
              5 6 7
    L = sum over pairs of CE(g([f(a), f(q)]), class)        f for both: the trunk and fc6

Every two neighbours of a grid are a pair, in both orders; `augment.anchors=center` pairs only the
middle of 3 x 3 with its neighbours. f ends with fc6, the paper's representation: AlexNet's
`hidden` has it in the backbone, where evaluations see it; for others `dim` puts one here, or null
none. g is fc7, fc8 and a linear layer. As in the official code, batch norm (fc6, fc7 and, in the
backbone, conv3-5) has no scale and shift, which would let the network silence activations, and
the loss is summed over pairs; `reduction=mean` with a learning rate that many times as large is
the same. The paper's dropped colours are Gaussian noise, the code's uniform: `DropColors`.

From memory: the dropout before the last layer of reproductions on ResNets.
Invariants: swapping a pair turns y into 7 - y; a mirror swaps 0-2, 3-4 and 5-7; chance is log 8.
Traps: no gap or jitter (lines go on), colours kept (a lens tells where a patch lay), one channel
dropped per batch, x taken for y.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled import dist
from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.dense import Dense
from unlabeled.parts.montage import around, framed
from unlabeled.parts.pixels import pixels
from unlabeled.parts.precision import full_precision


class RelativePosition(Method):
    """Predicts where one patch lies as seen from another.

    Args:
        backbone: the trunk of f, applied to each patch.
        augment: gives patches (G, T, 3, h, w), `target` (G, n), and has the (n, 2) `pairs`.
        optim: see `Method`.
        dim: width of fc6 behind the backbone; null: the backbone's features are f.
        hidden: widths of fc7, fc8, ...
        norm: of fc6 and of the first `normed` layers of g: "batch" (of this process), "sync" (of
            all) or "none".
        affine: whether these norms have scale and shift.
        normed: how many of g's hidden layers have a norm.
        dropout: behind each of g's hidden layers.
        reduction: of the loss over all pairs, "sum" or "mean".
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        dim: int | None = None,
        hidden: Sequence[int] = (4096, 4096),
        norm: Literal["batch", "sync", "none"] = "batch",
        affine: bool = False,
        normed: int = 1,
        dropout: float = 0.0,
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__(backbone, augment, optim)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
        self.reduction: Literal["sum", "mean"] = reduction
        one = [] if dim is None else [dim]
        self.fc6 = Dense(self.feature_dim, *one, norm=norm, affine=affine)
        self.hidden = Dense(
            *(2 * self.fc6.dim, *hidden), norm=norm, affine=affine, normed=normed, dropout=dropout
        )
        self.head = nn.Linear(self.hidden.dim, 8)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (patches,), target = batch["views"], cast(Tensor, batch["target"]).flatten()
        h, logits = self._answer(patches)
        self.watch(features=h.view(len(batch["index"]), -1, h.shape[1]).mean(1))
        self.note("accuracy", (logits.argmax(1) == target).float().mean())
        return {"relative_position": position_loss(logits, target, self.reduction)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """One pair of every image: apart, where the answer puts the query, and where it lay."""
        (patches,), target = batch["views"], cast(Tensor, batch["target"])
        one = slice(None, None, len(patches) // len(batch["index"]))  # of an image's grids
        patches, target, rows = patches[one], target[one], torch.arange(len(batch["index"]))
        pairs = cast(Tensor, self.augment.pairs)
        which = rows % len(pairs)  # another place in every row
        answer = self._answer(patches)[1].argmax(1).view(len(rows), -1)[rows, which]
        truth = target[rows, which]
        anchor, query = pixels(patches[rows, pairs[which].T]).clamp(0, 1)
        found, right = (around(anchor, query, place) for place in (answer, truth))
        found = framed(found, answer == truth)
        return {"anchor": anchor, "query": query, "put there by the answer": found, "truth": right}

    def _answer(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Features (GT, D) of patches (G, T, 3, s, s), and logits (Gn, 8) of the pairs."""
        h = self.backbone(patches.flatten(0, 1))
        f = self.fc6(h).unflatten(0, patches.shape[:2])  # G T D
        pairs = cast(Tensor, self.augment.pairs)  # n 2
        both = f[:, pairs].flatten(2).flatten(0, 1)  # Gn 2D: anchor and query
        draws = self.draws("dropout", len(both)) if self.training else None
        return h, self.head(self.hidden(both, draws))


@full_precision
def position_loss(logits: Tensor, target: Tensor, reduction: Literal["sum", "mean"]) -> Tensor:
    """Cross-entropy of pairs (N, 8), summed or averaged over those of all processes.

    The sum is made so that the average over processes, which logs and gradients are, is the sum
    over all of them.
    """
    loss = F.cross_entropy(logits, target, reduction=reduction)
    return loss * dist.world_size() if reduction == "sum" else loss
