"""Classifiers of spans of sound, on frozen features: what `evaluate.sound` trains."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from unlabeled.evaluate import finite_newton
from unlabeled.evaluate.heads import Recipe, Setting, train
from unlabeled.optim import cosine

log = logging.getLogger(__name__)


class Head(Protocol):
    """Settings in; trained on spans, it says of others which class they are of."""

    name: str
    protocol: str

    @property
    def settings(self) -> Sequence[Mapping[str, float]]:
        """What may be chosen among, on held-out recordings."""
        ...

    @property
    def common(self) -> Mapping[str, Any]:
        """What all of them share."""
        ...

    def answers(
        self,
        x: Tensor,
        y: Tensor,
        asked: Tensor,
        settings: Sequence[Mapping[str, float]],
        *,
        classes: int,
        seed: int,
        device: torch.device,
    ) -> list[Tensor]:
        """Scores (m, C), on the CPU, for each of some settings.

        Args:
            x: (n, d) to train on.
            y: (n,) their classes.
            asked: (m, d).
            settings: some of `settings`.
            classes: C.
            seed: of the run.
            device: where it is trained.
        """
        ...


class SVMs:
    """A linear SVM for each class against all others, on features of mean 0 and deviation 1.

    Scores are signed distances, in units of the margin.

    Args:
        costs: C of the squared hinge loss, to choose among.
        steps: most Newton steps of a machine.
    """

    name = "svm"
    protocol = "linear SVMs, one class against the others, on standardised frozen features"

    def __init__(
        self, *, costs: Sequence[float] = (1e-4, 1e-3, 1e-2, 0.1, 1.0), steps: int = 100
    ) -> None:
        if not costs or min(costs) <= 0:
            raise ValueError(f"costs must list positive numbers, got {list(costs)}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.costs, self.steps = tuple(sorted(map(float, costs))), steps

    @property
    def settings(self) -> list[dict[str, float]]:
        return [{"cost": cost} for cost in self.costs]

    @property
    def common(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def answers(
        self,
        x: Tensor,
        y: Tensor,
        asked: Tensor,
        settings: Sequence[Mapping[str, float]],
        *,
        classes: int,
        seed: int,
        device: torch.device,
    ) -> list[Tensor]:
        mean, spread = x.double().mean(0), x.double().std(0, correction=0)
        spread = torch.where(spread > 1e-8 * mean.abs().clamp(min=1e-30), spread, 1.0)
        x, asked = (((part.double() - mean) / spread).to(device) for part in (x, asked))
        costs = [setting["cost"] for setting in settings]
        found = finite_newton.fit(x, y.to(device), classes, costs, steps=self.steps)
        for cost, machines in zip(costs, found, strict=True):
            if late := int((~machines.converged).sum()):
                log.warning(
                    "%d of %d SVMs of cost %g are not at their minimum after %d steps: raise "
                    "head.steps",
                    *(late, classes, cost, self.steps),
                )
        return [machines(asked).cpu() for machines in found]


class Softmax:
    """A linear classifier by softmax cross-entropy, behind a batch norm without parameters.

    SGD with Nesterov's momentum and a cosine schedule; scores are probabilities.

    Args:
        lrs: learning rates, at this batch size, to choose among.
        epochs: passes over the spans.
        batch_size: spans per update.
        momentum: of SGD.
        weight_decay: of all weights.
    """

    name = "softmax"
    protocol = "linear classifier by softmax cross-entropy on frozen features, last epoch"

    def __init__(
        self,
        *,
        lrs: Sequence[float] = (0.01, 0.03, 0.1),
        epochs: int = 30,
        batch_size: int = 256,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        if not lrs or min(lrs) <= 0:
            raise ValueError(f"lrs must list positive learning rates, got {list(lrs)}")
        if min(epochs, batch_size) < 1:
            raise ValueError(
                f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}"
            )
        if not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(
                "momentum must lie in [0, 1) and weight_decay not be negative, got "
                f"{momentum} and {weight_decay}"
            )
        self.lrs, self.epochs, self.batch_size = tuple(map(float, lrs)), epochs, batch_size
        self.momentum, self.weight_decay = momentum, weight_decay

    @property
    def settings(self) -> list[dict[str, float]]:
        return [{"lr": lr} for lr in self.lrs]

    @property
    def common(self) -> dict[str, Any]:
        names = ("epochs", "batch_size", "momentum", "weight_decay")
        return {name: getattr(self, name) for name in names}

    def answers(
        self,
        x: Tensor,
        y: Tensor,
        asked: Tensor,
        settings: Sequence[Mapping[str, float]],
        *,
        classes: int,
        seed: int,
        device: torch.device,
    ) -> list[Tensor]:
        heads = train(
            x[:, :, None, None],
            y,
            torch.arange(len(y)),
            [Setting(setting["lr"], self.weight_decay) for setting in settings],
            Recipe(self.epochs, self.batch_size, self.momentum, _falling),
            classes=classes,
            key=(seed, "sound"),
            device=device,
        )
        parts = [heads.logits(part).softmax(-1).cpu() for part in asked.split(1024)]
        return [*torch.cat(parts).unbind(1)]


def _falling(share: float) -> float:
    return cosine(1.0, 0.0, share)
