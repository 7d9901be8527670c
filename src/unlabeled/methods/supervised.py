"""Supervised learning: the baseline that every table needs.

    L = CE(W f(x), y), with label smoothing if asked for

The recipe is that of He et al., 2016 (https://arxiv.org/abs/1512.03385). With label noise it is
the network N_pre(p) of ClusterFit's control (Yan et al., 2019, https://arxiv.org/abs/1912.03330).

Images with several labels, as the tags users gave them (weak supervision):

    L = -1/k sum_{j in tags} log softmax(W f(x))_j       targets=softmax, Mahajan et al., 2018
    L = mean_c BCE(W f(x)_c, [c in tags])                targets=sigmoid

k is the number of the image's tags (https://arxiv.org/abs/1805.00932, section 2.2: k-hot vectors
whose entries are 1 / k; binary losses did worse there). Its softmax loss is what the loss of one
tag drawn anew at every look is on average; targets=label takes the one that the data drew for
good (Joulin et al., 2016, https://arxiv.org/abs/1511.02251). Mahajan et al. also show images more
often whose tags are rare: that is not built in.

Invariants: one tag per image gives the loss of labels; the order of tags does not matter.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.labels import LabelNoise, multi_hot
from unlabeled.parts.precision import full_precision

Targets = Literal["label", "softmax", "sigmoid"]


@full_precision
def of_tags(logits: Tensor, tags: Tensor, targets: Targets, label_smoothing: float) -> Tensor:
    """The loss of logits (B, C) and tags (B, M) int64, filled up by -1; at least one in a row."""
    y = multi_hot(tags, logits.shape[1]).to(logits.dtype)
    if targets == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, y)
    return F.cross_entropy(
        logits, y / y.sum(1, keepdim=True).clamp(min=1), label_smoothing=label_smoothing
    )


class Supervised(Method):
    """Cross-entropy on labels, or a loss on all labels of images that have several.

    Args:
        backbone: f.
        augment: gives one view.
        optim: see `Method`.
        targets: "label", or of data with tags (data=yfcc1m data.layout.target=tags) "softmax" or
            "sigmoid".
        label_smoothing: share of the target spread over all classes; not of sigmoids.
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
        targets: Targets = "label",
        label_smoothing: float = 0.0,
        label_noise: float = 0.0,
        noise_includes_true: bool = True,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if targets not in ("label", "softmax", "sigmoid"):
            raise ValueError(f"targets must be label, softmax or sigmoid, got {targets!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise must lie in [0, 1], got {label_noise}")
        if label_noise and targets != "label":
            raise ValueError(f"label_noise={label_noise} is of targets=label, got {targets!r}")
        if label_smoothing and targets == "sigmoid":
            raise ValueError(f"label_smoothing={label_smoothing} is not of targets=sigmoid")
        if targets != "label":
            self.needs = frozenset({"crops", "index", "tags"})
        self.targets: Targets = targets
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
        (x,) = batch["views"]
        h = self.backbone(x)
        logits = self.head(h)
        self.watch(features=h)
        if self.targets != "label":
            tags = batch["tags"]
            right = (logits.argmax(1, keepdim=True) == tags).any(1)
            terms = {"tags": of_tags(logits, tags, self.targets, self.label_smoothing)}
        else:
            label = batch["label"]
            if self.noise is not None:
                label = self.noise(label, batch["index"])
            right = logits.argmax(1) == label
            loss = F.cross_entropy(logits.float(), label, label_smoothing=self.label_smoothing)
            terms = {"classes": loss}
        self.note("accuracy", right.float().mean())
        return terms
