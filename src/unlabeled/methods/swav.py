"""Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV).

Caron, Misra, Mairal, Goyal, Bojanowski and Joulin, NeurIPS 2020. https://arxiv.org/abs/2006.09882

    z = norm(g(f(view))), C = K unit prototypes, scores s = z C
    q = Sinkhorn(s, epsilon) of the two large crops, over the global batch, without gradients
    L = mean over large crops a of mean over other crops v of -sum_k q_a log softmax(s_v / t)

With small batches, scores of the last `queue` embeddings with the current prototypes join the
codes' computation from `queue_start` on: before or after the batch's, codes ignore the order of
rows. The prototypes rest in the first `freeze` of training and have unit length after updates.

q = 1 / K with L = log K is a fixed point. A code is t / epsilon times sharper than the prediction
that learns it from another crop, so the point attracts where two crops' scores correlate by less
than about epsilon / t. Then: a smaller epsilon, crops more alike, a longer freeze, a later queue.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import rank, world_size
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.memory import Queue
from unlabeled.parts.mlp import mlp
from unlabeled.parts.precision import full_precision
from unlabeled.parts.sinkhorn import sinkhorn
from unlabeled.parts.views import embed


@full_precision
def swapped_prediction(codes: list[Tensor], scores: list[Tensor], temperature: float) -> Tensor:
    """Cross-entropy of every crop's prediction (B, K) with the codes (B, K) of other crops."""
    log_p = [(s / temperature).log_softmax(1) for s in scores]
    terms = [
        torch.stack([-(q * p).sum(1).mean() for v, p in enumerate(log_p) if v != a]).mean()
        for a, q in enumerate(codes)
    ]
    return torch.stack(terms).mean()


@full_precision
def products(z: Tensor, prototypes: Tensor) -> Tensor:
    """Scores (B, K) of embeddings (B, D) and prototypes (K, D)."""
    return z @ prototypes.T


class SwAV(Method):
    """SwAV with the paper's ImageNet numbers.

    Args:
        backbone: f.
        augment: gives two large crops first, then any number of small ones.
        optim: see `Method`.
        hidden: width of the projector's hidden layers.
        dim: width of the embedding.
        depth: layers of the projector; SEER (Goyal et al., 2021) has 3.
        prototypes: K.
        temperature: t.
        epsilon: of Sinkhorn.
        iterations: of Sinkhorn.
        queue: embeddings kept per large crop; 0 for none.
        queue_start: share of training from which on the queue is used, once it is full.
        freeze: share of training during which prototypes do not move.
        norm: batch norm of the projector: "batch", "sync" over processes, or "none".
        joint: crops of one size, and all in the projector, in one forward; else one by one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        hidden: int = 2048,
        dim: int = 128,
        depth: int = 2,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue: int = 0,
        queue_start: float = 0.0,
        freeze: float = 0.00125,
        norm: str = "sync",
        joint: bool = True,
    ) -> None:
        super().__init__(backbone, augment, optim)
        for name, value in (("temperature", temperature), ("epsilon", epsilon)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, count in (("depth", depth), ("iterations", iterations)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.queue_start, self.frozen_share, self.joint = queue_start, freeze, joint
        self.projector = mlp(self.feature_dim, *[hidden] * (depth - 1), dim, norm=norm)
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.queues = nn.ModuleList(Queue(queue, dim) for _ in range(2 if queue else 0))
        self.after_step()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=self.joint)
        z = [F.normalize(p, dim=1) for p in embed(self.projector, h, joint=self.joint)]
        scores = [products(v, self.prototypes.weight) for v in z]  # B K
        self.watch(features=h[0], embeddings=z[0])
        codes = [self._codes(a, z[a].detach(), scores[a].detach()) for a in range(2)]
        return {"swap": swapped_prediction(codes, scores, self.temperature)}

    @torch.no_grad()
    def _codes(self, crop: int, z: Tensor, scores: Tensor) -> Tensor:
        rows = scores
        if self.queues:
            queue: Queue = self.queues[crop]  # type: ignore[assignment]
            full = self.step * len(z) * world_size() >= len(queue.keys)
            if full and self.progress >= self.queue_start:
                share = queue.keys.tensor_split(world_size())[rank()]  # all hold the same queue
                rows = torch.cat([scores, products(share, self.prototypes.weight)])
            queue.push(z)
        return sinkhorn(rows, self.epsilon, self.iterations, shared=True)[: len(scores)]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.progress < self.frozen_share:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
