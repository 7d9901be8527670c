"""ClusterFit: Improving Generalization of Visual Representations.

Yan, Misra, Gupta, Ghadiyaram and Mahajan, CVPR 2020. https://arxiv.org/abs/1912.03330

    1. features of D_cf under a frozen source network N_pre, fixed crops, evaluation mode
    2. k-means of those features gives every image of D_cf a label
    3. a new network N_cf learns those labels from scratch: L = CE(W f(x), label)

Stages 1 and 2 run once, when training starts; the labels are part of every checkpoint. N_pre may
be any network trained on anything (D_pre): a run (of `supervised method.label_noise=0.5` in the
paper's control), or a model of torchvision or timm. It is not saved again; its path and checksum
are. N_cf may have another architecture and never starts from N_pre's weights.

Clusters differ in size, and images are drawn uniformly over images, as in the paper.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.draws import seed_of
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.features import evaluating, extract, principal
from unlabeled.parts.frozen import Frozen
from unlabeled.parts.lloyd import is_shared, partition


class ClusterFit(Method):
    """ClusterFit with the paper's ImageNet numbers.

    Args:
        backbone: f, at random initialisation.
        augment: gives one view.
        optim: see `Method`.
        source: the pretrained network that is clustered.
        clusters: K; much fewer than images (at most a tenth on small sets).
        iterations: of k-means.
        pca: principal components that are clustered; null (the paper): all features as they are.
        normalize: features of unit length before k-means (an option of VISSL's tool).
        kmeans: "faiss" needs all features in every process and trains on 256 images per cluster;
            "shared" passes over all images, and each process keeps the features of its share.
    """

    alike = True  # labels are equal in every process: DDP need not send them around
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
        pca: int | None = None,
        normalize: bool = False,
        kmeans: Literal["faiss", "shared"] = "faiss",
    ) -> None:
        super().__init__(backbone, augment, optim)
        least = {"clusters": (clusters, 2), "iterations": (iterations, 1), "pca": (pca, 1)}
        for name, (value, low) in least.items():
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.source, self.whole = Frozen(source), not is_shared(kmeans)
        self.iterations, self.pca, self.normalize = iterations, pca, normalize
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
        source = self.source.on(self.device)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        with evaluating(source):
            width: int = source.dim  # type: ignore[assignment]
            features = extract(source, width, data, self.device, whole=self.whole)
        if self.pca is not None:
            shared = None if self.whole else self.device
            features = principal(features, self.pca, shared=shared)
        features = F.normalize(features, dim=1) if self.normalize else features
        seed, k = seed_of(self.seed, "clusters"), self.head.out_features
        labels = partition(features, k, self.iterations, seed, whole=self.whole, device=self.device)
        self.labels.copy_(labels)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,) = batch["views"]
        target = self.labels[batch["index"]]
        h = self.backbone(x)
        logits = self.head(h)
        self.watch(features=h)
        self.note("accuracy", (logits.argmax(1) == target).float().mean())
        return {"clusters": F.cross_entropy(logits.float(), target)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["source"] = self.source.record()
