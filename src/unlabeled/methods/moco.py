"""Momentum Contrast (MoCo), versions 1 and 2.

He, Fan, Wu, Xie and Girshick, CVPR 2020. https://arxiv.org/abs/1911.05722
Chen, Fan, Girshick and He, 2020. https://arxiv.org/abs/2003.04297

    q = norm(f(view 1)), k = norm(f'(view 2))            ' marks the moving average
    L = -log exp(q.k / t) / (exp(q.k / t) + sum over the queue of exp(q.n / t))
    queue <- k, oldest dropped, after the loss; f' <- m f' + (1 - m) f after the update

The official code moves f' at the start of a step; after the update is the same f', as both
start equal, and once per update where batches are accumulated. Running statistics of batch norm
are f' own. The query's network f is the one that is evaluated.

Version 2 adds a hidden layer to the head (without batch norm), t = 0.2, a stronger augmentation
and a cosine schedule. Batch norm lets a network match q and k by their batch's statistics, so
keys are encoded in a shuffled order: across processes, and on one device across the splits of
`backbone.bn_splits`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import gather, mine
from unlabeled.draws import Draws, to
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts import ema
from unlabeled.parts.losses import info_nce
from unlabeled.parts.memory import Kept, Queue
from unlabeled.parts.mlp import mlp


class MoCo(Method):
    """MoCo with version 2's ImageNet numbers.

    Args:
        backbone: f, followed by the head.
        augment: gives two views.
        optim: see `Method`.
        hidden: width of the head's hidden layer; None for version 1's linear head.
        dim: width of the embedding.
        queue: number of negatives K.
        queue_dtype: of what is kept of them: "float32", or half of it in "bfloat16" or "float16".
        temperature: t; version 1 takes 0.07.
        momentum: m.
        shuffle_bn: encode keys in a shuffled order.
    """

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        hidden: int | None = 2048,
        dim: int = 128,
        queue: int = 65536,
        queue_dtype: Kept = "float32",
        temperature: float = 0.2,
        momentum: float = 0.999,
        shuffle_bn: bool = True,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.temperature, self.momentum, self.shuffle_bn = temperature, momentum, shuffle_bn
        widths = [] if hidden is None else [hidden]
        self.head = mlp(self.feature_dim, *widths, dim, norm="none")
        self.key_encoder = ema.copy_of(self.backbone, self.head)
        self.queue = Queue(queue, dim, dtype=queue_dtype)

    def prepare(self, count: int, classes: int) -> None:
        self.queue.fill(Draws(self.seed, "queue"))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        x1, x2 = batch["views"]
        h = self.backbone(x1)
        q = F.normalize(self.head(h), dim=1)
        with torch.no_grad():
            k = F.normalize(self._keys(x2), dim=1)
        self.watch(features=h, embeddings=q)
        loss = info_nce(q, k, self.queue.snapshot(), self.temperature)
        self.queue.push(k)
        return {"contrast": loss}

    def _keys(self, x: Tensor) -> Tensor:
        if not self.shuffle_bn:
            return self.key_encoder(x)
        x = gather(x)
        order = to(self.shared_draws("shuffle").permutations(len(x))[0], x.device)
        k = gather(self.key_encoder(mine(x[order])))
        return mine(torch.empty_like(k).index_copy_(0, order, k))

    def after_step(self) -> None:
        ema.update(self.key_encoder, (self.backbone, self.head), self.momentum)
