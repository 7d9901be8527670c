"""ClusterFit: Improving Generalization of Visual Representations.

Yan, Misra, Gupta, Ghadiyaram and Mahajan, CVPR 2020. https://arxiv.org/abs/1912.03330

    1. features of the training set under a frozen source network, deterministic crops
    2. k-means of those features gives every image a label
    3. a new network learns those labels from scratch: L = CE(W f(x), label)

Stages 1 and 2 run once, when training starts; the labels are part of every checkpoint. The
source may be a checkpoint of any run; it is not saved again, its checksum is.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import broadcast
from unlabeled.draws import seed_of
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.clustering import extract, kmeans


class ClusterFit(Method):
    """ClusterFit with the paper's ImageNet numbers.

    Args:
        backbone: f, at random initialisation.
        augment: gives one view.
        optim: see `Method`.
        source: the pretrained network that is clustered.
        clusters: K; much fewer than images (at most a tenth on small sets).
        iterations: of k-means.
    """

    labels: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        source: nn.Module,
        clusters: int = 16000,
        iterations: int = 50,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if clusters < 2:
            raise ValueError(f"clusters must be at least 2, got {clusters}")
        self.source = (source.requires_grad_(False).eval(),)  # in a tuple: no part of this module
        self.iterations = iterations
        self.head = nn.Linear(self.feature_dim, clusters)

    def prepare(self, count: int, classes: int) -> None:
        if self.head.out_features > count:
            raise ValueError(
                f"method.clusters={self.head.out_features} needs at least as many images, "
                f"the training set has {count}"
            )
        self.register_buffer("labels", torch.full((count,), -1))  # -1: not clustered yet

    def on_fit_start(self) -> None:
        if bool((self.labels >= 0).all()):  # a resumed run brings its labels
            return
        features = extract(self.source[0], self.trainer.datamodule, self.device)  # type: ignore[attr-defined]
        seed = seed_of(self.seed, "clusters")
        clusters = kmeans(features, self.head.out_features, iterations=self.iterations, seed=seed)
        self.labels.copy_(broadcast(clusters.to(self.device)))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,) = batch["views"]
        target = self.labels[batch["index"]]
        h = self.backbone(x)
        logits = self.head(h)
        self.watch(features=h)
        self.log("train/accuracy", (logits.argmax(1) == target).float().mean())
        return {"clusters": F.cross_entropy(logits.float(), target)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        total = sum(p.double().sum().item() for p in self.source[0].state_dict().values())
        checkpoint["source"] = {"path": getattr(self.source[0], "path", None), "sum": total}
