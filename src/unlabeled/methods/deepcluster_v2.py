"""DeepCluster-v2, from the appendix of SwAV.

Caron, Misra, Mairal, Goyal, Bojanowski and Joulin, NeurIPS 2020. https://arxiv.org/abs/2006.09882

    z = norm(g(f(view)));  m_i1, m_i2 <- z of image i's two large crops, whenever it is met
Before an epoch, for each head h, over the images met in the epoch before:
    C_h, y_h = spherical k-means of m_1 or m_2 (heads take turns), 10 iterations
During the epoch: L = mean over heads h, crops v and images i of CE(C_h z_iv / t, y_hi)

The centroids are the prototypes: no layer is drawn anew. Images that were not met are left out
(-100). One pass before the first epoch fills the memory. The official code, from memory, does so
with a training step's crops and batch norm (augmented_first_pass; by default one fixed crop
in evaluation mode), and its empty clusters keep their centroids (keep_empty; by default
they share another's points). The paper says neither.
Invariants: y is constant within an epoch, |C| = 1, equal centroids give log K, with K = n distinct
points each is a centroid. Traps: indices of other processes, a memory that no checkpoint holds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import gather
from unlabeled.draws import seed_of
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.first_pass import first_embeddings
from unlabeled.parts.lloyd import spherical
from unlabeled.parts.mlp import mlp
from unlabeled.parts.prototypes import IGNORED, prototype_loss
from unlabeled.parts.views import embed


class DeepClusterV2(Method):
    """DeepCluster-v2 with the paper's ImageNet numbers.

    Args:
        backbone: f.
        augment: gives two large crops first, then any number of small ones.
        optim: see `Method`.
        hidden: width of the projector's hidden layer.
        dim: width of the embedding.
        heads: clusterings.
        prototypes: K of each.
        temperature: t.
        iterations: of k-means.
        augmented_first_pass: the memory is first filled by two augmented crops, in training mode.
        keep_empty: an empty cluster keeps its centroid.
        norm: batch norm of the projector: "batch", or "sync" over processes.
    """

    alike, revisits = True, True  # every process writes the same memory: no need to send it
    memory: Tensor
    prototypes: Tensor
    met: Tensor
    labels: Tensor
    epoch: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        hidden: int = 2048,
        dim: int = 128,
        heads: int = 3,
        prototypes: int = 3000,
        temperature: float = 0.1,
        iterations: int = 10,
        augmented_first_pass: bool = False,
        keep_empty: bool = False,
        norm: str = "sync",
    ) -> None:
        super().__init__(backbone, augment, optim)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if min(heads, iterations, prototypes - 1) < 1:
            given = f"{heads=}, {iterations=} and {prototypes=}"
            raise ValueError(f"{given} must be at least 1, 1 and 2")
        self.temperature, self.iterations = temperature, iterations
        self.augmented_first_pass, self.keep_empty = augmented_first_pass, keep_empty
        self.projector = mlp(self.feature_dim, hidden, dim, norm=norm)
        self.register_buffer("prototypes", torch.zeros(heads, prototypes, dim))

    def prepare(self, count: int, classes: int) -> None:
        heads, k, dim = self.prototypes.shape
        if k > count:
            raise ValueError(f"prototypes={k} needs as many images, the training set has {count}")
        self.register_buffer("memory", torch.zeros(2, count, dim))
        self.register_buffer("met", torch.ones(count, dtype=torch.bool))  # since the clustering
        self.register_buffer("labels", torch.full((heads, count), IGNORED))
        self.register_buffer("epoch", torch.tensor(-1))  # of the labels

    @torch.no_grad()
    def begin_epoch(self, epoch: int) -> None:
        if int(self.epoch) >= epoch:
            return
        heads, k, dim = self.prototypes.shape
        if int(self.epoch) < 0:
            networks, data = (self.backbone, self.projector), self.trainer.datamodule  # type: ignore[attr-defined]
            views = self.augmented if self.augmented_first_pass else None
            z = first_embeddings(networks, dim, data, self.device, views)
            self.memory.copy_(F.normalize(z, dim=2))
        rows = (self.met | (self.met.sum() < k)).nonzero().flatten()  # too few: stale ones too
        self.labels.fill_(IGNORED)
        for h in range(heads):
            z, seed = self.memory[h % 2, rows], seed_of(self.seed, "clusters", epoch, h)
            found = spherical(z, k, self.iterations, seed, keep_empty=self.keep_empty)
            self.labels[h, rows] = found.labels.to(rows.device)
            self.prototypes[h] = F.normalize(found.centroids, dim=1)
        self.met.fill_(False)
        self.epoch.fill_(epoch)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        index, h = batch["index"], embed(self.backbone, batch["views"], joint=True)
        z = [F.normalize(p, dim=1) for p in self.projector(torch.cat(h)).split(len(h[0]))]
        y = self.labels[:, index]
        self.watch(features=h[0], embeddings=z[0])
        nearest = (z[0].detach() @ self.prototypes[0].T).argmax(1)
        self.note("accuracy", (nearest == y[0]).float().mean())
        index, large = gather(index), gather(torch.stack(z[:2], 1).detach())
        self.memory.index_copy_(1, index, large.transpose(0, 1).to(self.memory.dtype))
        self.met.index_fill_(0, index, True)
        return {"clusters": prototype_loss(z, self.prototypes, y, self.temperature)}
