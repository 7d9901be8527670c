"""Representation Learning with Contrastive Predictive Coding (CPC), on images, versions 1 and 2.

van den Oord, Li and Vinyals, 2018. https://arxiv.org/abs/1807.03748
Henaff et al., ICML 2020 (CPC v2). https://arxiv.org/abs/1905.09272

    z_rc = f(patch r, c of a grid),  c_rc = g(z_r'c' of rows r' <= r)
    L    = mean over k and (b, r, c) of -log exp(s(z_j+)) / sum_j exp(s(z_j)),  s(z) = z . W_k c_rc
    j+   = the patch k + skip rows below (r, c); j: patches of all images, or j+ and K drawn ones

Bilinear scores: nothing has unit length and there is no temperature. v2 sums L over four
directions, each with its own g and W_k, and compares 64 numbers: s = scale (V z) . (W_k c + a).
From memory of the papers: all but the numbers in conf/method. Ours: W_k of v1 starts small, as
scores of wide features would be huge; a process scores its own rows against all processes' patches.

Invariants: W_k = 0 costs log(candidates); g does not change when rows below do, bit for bit in
eval mode; distance d of a G x G grid has G (G - d) terms an image; a grid upside down swaps down
and up. Traps: batch norm of f lets patches see one another (v2's reason for backbone.norm=layer,
per patch over C, H, W); a context that sees its target; the positive among the drawn negatives;
augmenting before the cut; patches that overlap (choose `skip` so that d * stride >= size).
GreedyInfoMax's code: context=none, negatives=16, skip=1, reappear=true (drawn from target rows).
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import gather, rank
from unlabeled.draws import to
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.choice import choice
from unlabeled.parts.grid import TURNS, Downwards, Sight, turned
from unlabeled.parts.precision import full_precision


class CPC(Method):
    """CPC with the first paper's numbers.

    Args:
        backbone: f, applied to each patch.
        augment: gives a grid of patches (B, R, C, 3, h, w).
        optim: see `Method`.
        context: what g sees: "pixel" (rows above and places to the left), "row" (v2: rows above
            and the whole row) or "none" (the patch alone).
        width: channels inside g's blocks.
        blocks: of g.
        directions: of "down", "up", "left" and "right".
        steps: k goes from 1 to this.
        skip: nearest rows that are not predicted.
        dim: width of predictions and targets; null: z itself.
        scale: of the predictions.
        negatives: K, drawn for each term; 0: all other patches of the global batch.
        reappear: whether j+ may be among those drawn for it, and count twice.
        chunk: queries whose scores exist at a time, see `choice`; the loss is the same.
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        context: Sight = "pixel",
        width: int = 256,
        blocks: int = 5,
        directions: Sequence[str] = ("down",),
        steps: int = 5,
        skip: int = 0,
        dim: int | None = None,
        scale: float = 1.0,
        negatives: int = 0,
        reappear: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if not directions or not set(directions) <= set(TURNS):
            raise ValueError(f"directions must be of {', '.join(TURNS)}, got {list(directions)}")
        least = {"steps": (steps, 1), "skip": (skip, 0), "negatives": (negatives, 0)}
        least |= {k: (v, 1) for k, v in (("chunk", chunk), ("dim", dim)) if v is not None}
        for key, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{key} must be at least {low}, got {value}")
        if reappear and not negatives:
            raise ValueError("reappear=true is about negatives that are drawn: set negatives")
        self.reappear = reappear
        self.skip, self.scale, self.negatives, self.chunk = skip, scale, negatives, chunk
        options = {"steps": steps, "dim": dim, "sight": context, "width": width, "blocks": blocks}
        self.sides = nn.ModuleDict({d: Downwards(self.feature_dim, **options) for d in directions})

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (patches,) = batch["views"]  # B R C 3 h w
        h = self.backbone(patches.flatten(0, 2)).unflatten(0, patches.shape[:3])  # B R C D
        self.watch(features=h.flatten(1, 2).mean(1), embeddings=h.flatten(0, 2))
        found = {name: self.predicted(name, turned(h, name)) for name in self.sides}
        self.note("accuracy", torch.stack(list(found.values())).mean(0)[1].detach())
        return {name: value[0] for name, value in found.items()}

    def predicted(self, name: str, z: Tensor) -> Tensor:
        """Loss and accuracy (2,) of telling the rows of z (B, R, C, D) from the rows above."""
        side, (b, rows) = cast(Downwards, self.sides[name]), z.shape[:2]
        if len(side.predict) + self.skip >= rows:
            raise ValueError(
                f"steps={len(side.predict)} with skip={self.skip} need a grid of more than "
                f"{len(side.predict) + self.skip} patches a side, got {rows}"
            )
        c, keys = side.context(z), full_precision(gather)(side.target(z))  # all B R C D
        place = torch.arange(keys.shape[:3].numel(), device=z.device).view(keys.shape[:3])
        place, keys = place[rank() * b : (rank() + 1) * b], keys.flatten(0, 2)
        found = []
        for k, predict in enumerate(side.predict, 1):
            d = k + self.skip
            queries = (self.scale * predict(c[:, :-d])).flatten(0, 2)
            own = place[:, d:].flatten()  # the patch d rows below
            others = self.drawn(f"negatives {name} {k}", b, own, len(keys))
            found.append(choice(queries, keys, own, others, self.chunk))
        return torch.stack(found).mean(0)

    def drawn(self, purpose: str, b: int, own: Tensor, count: int) -> Tensor | None:
        """(Q, K) of `count` keys for each of Q terms, with replacement; its own: see `reappear`."""
        if not self.negatives:
            return None
        most = count if self.reappear else count - 1
        drawn = self.draws(purpose, b).integers(most, len(own) // b, self.negatives)
        drawn = to(drawn, own.device).flatten(0, 1)
        return drawn if self.reappear else drawn + (drawn >= own[:, None]).long()
