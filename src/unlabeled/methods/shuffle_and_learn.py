"""Shuffle and Learn: Unsupervised Learning using Temporal Order Verification.

Misra, Zitnick and Hebert, ECCV 2016. https://arxiv.org/abs/1603.08561

    five frames a < b < c < d < e of a window in which much moves
    in order: (b, c, d) and (d, c, b); not: (b, a, d), (d, a, b), (b, e, d), (d, e, b)
    L = CE(h([f(x_1), f(x_2), f(x_3)]), in order or not)

The window's frames are drawn by `data.motion_frames`: b and d at most tau_max = 60 frames apart, a
and e at least tau_min = 15 outside of them; one tuple in four is in order. The paper's f is
CaffeNet up to fc7, batch norm without scale and shift after conv3 to conv5, fc6 and fc7 (nearly
`backbone=alexnet_bn backbone.features=grid backbone.hidden=[4096,4096] backbone.normed=3
backbone.affine=false`, of one tower); h is linear on the three concatenated.

Order shows in where things are, which fc6 can tell and a global average cannot: backbones that end
in one need `side`, which gives h the places of the last stage's map. Ours: a linear h adds up what
it finds in each frame, and whether one lies between two others is no such sum; with `compare:
distances` h sees |f_3 - f_1|, |f_1 - f_2| and |f_2 - f_3| instead, and may have hidden layers.

Invariants: reversing a tuple in time keeps its answer; a tuple is in order if and only if its
middle index lies strictly between the outer two; who predicts the prior pays H(1/4) = 0.5623.
Traps: still windows cannot be answered; frames that are cropped, mirrored or coloured apart give
the answer away or hide it, so one draw holds for a tuple; batch norm sees correlated frames
(`backbone.norm=group` avoids it); classes are unbalanced: `accuracy` of the prior is 0.75,
`balanced` (mean over the answers) 0.5.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch, denormalize
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.mlp import mlp
from unlabeled.parts.places import Places
from unlabeled.parts.precision import full_precision


class ShuffleAndLearn(Method):
    """Tells tuples of frames in order from others.

    Args:
        backbone: f, of single frames.
        augment: gives tuples (B, 3, 3, H, W) and their `target`.
        optim: see `Method`.
        side: h sees the last stage's map, averaged to side x side places; null: f's features.
        widths: of layers with ReLU through which each frame goes before h.
        hidden: of layers inside h; none in the paper.
        compare: h sees the "frames", or "distances" between each two.
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
        widths: Sequence[int] = (),
        hidden: Sequence[int] = (),
        compare: Literal["frames", "distances"] = "frames",
    ) -> None:
        super().__init__(backbone, augment, optim)
        if compare not in ("frames", "distances"):
            raise ValueError(f"compare must be frames or distances, got {compare!r}")
        self.compare = compare
        self.frames = Places(self.feature_dim, side=side, widths=widths)
        self.head = mlp(3 * self.frames.dim, *hidden, 2, norm="none")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        logits, features = self._answer(batch)
        target = cast(Tensor, batch["target"])
        self.watch(features=features[:, 0])
        right = (logits.argmax(1) == target).float()
        self.note("accuracy", right.mean())
        shares = [(right * (target == y)).sum() / (target == y).sum().clamp(min=1) for y in (0, 1)]
        self.note("balanced", torch.stack(shares).mean())
        return {"order": full_precision(F.cross_entropy)(logits, target)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The three frames; a green edge where the answer is right, a red one where it is not."""
        logits, _ = self._answer(batch)
        (tuples,) = batch["views"]
        shown = denormalize(tuples).clamp(0, 1)
        right = logits.argmax(1).eq(cast(Tensor, batch["target"]))[:, None]
        green, red = shown.new_tensor([0.0, 0.7, 0.2]), shown.new_tensor([0.9, 0.1, 0.1])
        colour = torch.where(right, green, red)
        framed = colour[:, None, :, None, None].expand_as(shown).clone()
        framed[..., 2:-2, 2:-2] = shown[..., 2:-2, 2:-2]
        names = ("first", "middle", "last")
        return dict(zip(names, framed.unbind(1), strict=True))

    def _answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, 2) and features (B, 3, D)."""
        (tuples,) = batch["views"]
        frames = tuples.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features, h = (x.unflatten(0, tuples.shape[:2]) for x in self.frames(self.backbone, frames))
        if self.compare == "distances":
            h = (h - h.roll(1, 1)).abs()  # last to first, first to middle, middle to last
        return self.head(h.flatten(1)), features
