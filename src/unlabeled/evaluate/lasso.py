"""A linear classifier that chooses its stages: the lasso of Doersch and Zisserman (2017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.draws import seed_of, shuffled
from unlabeled.evaluate import pooling as pools
from unlabeled.evaluate.accuracy import label_rank, tops
from unlabeled.evaluate.contract import Data, Features, Request, Result, Shapes, none_to_choose_on
from unlabeled.evaluate.heads import CHUNK, Norm, norm_of
from unlabeled.evaluate.pooling import Stages
from unlabeled.optim import cosine


class Try(NamedTuple):
    """What one classifier is trained with."""

    lr: float
    l1: float


@dataclass(frozen=True)
class Mixtures:
    """H classifiers over S stages: logits = bias + sum over s of alpha_s W_s x_s."""

    norms: list[Norm]
    weights: list[Tensor]  # (D_s, H * C) of each stage
    alpha: Tensor  # (H, S)
    bias: Tensor  # (H, C)

    def terms(self, x: Sequence[Tensor]) -> Tensor:
        """W_s x_s (S, B, H, C) of normed features (B, D_s) of each stage."""
        shape = (len(x[0]), *self.bias.shape)
        return torch.stack([(z @ w).view(shape) for z, w in zip(x, self.weights, strict=True)])

    def normed(self, features: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Features (B, D_s) of some images, of mean squared length 1, whatever the stage."""
        found = (norm(x[rows]) for norm, x in zip(self.norms, features, strict=True))
        return [z / z.shape[1] ** 0.5 for z in found]

    def ranks(self, features: Sequence[Tensor], labels: Tensor, rows: Tensor) -> Tensor:
        """How many classes each puts before the right one (H, n) int64, on the CPU."""
        parts = []
        for part in rows.split(CHUNK):
            terms = self.terms(self.normed(features, part))
            logits = torch.einsum("hs,sbhc->hbc", self.alpha, terms) + self.bias[:, None]
            parts.append(label_rank(logits, labels[part].to(logits.device)))
        return torch.cat(parts, dim=1).cpu()


class Lasso:
    """Softmax regression on a sparse mixture of all stages.

    L = cross-entropy(bias + sum over stages s of alpha_s W_s x_s) + l1 sum |alpha_s|, x_s a
    stage's pooled map behind a batch norm without parameters, of mean squared length 1. Which
    stages a task reads is learned: alphas start at 1 and are shrunk after every update
    (a proximal step), so that those of useless stages become 0 exactly; the weight decay keeps
    W_s from growing in their place. In the paper the units of ResNet-101's third block are mixed;
    stages, whose widths differ, have a W_s of their own here. Learning rate and l1 are chosen on
    a held-out part of the training set.

    Args:
        stages: "all", so many of the deepest, or names.
        lrs: learning rates to try.
        l1: penalties of the alphas to try, each with every learning rate.
        weight_decay: of every W_s.
        epochs: of the classifiers that are tried and of the final one.
        batch_size: images per update.
        momentum: of SGD; the rate falls to zero by a cosine.
        max_features: of a stage, after pooling.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})

    def __init__(
        self,
        *,
        stages: Stages = "all",
        lrs: Sequence[float] = (0.1, 1.0),
        l1: Sequence[float] = (0.0, 0.001, 0.01),
        weight_decay: float = 1e-4,
        epochs: int = 10,
        batch_size: int = 256,
        momentum: float = 0.9,
        max_features: int = 1024,
        data: Data | None = None,
    ) -> None:
        pools.checked(stages, "adaptive", max_features)
        if not lrs or min(lrs) <= 0:
            raise ValueError(f"lrs must list positive learning rates, got {[*lrs]}")
        if not l1 or min(l1) < 0 or weight_decay < 0:
            raise ValueError(
                f"l1 and weight_decay must not be negative, got {[*l1]} and {weight_decay}"
            )
        if min(epochs, batch_size) < 1 or not 0 <= momentum < 1:
            raise ValueError(
                "epochs and batch_size must be at least 1 and momentum in [0, 1), "
                f"got {epochs}, {batch_size} and {momentum}"
            )
        self.stages: Stages = stages if isinstance(stages, str | int) else tuple(stages)
        self.tries = [Try(float(lr), float(penalty)) for penalty in l1 for lr in lrs]
        self.weight_decay, self.epochs, self.batch_size = weight_decay, epochs, batch_size
        self.momentum, self.max_features, self.data = momentum, max_features, data

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        return none_to_choose_on(data)

    def requests(self, shapes: Shapes) -> set[Request]:
        return {*self._requests(shapes)}

    def _requests(self, shapes: Shapes) -> list[Request]:
        return pools.pooled(shapes, self.stages, "adaptive", self.max_features)

    def __call__(self, features: Features) -> Result:
        requests = self._requests(features.shapes)
        train, test = ([features.splits[part][r] for r in requests] for part in ("train", "test"))
        y, (fit, held_out) = features.labels["train"], features.selection
        tried = self.train(train, y, fit, self.tries, features).ranks(train, y, held_out) == 0
        accuracy = tried.double().mean(1)
        best = self.tries[int(accuracy.argmax())]  # the first of equals
        final = self.train(train, y, torch.arange(len(y)), [best], features)
        labels = features.labels["test"]
        right = tops(final.ranks(test, labels, torch.arange(len(labels)))[0], features.classes)
        names = [request.stage for request in requests]
        alpha = dict(zip(names, final.alpha[0].tolist(), strict=True))
        details: dict[str, Any] = {
            "protocol": "linear classifier on a sparse mixture of frozen stages, last epoch",
            "stage": "+".join(names),
            "hyperparameters": {
                **best._asdict(),
                "weight_decay": self.weight_decay,
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "momentum": self.momentum,
            },
            "selection": "learning rate and l1 with the best top-1 on the held-out split of the "
            "training set, then trained on all of it",
            "alpha": alpha,
            "tried": [
                {**setting._asdict(), "held_out_top1": value}
                for setting, value in zip(self.tries, accuracy.tolist(), strict=True)
            ],
        }
        scores = {kind: x.double().mean().item() for kind, x in right.items()}
        return Result(scores, {k: details for k in scores}, right, _figure(alpha, best.l1))

    @torch.no_grad()
    def train(
        self, x: Sequence[Tensor], y: Tensor, rows: Tensor, tries: Sequence[Try], of: Features
    ) -> Mixtures:
        """One classifier per setting, on features (n, channels, grid, grid) of each stage."""
        device, heads, key = of.device, len(tries), (of.seed, "lasso")
        model = Mixtures(
            [norm_of(stage, rows, device) for stage in x],
            [
                _weights(stage[0].numel(), of.classes, *key, s).to(device).repeat(1, heads)
                for s, stage in enumerate(x)
            ],
            torch.ones(heads, len(x), device=device),
            torch.zeros(heads, of.classes, device=device),
        )
        learned = [*model.weights, model.alpha, model.bias]
        velocities = [torch.zeros_like(p) for p in learned]
        pairs = torch.tensor(tries, device=device)
        lr, l1 = pairs[:, :1], pairs[:, 1:]
        rates = [lr.repeat_interleave(of.classes, 0).T] * len(x) + [lr, lr]  # of W's columns
        steps, step = self.epochs * -(-len(rows) // self.batch_size), 0
        for epoch in range(self.epochs):
            for batch in rows[shuffled(len(rows), *key, epoch)].split(self.batch_size):
                factor = cosine(1.0, 0.0, step / steps)
                gradients = self._gradients(model, x, y, batch)
                for p, g, v, rate in zip(learned, gradients, velocities, rates, strict=True):
                    p.sub_(factor * rate * v.mul_(self.momentum).add_(g))
                # Momentum makes a lasting gradient so many times as long; the penalty is one.
                shrink = factor * lr * l1 / (1 - self.momentum)
                shrunk = F.relu(model.alpha.abs() - shrink)
                model.alpha.copy_(model.alpha.sign() * shrunk)
                step += 1
            of.progress("lasso", epoch + 1, self.epochs)
        return model

    def _gradients(
        self, model: Mixtures, x: Sequence[Tensor], y: Tensor, batch: Tensor
    ) -> list[Tensor]:
        """By hand, of the cross-entropy: of all weights, then of alpha and bias."""
        z = model.normed(x, batch)
        terms = model.terms(z)  # S B H C
        g = (torch.einsum("hs,sbhc->bhc", model.alpha, terms) + model.bias).softmax(-1)
        g[torch.arange(len(batch)), :, y[batch].to(g.device)] -= 1
        g /= len(batch)
        weights = [
            z_s.T @ (g * model.alpha[:, s, None]).flatten(1) + self.weight_decay * w
            for s, (z_s, w) in enumerate(zip(z, model.weights, strict=True))
        ]
        return [*weights, torch.einsum("bhc,sbhc->hs", g, terms), g.sum(0)]


def _weights(dim: int, classes: int, *key: int | str) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(*key, "weights"))
    return 0.01 * torch.randn(dim, classes, generator=generator)


def _figure(alpha: dict[str, float], l1: float) -> dict[str, dict[str, Any]]:
    if len(alpha) < 2:
        return {}
    return {
        "alpha": {
            "kind": "curves",
            "title": "What the lasso reads",
            "note": f"Weight of every stage in the mixture; 0: not read. l1 = {l1:g}, chosen on "
            "held-out training images.",
            "x": np.arange(len(alpha)),
            "y": np.array([[abs(value) for value in alpha.values()]]),
            "names": np.array(["|alpha|"]),
            "ticks": np.array([*alpha]),
        }
    }
