"""Unsupervised Representation Learning by Predicting Image Rotations (RotNet).

Gidaris, Singh and Komodakis, ICLR 2018. https://arxiv.org/abs/1803.07728

    L = mean over images and r in {0, 1, 2, 3} of CE(F(rot(x, 90 r)), r)

The augmentation flips first and rotates last, by transposition: after a flip, rotations by 90 and
270 degrees would be the same picture, and interpolation would give the answer away.
"""

from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim


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
        return {"rotation": F.cross_entropy(logits.float(), target)}
