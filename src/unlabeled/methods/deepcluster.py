"""Deep Clustering for Unsupervised Learning of Visual Features (DeepCluster).

Caron, Bojanowski, Joulin and Douze, ECCV 2018. https://arxiv.org/abs/1807.05520

Before an epoch:
    1. f = g(f(x)) of all images, fixed crop, evaluation mode; PCA to 256, whitened, |f| = 1
    2. y = k-means of f; empty clusters take points from others
    3. W is drawn anew, and the optimizer forgets what it knew about it
During the epoch:
    L = CE(W relu(g(f(view))), y[index]), images drawn uniformly over y

g are the hidden layers of the head (AlexNet's 4096 - 4096 with dropout; none for a ResNet), which
are kept: only W is drawn anew. The paper's gradients as inputs are `backbone=sobel_alexnet`.

From memory of the official code: W ~ N(0, 0.01), bias 0; f is taken before the last ReLU; 20
iterations; W's own optimizer has no momentum (`head_momentum=false`; the paper does not say).
Invariants: inertia never rises, clusters have equal expected counts, chance is log k, NMI ignores
numbering. Traps: W or its momentum kept, clusters of augmented crops or of training-mode features,
one giant cluster (`train/largest`), labels by place in the sampler.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.draws import Draws, seed_of
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.clustering import uniform_order
from unlabeled.parts.features import evaluating, extract, principal
from unlabeled.parts.labels import PseudoLabels
from unlabeled.parts.lloyd import is_shared, partition
from unlabeled.parts.mlp import Hidden


class DeepCluster(Method):
    """DeepCluster with the paper's ImageNet numbers for AlexNet.

    Args:
        backbone: f.
        augment: gives one view.
        optim: see `Method`.
        clusters: k, about ten times the classes one would expect.
        pca: width of the clustered features; null clusters them as they are.
        iterations: of `kmeans`, which is "faiss", or "shared": see `partition`.
        hidden: widths of g.
        dropout: before each layer of g.
        sampling: "clusters" draws images uniformly over pseudo-labels, "images" over images.
        every_n_epochs: epochs between two clusterings.
        head_momentum: whether the optimizer's momentum holds for W too.
    """

    revisits = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        clusters: int = 10000,
        pca: int | None = 256,
        iterations: int = 20,
        hidden: Sequence[int] = (4096, 4096),
        dropout: float = 0.5,
        sampling: str = "clusters",
        every_n_epochs: int = 1,
        head_momentum: bool = True,
        kmeans: Literal["faiss", "shared"] = "faiss",
    ) -> None:
        super().__init__(backbone, augment, optim)
        least = {"clusters": (clusters, 2), "pca": (pca, 1), "iterations": (iterations, 1)}
        for name, (value, low) in {**least, "every_n_epochs": (every_n_epochs, 1)}.items():
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if sampling not in ("clusters", "images"):
            raise ValueError(f"sampling must be clusters or images, got {sampling!r}")
        self.pca, self.iterations, self.uniform = pca, iterations, sampling == "clusters"
        self.every, self.head_momentum = every_n_epochs, head_momentum
        self.whole = not is_shared(kmeans)
        self.hidden = Hidden(self.feature_dim, *hidden, dropout=dropout)
        self.head = nn.Linear(self.hidden.dim, clusters)

    def prepare(self, count: int, classes: int) -> None:
        if (k := self.head.out_features) > count:
            raise ValueError(f"method.clusters={k} needs at least as many images, got {count}")
        self.labels = PseudoLabels(count)

    def begin_epoch(self, epoch: int) -> Tensor | None:
        if int(self.labels.epoch) < epoch // self.every * self.every:
            self._cluster(epoch)
        y = self.labels.of.cpu()
        return uniform_order(y, len(y), self.seed, "order", epoch) if self.uniform else None

    @torch.no_grad()
    def _cluster(self, epoch: int) -> None:
        with evaluating(g := nn.Sequential(self.backbone, self.hidden)):
            f = extract(g, self.hidden.dim, self.trainer.datamodule, self.device, whole=self.whole)  # type: ignore[attr-defined]
        if self.pca is not None:
            shared = None if self.whole else self.device
            f = F.normalize(principal(f, self.pca, whiten=True, shared=shared), dim=1)
        seed, k = seed_of(self.seed, "clusters", epoch), self.head.out_features
        labels = partition(f, k, self.iterations, seed, whole=self.whole, device=self.device)
        self.labels.update(labels, epoch)
        self.head.weight.copy_(0.01 * Draws(seed, "head", rows=k).normal(self.hidden.dim))
        nn.init.zeros_(self.head.bias)
        self._forget()

    def _forget(self) -> None:
        for optimizer in self.trainer.optimizers:
            for p in (self.head.weight, self.head.bias):
                optimizer.state.pop(p, None)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,), target = batch["views"], self.labels[batch["index"]]
        h = self.backbone(x)
        g = self.hidden(h, self.draws("dropout", len(x)))
        logits = self.head(F.relu(g) if len(self.hidden.layers) else g)
        self.watch(features=h)
        self.note("accuracy", (logits.argmax(1) == target).float().mean())
        self.log_dict({"train/nmi": self.labels.nmi, "train/largest": self.labels.largest})
        return {"clusters": F.cross_entropy(logits.float(), target)}

    def after_step(self) -> None:
        if not self.head_momentum:
            self._forget()
