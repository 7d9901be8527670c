"""Supervised learning: the baseline that every table needs.

    L = CE(W f(x), y), with label smoothing if asked for

The recipe is that of He et al., 2016 (https://arxiv.org/abs/1512.03385). With label noise it is
the network N_pre(p) of ClusterFit's control (Yan et al., 2019, https://arxiv.org/abs/1912.03330).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.labels import LabelNoise


class Supervised(Method):
    """Cross-entropy on labels.

    Args:
        backbone: f.
        augment: gives one view.
        optim: see `Method`.
        label_smoothing: share of the target spread over all classes.
        label_noise: share of images whose label is replaced by a random one, once and for all.
        noise_includes_true: whether the random one may be the true class (the paper does not
            say); then only a share label_noise (C - 1) / C of the labels is wrong.
    """

    needs = frozenset({"crops", "index", "label"})

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        label_smoothing: float = 0.0,
        label_noise: float = 0.0,
        noise_includes_true: bool = True,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise must lie in [0, 1], got {label_noise}")
        self.label_smoothing = label_smoothing
        self.label_noise, self.noise_includes_true = label_noise, noise_includes_true
        self.noise: LabelNoise | None = None
        self.head: nn.Module = nn.Identity()  # until the number of classes is known

    def prepare(self, count: int, classes: int) -> None:
        self.head = nn.Linear(self.feature_dim, classes)
        if self.label_noise:
            self.noise = LabelNoise(
                count,
                classes,
                self.label_noise,
                include_true=self.noise_includes_true,
                seed=self.seed,
            )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,), label = batch["views"], batch["label"]
        if self.noise is not None:
            label = self.noise(label, batch["index"])
        h = self.backbone(x)
        logits = self.head(h)
        self.watch(features=h)
        self.note("accuracy", (logits.argmax(1) == label).float().mean())
        loss = F.cross_entropy(logits.float(), label, label_smoothing=self.label_smoothing)
        return {"classes": loss}
