"""Supervised learning: the baseline that every table needs.

    L = CE(W f(x), y), with label smoothing if asked for

The recipe is that of He et al., 2016 (https://arxiv.org/abs/1512.03385).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim


class Supervised(Method):
    """Cross-entropy on labels.

    Args:
        backbone: f.
        augment: gives one view.
        optim: see `Method`.
        label_smoothing: share of the target spread over all classes.
    """

    needs = frozenset({"crops", "index", "label"})

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.head: nn.Module = nn.Identity()  # until the number of classes is known

    def prepare(self, count: int, classes: int) -> None:
        self.head = nn.Linear(self.feature_dim, classes)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,), label = batch["views"], batch["label"]
        h = self.backbone(x)
        logits = self.head(h)
        self.watch(features=h)
        self.log("train/accuracy", (logits.argmax(1) == label).float().mean())
        loss = F.cross_entropy(logits.float(), label, label_smoothing=self.label_smoothing)
        return {"classes": loss}
