"""Training loops of five methods, each as a script would write it, without the framework.

They take the framework's modules (backbone, heads, augmentation, optimizer), so that both sides
compute the same; what a method does with them is written out here.
"""

import math
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.draws import Draws, seed_of, shuffled


class Bare:
    """One method's loop over images in memory.

    Args:
        method: whose modules are trained.
        decode: cuts the crops.
        pixels: (N, 3, S, S) uint8.
        batch_size: images.
        steps: of the whole training.
    """

    def __init__(
        self, method: Any, decode: Any, pixels: Tensor, batch_size: int, steps: int
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(0, "prepare"))
            method.prepare(len(pixels), 0)
        self.method = method.train().to(memory_format=torch.channels_last)
        self.decode, self.pixels, self.batch_size = decode, pixels, batch_size
        self.steps, self.batches = steps, len(pixels) // batch_size
        made = method.optim(
            method, batch_size=batch_size, steps=steps, steps_per_epoch=self.batches
        )
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.counter = count()

    def step(self) -> None:
        """One update."""
        step, b = next(self.counter), self.batch_size
        epoch, at = divmod(step, self.batches)
        if at == 0:
            self.order = shuffled(len(self.pixels), 0, "order", epoch)
        index = self.order[at * b : (at + 1) * b]
        with torch.no_grad():
            crops = self.decode.batched(self.pixels[index], Draws(0, "crop", step, rows=b))
            batch = self.method.augment({"crops": crops}, Draws(0, "augment", step, rows=b))
        loss = self.loss(batch["views"], index, step)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.after(step)
        self.schedule.step()

    def loss(self, views: Sequence[Tensor], index: Tensor, step: int) -> Tensor:
        """The method's loss of a batch's views."""
        raise NotImplementedError

    def after(self, step: int) -> None:
        """What the method does after an update."""


class SimCLR(Bare):
    """Cross-entropy of 2N similarities."""

    def loss(self, views: Sequence[Tensor], index: Tensor, step: int) -> Tensor:
        method, n = self.method, len(index)
        z = F.normalize(method.projector(method.backbone(torch.cat(list(views)))), dim=1)
        logits = z @ z.T / method.temperature
        logits.diagonal().fill_(-torch.inf)
        positive = (torch.arange(2 * n) + n) % (2 * n)
        return method.scale * F.cross_entropy(logits, positive)


class MoCo(Bare):
    """A momentum encoder and a queue."""

    def loss(self, views: Sequence[Tensor], index: Tensor, step: int) -> Tensor:
        method, queue = self.method, self.method.queue.keys
        q = F.normalize(method.head(method.backbone(views[0])), dim=1)
        with torch.no_grad():
            self.keys = F.normalize(method.key_encoder(views[1]), dim=1)
        positive = (q * self.keys).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ queue.T], 1) / method.temperature
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))

    @torch.no_grad()
    def after(self, step: int) -> None:
        method, queue = self.method, self.method.queue
        moving_average(method.key_encoder, method.backbone, method.head, method.momentum)
        start = int(queue.head)  # the queue's length is a multiple of the batch's
        queue.keys[start : start + len(self.keys)] = self.keys
        queue.head.fill_((start + len(self.keys)) % len(queue.keys))


class BYOL(Bare):
    """A target network, whose momentum rises to 1."""

    def loss(self, views: Sequence[Tensor], index: Tensor, step: int) -> Tensor:
        method, both = self.method, torch.cat(list(views))
        p = F.normalize(method.predictor(method.projector(method.backbone(both))), dim=1)
        with torch.no_grad():
            target = F.normalize(method.target(both), dim=1)
        (p1, p2), (z1, z2) = p.chunk(2), target.chunk(2)
        return (4 - 2 * (p1 * z2).sum(1) - 2 * (p2 * z1).sum(1)).mean()

    def after(self, step: int) -> None:
        method, share = self.method, step / self.steps
        tau = 1 - (1 - method.tau) * (1 + math.cos(math.pi * share)) / 2
        moving_average(method.target, method.backbone, method.projector, tau)


class SwAV(Bare):
    """Two large and six small crops, and codes by Sinkhorn's algorithm."""

    def loss(self, views: Sequence[Tensor], index: Tensor, step: int) -> Tensor:
        method = self.method
        h = [method.backbone(torch.cat(list(some))) for some in (views[:2], views[2:])]
        z = F.normalize(method.projector(torch.cat(h)), dim=1)
        scores = method.prototypes(z).chunk(len(views))
        loss = torch.zeros(())
        for a in range(2):
            q = self.codes(scores[a].detach())
            others = [v for v in range(len(views)) if v != a]
            for v in others:
                log_p = F.log_softmax(scores[v] / method.temperature, 1)
                loss = loss - (q * log_p).sum(1).mean() / (2 * len(others))
        return loss

    @torch.no_grad()
    def codes(self, scores: Tensor) -> Tensor:
        """Soft assignments (B, K)."""
        q = (scores / self.method.epsilon).exp()
        for _ in range(self.method.iterations):
            q /= q.sum(0, keepdim=True)
            q /= q.sum(1, keepdim=True)
        return q

    @torch.no_grad()
    def after(self, step: int) -> None:
        weight = self.method.prototypes.weight
        weight.copy_(F.normalize(weight, dim=1))


class PIRL(Bare):
    """The image and its shuffled tiles, each against the image's memory and negatives."""

    def loss(self, views: Sequence[Tensor], index: Tensor, step: int) -> Tensor:
        method, (image, tiles) = self.method, views
        self.index = index
        self.v = F.normalize(method.f(method.backbone(image)), dim=1)
        parts = method.g_tile(method.backbone(tiles.flatten(0, 1)))
        vt = F.normalize(method.g(parts.view(len(image), -1)), dim=1)
        lambd = method.lambd
        return lambd * self.nce(vt, step, "transformed negatives") + (1 - lambd) * self.nce(
            self.v, step, "negatives"
        )

    def nce(self, x: Tensor, step: int, purpose: str) -> Tensor:
        """A softmax over an image's memory and the negatives that the batch shares."""
        bank, nce = self.method.memory.bank, self.method.nce
        rows = Draws(0, purpose, step).integers(len(bank), nce.negatives)[0]
        positive = (x * bank[self.index]).sum(1, keepdim=True)
        negative = (x @ bank[rows].T).masked_fill(rows == self.index[:, None], -torch.inf)
        logits = torch.cat([positive, negative], 1) / nce.temperature
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64))

    @torch.no_grad()
    def after(self, step: int) -> None:
        bank, m = self.method.memory.bank, self.method.momentum
        bank[self.index] = F.normalize(m * bank[self.index] + (1 - m) * self.v, dim=1)


@torch.no_grad()
def moving_average(slow: Any, backbone: Any, head: Any, momentum: float) -> None:
    """One parameter after the other, as the official codes do."""
    fast = [*backbone.parameters(), *head.parameters()]
    for mean, p in zip(slow.parameters(), fast, strict=True):
        mean.mul_(momentum).add_(p, alpha=1 - momentum)
