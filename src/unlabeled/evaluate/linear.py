"""Linear classifiers on the frozen features of every stage (Goyal et al., 2019)."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from unlabeled.evaluate import pooling as pools
from unlabeled.evaluate.accuracy import tops
from unlabeled.evaluate.contract import (
    FINAL,
    Data,
    Features,
    Request,
    Result,
    Shapes,
    none_to_choose_on,
)
from unlabeled.evaluate.forward import SOUND
from unlabeled.evaluate.heads import (
    Heads,
    Recipe,
    Setting,
    resident,
    side_by_side,
    train,
)
from unlabeled.evaluate.pooling import Pooling
from unlabeled.optim import cosine


class Linear:
    """Average pooling of a stage's map, batch norm without parameters, one linear layer.

    The grid of the pooling is the finest that keeps at most `max_features` numbers: 12, 6, 4,
    3 and 2 for the stages of a ResNet-50 at 224 pixels, as in the paper. Norm statistics are
    those of the images that a head is trained on, before its training; images are not
    augmented. Each stage is a problem of its own; in it, one head for every pair of learning rate
    and weight decay is trained at once, in one batch of matrix products. They are tried on a part
    of the training set; the best on its held-out rest trains the final head on all of it, which
    is tested after its last epoch.

    Args:
        stages: names of stages, "final" being the backbone's output, or "all": every stage and
            the output where it is not among them.
        lrs: learning rates to try, at this batch size: nothing scales them.
        weight_decays: weight decays to try, each with every learning rate.
        epochs: of the heads that are tried and of the final ones.
        batch_size: images per update.
        momentum: of SGD.
        nesterov: whether it is Nesterov's.
        optimizer: "sgd", or "lars" (trust coefficient 0.001), as in SimSiam.
        norm: "batch", without parameters, or "none": features as they are.
        schedule: "cosine" to zero, or "step": times `gamma` at `milestones`.
        milestones: shares of the training at which a step schedule drops.
        gamma: factor of a drop.
        pooling: "adaptive" cells, or "published": the windows of the paper, which overlap, where a
            map is one of ResNet-50's at 224 pixels.
        max_features: of a stage, after pooling, where there is no published window.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})

    def __init__(
        self,
        *,
        stages: Literal["all"] | Sequence[str] = "all",
        lrs: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
        weight_decays: Sequence[float] = (0.0,),
        epochs: int = 28,
        batch_size: int = 256,
        momentum: float = 0.9,
        nesterov: bool = True,
        optimizer: Literal["sgd", "lars"] = "sgd",
        norm: Literal["batch", "none"] = "batch",
        schedule: Literal["cosine", "step"] = "cosine",
        milestones: Sequence[float] = (8 / 28, 16 / 28, 24 / 28),
        gamma: float = 0.1,
        pooling: Pooling = "adaptive",
        max_features: int = 9216,
        data: Data | None = None,
    ) -> None:
        if isinstance(stages, str) and stages != "all":
            raise ValueError(f"stages must be 'all' or a list of names, got {stages!r}")
        if not stages:
            raise ValueError("stages is empty: name a stage, or say 'all'")
        if not lrs or min(lrs) <= 0:
            raise ValueError(f"lrs must list positive learning rates, got {list(lrs)}")
        if not weight_decays or min(weight_decays) < 0:
            raise ValueError(f"weight_decays must not be negative, got {list(weight_decays)}")
        if min(epochs, batch_size, max_features) < 1:
            raise ValueError(
                "epochs, batch_size and max_features must be at least 1, "
                f"got {epochs}, {batch_size} and {max_features}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if optimizer not in ("sgd", "lars"):
            raise ValueError(f"optimizer must be sgd or lars, got {optimizer!r}")
        if norm not in ("batch", "none"):
            raise ValueError(f"norm must be batch or none, got {norm!r}")
        pools.checked("all", pooling, max_features)
        if schedule not in ("cosine", "step"):
            raise ValueError(f"schedule must be cosine or step, got {schedule!r}")
        if any(not 0 <= m <= 1 for m in milestones):
            raise ValueError(f"milestones are shares of the training, got {list(milestones)}")
        self.stages = "all" if isinstance(stages, str) else tuple(stages)
        self.hears = self.stages == (SOUND,)
        pairs = itertools.product(lrs, weight_decays)
        self.settings = [Setting(float(lr), float(decay)) for lr, decay in pairs]
        self.epochs, self.batch_size, self.momentum = epochs, batch_size, momentum
        self.schedule, self.milestones, self.gamma = schedule, tuple(milestones), gamma
        self.nesterov, self.optimizer, self.norm = nesterov, optimizer, norm
        self.pooling: Pooling = pooling
        self.max_features, self.data = max_features, data

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        return none_to_choose_on(data)

    def requests(self, shapes: Shapes) -> set[Request]:
        return set(self._requests(shapes))

    def _requests(self, shapes: Shapes) -> list[Request]:
        every = [
            pools.cells(name, shape, self.pooling, self.max_features)
            for name, shape in shapes.maps.items()
        ]
        if not (shapes.pooled and every[-1].grid == 1):
            every.append(FINAL)
        if self.stages == "all" or "pixels" in shapes.maps:  # a baseline has its own stage
            return every
        known = {request.stage: request for request in [*every, FINAL]}
        if unknown := [name for name in self.stages if name not in known]:
            raise ValueError(f"the backbone has no stages {unknown}; it has {list(known)}")
        return [known[name] for name in self.stages]

    def factor(self, share: float) -> float:
        """The learning rate at a share of training, as a share of its peak."""
        if self.schedule == "cosine":
            return cosine(1.0, 0.0, share)
        return self.gamma ** sum(share >= m - 1e-9 for m in self.milestones)

    def __call__(self, features: Features) -> Result:
        requests = self._requests(features.shapes)
        done = itertools.count(1)  # atomic, unlike `+= 1`: stages train in threads
        total = 2 * self.epochs * len(requests)

        def tick() -> None:
            features.progress("linear heads", next(done), total)

        jobs = [functools.partial(self._stage, features, request, tick) for request in requests]
        answers = side_by_side(jobs, features.device)
        best_stage = requests[max(range(len(jobs)), key=lambda i: answers[i][0].max().item())].stage
        scores, details, per_image = {}, {}, {}
        for request, (held_out, ranks) in zip(requests, answers, strict=True):
            for kind, right in tops(ranks, features.classes).items():
                name = f"{request.stage}/{kind}"
                scores[name], per_image[name] = right.double().mean().item(), right
                details[name] = {
                    **self._details(request, held_out, features),
                    "best_stage": best_stage,  # by held-out accuracy too
                }
        return Result(scores, details, per_image)

    def _stage(
        self, features: Features, request: Request, tick: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """Held-out accuracy of every setting, and the ranks of test labels under the best."""
        x = resident(features.splits["train"][request], features.device)
        y, (fit, held_out) = features.labels["train"], features.selection

        def heads(rows: Tensor, settings: list[Setting]) -> Heads:
            return train(
                x,
                y,
                rows,
                settings,
                Recipe(
                    self.epochs,
                    self.batch_size,
                    self.momentum,
                    self.factor,
                    nesterov=self.nesterov,
                    trust=0.001 if self.optimizer == "lars" else None,
                    standardized=self.norm == "batch",
                ),
                classes=features.classes,
                key=(features.seed, "linear", request.stage),
                device=features.device,
                progress=tick,
            )

        right = heads(fit, self.settings).ranks(x, y, held_out) == 0
        accuracy = right.double().mean(1)
        best = self.settings[int(accuracy.argmax())]  # the first of equals
        final = heads(torch.arange(len(y)), [best])
        return accuracy, final.ranks(features.splits["test"][request], features.labels["test"])[0]

    def _details(self, request: Request, held_out: Tensor, features: Features) -> dict[str, Any]:
        best = self.settings[int(held_out.argmax())]
        return {
            "protocol": "linear classifier on frozen features, last epoch",
            "stage": request.stage,
            "hyperparameters": {
                **best._asdict(),
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "momentum": self.momentum,
                "nesterov": self.nesterov,
                "optimizer": self.optimizer,
                "norm": self.norm,
                "schedule": self.schedule,
                "grid": request.grid,
                "pooling": pools.said(request),
                "features": features.splits["train"][request][0].numel(),
            },
            "selection": "learning rate and weight decay with the best top-1 on the held-out "
            "split of the training set, then trained on all of it",
            "tried": [
                {**setting._asdict(), "held_out_top1": accuracy}
                for setting, accuracy in zip(self.settings, held_out.tolist(), strict=True)
            ],
        }
