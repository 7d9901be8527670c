"""Unsupervised Learning of Visual Representations using Videos: patches that were tracked.

Wang and Gupta, ICCV 2015. https://arxiv.org/abs/1505.00687

    x_i, x_i+: the first and the last patch of a track in recording v_i
    D(a, b) = 1 - cos(h(a), h(b))
    L = mean over pairs i and K negatives n of ([D(x_i, x_i+) - D(x_i, n) + M]_+
                                               + [D(x_i, x_i+) - D(x_i+, n) + M]_+) / 2
    n: patches of other videos of the batch; drawn, later those with the largest loss

Pairs are cut by `data.tracks`. Negatives are told by the video, never by the track: two tracks of
one recording may show one thing, and so may two recordings that were cut from one video, where the
data know that (`group`). A pair without any other video in its batch costs nothing. Both patches
of a pair are anchors for the same negatives, as in the official code, which has M = 1 and of K = 4
takes 2 hard and 2 drawn ones (`hard: 0.5`). The paper's h is AlexNet up to fc6 (4096) and fc7
(1024).

Invariants: equal embeddings cost M exactly; D+ = 0 with D- >= M costs nothing; triplets without a
loss have no gradient; hard negatives are the subset of largest loss. Traps: with unit vectors D
lies in [0, 2], so M > 2 is never reached; the hardest negatives from the first step on collapse
what is learned (`drawn_until`).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch, denormalize, sources
from unlabeled.dist import gather
from unlabeled.draws import to
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.places import Places
from unlabeled.parts.precision import full_precision
from unlabeled.parts.sources import several
from unlabeled.parts.triplets import average, gaps, selected


class Tracking(Method):
    """Makes tracked patches alike, with the paper's numbers.

    Args:
        backbone: f, of patches.
        augment: gives two views, the first and the last patch.
        optim: see `Method`.
        side: see `Places`: the backbone's features keep places, or this many a side.
        hidden: of layers with ReLU between the features and the embeddings.
        dim: width of the embeddings; null: the last hidden layer's, or the features themselves.
        margin: M.
        negatives: K, for each pair.
        hard: share of them that are the hardest, after `drawn_until`.
        drawn_until: share of the training in which all of them are drawn.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"crops", "index", "frames"})
    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        side: int | None = None,
        hidden: Sequence[int] = (),
        dim: int | None = 1024,
        margin: float = 0.5,
        negatives: int = 4,
        hard: float = 1.0,
        drawn_until: float = 0.375,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if not 0 < margin <= 2:
            raise ValueError(f"margin must be in (0, 2], as distances are in [0, 2], got {margin}")
        if negatives < 1:
            raise ValueError(f"negatives must be at least 1, got {negatives}")
        for name, share in (("hard", hard), ("drawn_until", drawn_until)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        self.margin, self.negatives = margin, negatives
        self.hard, self.drawn_until = hard, drawn_until
        self.places = Places(self.feature_dim, side=side, widths=hidden)
        self.head = nn.Identity() if dim is None else nn.Linear(self.places.dim, dim)

    def setup(self, stage: str) -> None:
        several(self.trainer, stage)
        super().setup(stage)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        pairs, features = self._embedded(batch)
        self.watch(features=features[:, 0], embeddings=pairs[:, 0])
        apart, allowed = self._gaps(pairs, batch)
        cost = F.relu(apart + self.margin).mean(1)
        hard = round(self.hard * self.negatives) if self.progress >= self.drawn_until else 0
        noise = to(self.draws("negatives", len(cost)).uniform(cost.shape[1]), cost.device)
        chosen = selected(cost.detach(), allowed, noise, hard, self.negatives - hard).float()
        farther = (apart < 0).float().mean(1) * allowed
        self.note("accuracy", average(farther.sum(1), allowed.float().sum(1)))
        return {"ranking": average((cost * chosen).sum(1), chosen.sum(1))}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """A pair, and the patch of another video that is nearest to it."""
        pairs, _ = self._embedded(batch)
        apart, allowed = self._gaps(pairs, batch)
        nearest = apart.sum(1).masked_fill(~allowed, -torch.inf).argmax(1)
        first, last = (denormalize(x).clamp(0, 1) for x in batch["views"])
        others = torch.stack([first, last], 1).flatten(0, 1)[nearest]
        return {"first": first, "last": last, "nearest of another recording": others}

    def _gaps(self, pairs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """D(x, x+) - D(x, n) (B, 2, 2N) of the global batch's patches n, and which may be such."""
        others, own = gather(pairs).flatten(0, 1), sources(batch)
        return gaps(pairs, others), gather(own).repeat_interleave(2) != own[:, None]

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit embeddings (B, 2, D) of pairs, and features (B, 2, dim)."""
        both = torch.stack(list(batch["views"]), 1)
        x = both.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features, h = self.places(self.backbone, x)
        z = full_precision(F.normalize)(self.head(h), dim=1)
        return z.unflatten(0, both.shape[:2]), features.unflatten(0, both.shape[:2])
