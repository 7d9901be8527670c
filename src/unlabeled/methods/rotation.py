"""Unsupervised Representation Learning by Predicting Image Rotations (RotNet).

Gidaris, Singh and Komodakis, ICLR 2018. https://arxiv.org/abs/1803.07728

    L = mean over images and r in {0, 1, 2, 3} of CE(F(rot(x, 90 r)), r)

The augmentation flips first and rotates last, by transposition: after a flip, rotations by 90 and
270 degrees would be the same picture, and interpolation would give the answer away. The paper sees
all four turns of an image in one batch, VISSL one at random: `augment.copies`. The paper's AlexNet
has batch norm and fc6, fc7 in the trunk (`backbone=alexnet_bn backbone.features=grid
backbone.hidden=[4096,4096]`).
Invariants: turns add up modulo 4 and undo one another exactly; labels are balanced; a picture that
looks the same in all four costs log 4; mirror(turn(x)) = turn back(mirror(x)).
Traps: a flip after the turn, turned rectangles, interpolation, held-out images that are not turned.
"""

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.montage import framed
from unlabeled.parts.pixels import pixels
from unlabeled.parts.precision import full_precision


class Rotation(Method):
    """Predicts which of four rotations made each view.

    Args:
        backbone: trunk of the classifier F.
        augment: gives rotated views and their `target`.
        optim: see `Method`.
    """

    pretext: ClassVar[bool] = True

    def __init__(self, backbone: nn.Module, augment: nn.Module, optim: Optim) -> None:
        super().__init__(backbone, augment, optim)
        self.head = nn.Linear(self.feature_dim, 4)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,), target = batch["views"], cast(Tensor, batch["target"])
        h = self.backbone(x)
        logits = self.head(h)
        self.watch(features=h[: len(batch["index"])])  # the first copy of every image
        self.note("accuracy", (logits.argmax(1) == target).float().mean())
        return {"rotation": full_precision(F.cross_entropy)(logits, target)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Every image in one of its turns, and turned back by the answer: upright if right."""
        (x,), target = batch["views"], cast(Tensor, batch["target"])
        count = len(batch["index"])
        rows = torch.arange(count, device=x.device)
        rows = rows + rows % (len(x) // count) * count  # the turns of an image lie `count` apart
        x, target = x[rows], target[rows]
        answer = self.head(self.backbone(x)).argmax(1)
        seen = pixels(x).clamp(0, 1)
        turns = zip(seen, answer.tolist(), strict=True)
        back = torch.stack([image.rot90(-k, (1, 2)) for image, k in turns])
        return {"turned": seen, "turned back by the answer": framed(back, answer == target)}
