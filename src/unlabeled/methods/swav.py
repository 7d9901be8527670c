"""Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (SwAV).

Caron, Misra, Mairal, Goyal, Bojanowski and Joulin, NeurIPS 2020. https://arxiv.org/abs/2006.09882

    z = norm(g(f(view))), C = K unit prototypes
    q = Sinkhorn(z C, epsilon) of the two large crops, over the global batch, without gradients
    L = mean over large crops a of mean over other crops v of -sum_k q_a log softmax(z_v C / t)

With small batches the scores of the last `queue` embeddings join the codes' computation, from
`queue_start` on. The prototypes do not move in the first `freeze` of training, and are brought
back to unit length after every update.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import gather, rank, world_size
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


class SwAV(Method):
    """SwAV with the paper's ImageNet numbers.

    Args:
        backbone: f.
        augment: gives two large crops first, then any number of small ones.
        optim: see `Method`.
        hidden: width of the projector's hidden layer.
        dim: width of the embedding.
        prototypes: K.
        temperature: t.
        epsilon: of Sinkhorn; a loss that stays at log K asks for a smaller one.
        iterations: of Sinkhorn.
        queue: embeddings kept per large crop; 0 for none.
        queue_start: share of training after which the queue is used.
        freeze: share of training during which prototypes do not move.
        norm: batch norm of the projector: "batch", or "sync" over processes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        hidden: int = 2048,
        dim: int = 128,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue: int = 0,
        queue_start: float = 0.0,
        freeze: float = 0.00125,
        norm: str = "sync",
    ) -> None:
        super().__init__(backbone, augment, optim)
        if temperature <= 0 or epsilon <= 0:
            raise ValueError(
                f"temperature and epsilon must be positive, got {temperature} and {epsilon}"
            )
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.queue_start, self.frozen_share = queue_start, freeze
        self.projector = mlp(self.feature_dim, hidden, dim, norm=norm)
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.queues = nn.ModuleList(Queue(queue, dim) for _ in range(2 if queue else 0))
        self._unit_prototypes()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        h = embed(self.backbone, batch["views"], joint=True)
        z = [F.normalize(p, dim=1) for p in self.projector(torch.cat(h)).split(len(h[0]))]
        scores = [self.prototypes(v) for v in z]
        self.watch(features=h[0], embeddings=z[0])
        codes = [self._codes(a, z[a].detach(), scores[a].detach()) for a in range(2)]
        return {"swap": swapped_prediction(codes, scores, self.temperature)}

    @torch.no_grad()
    def _codes(self, crop: int, z: Tensor, scores: Tensor) -> Tensor:
        own = len(scores)
        everyone = gather(scores)
        if self.queues:
            queue = cast(Queue, self.queues[crop])
            full = self.step * own * world_size() >= len(queue.keys)
            if full and self.progress >= self.queue_start:
                everyone = torch.cat([everyone, self.prototypes(queue.keys)])
            queue.push(z)
        q = sinkhorn(everyone, self.epsilon, self.iterations)
        return q[rank() * own : (rank() + 1) * own]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.progress < self.frozen_share:
            self.prototypes.weight.grad = None

    def after_step(self) -> None:
        self._unit_prototypes()

    @torch.no_grad()
    def _unit_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
