"""Linear classifiers on a frozen backbone whose training images are cropped at random."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.draws import seed_of
from unlabeled.evaluate import pooling as pools
from unlabeled.evaluate.accuracy import label_rank, tops
from unlabeled.evaluate.contract import FINAL, Data, Result, Subject, none_to_choose_on
from unlabeled.evaluate.forward import pooled
from unlabeled.evaluate.frozen import frozen, same_everywhere
from unlabeled.evaluate.heads import Setting
from unlabeled.evaluate.pooling import Pooling
from unlabeled.evaluate.store import shapes_of
from unlabeled.evaluate.tuning import Decode, Schedule, fit, optimizer, predictions


class LinearAugmented:
    """As `Linear`, but every epoch sees new crops: the published protocols, at their cost.

    Nothing is cached: each image passes the frozen trunk once an epoch, and all stages, learning
    rates and weight decays learn from that one pass. Every setting is trained on a part of the
    training images, and the best on the held-out rest is tested as it is (training it again on
    all would double the cost); with a single setting all images train it. A stage's map is
    pooled to the finest grid that keeps at most `max_features` numbers.

    Args:
        decode: gives the random crop of a training image; it is flipped with probability 1/2.
        stages: names of stages, "final" being the backbone's output, or "all".
        lrs: learning rates to try, at this batch size: nothing scales them.
        weight_decays: weight decays to try, each with every learning rate.
        epochs: passes over the images.
        batch_size: images per update, over all processes.
        optimizer: "sgd" or "lars".
        momentum: of either.
        nesterov: whether SGD's momentum is Nesterov's.
        norm: "batch": a batch norm in front of each classifier, without parameters; "none".
        schedule: "cosine" to zero, or "step": times `gamma` at `milestones`.
        milestones: shares of the training at which a step schedule drops.
        gamma: factor of a drop.
        pooling: "adaptive" cells or "published" windows: see `Linear`.
        max_features: of a stage, after pooling.
        bf16: compute the trunk in bfloat16 where autocast does.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})
    trains = True
    reads_pixels = True

    def __init__(
        self,
        *,
        decode: Decode,
        stages: Literal["all"] | Sequence[str] = "all",
        lrs: Sequence[float] = (0.01,),
        weight_decays: Sequence[float] = (5e-4,),
        epochs: int = 28,
        batch_size: int = 256,
        optimizer: Literal["sgd", "lars"] = "sgd",
        momentum: float = 0.9,
        nesterov: bool = True,
        norm: Literal["batch", "none"] = "batch",
        schedule: Literal["cosine", "step"] = "step",
        milestones: Sequence[float] = (8 / 28, 16 / 28, 24 / 28),
        gamma: float = 0.1,
        pooling: Pooling = "adaptive",
        max_features: int = 9216,
        bf16: bool = False,
        data: Data | None = None,
    ) -> None:
        if getattr(decode, "count", 1) != 1:
            raise ValueError(f"decode must give one crop of an image, got count={decode.count}")
        if isinstance(stages, str) and stages != "all":
            raise ValueError(f"stages must be 'all' or a list of names, got {stages!r}")
        if not stages:
            raise ValueError("stages is empty: name a stage, or say 'all'")
        if not lrs or min(lrs) <= 0:
            raise ValueError(f"lrs must list positive learning rates, got {list(lrs)}")
        if not weight_decays or min(weight_decays) < 0:
            raise ValueError(f"weight_decays must not be negative, got {list(weight_decays)}")
        if optimizer not in ("sgd", "lars"):
            raise ValueError(f"optimizer must be sgd or lars, got {optimizer!r}")
        if norm not in ("batch", "none"):
            raise ValueError(f"norm must be batch or none, got {norm!r}")
        pools.checked("all", pooling, max_features)
        self.decode, self.data = decode, data
        self.stages = stages if isinstance(stages, str) else tuple(stages)
        pairs = itertools.product(lrs, weight_decays)
        self.settings = [Setting(float(lr), float(decay)) for lr, decay in pairs]
        self.schedule = Schedule(epochs, batch_size, schedule, tuple(milestones), gamma)
        self.optimizer, self.momentum, self.nesterov = optimizer, momentum, nesterov
        self.norm, self.max_features, self.bf16 = norm, max_features, bf16
        self.pooling: Pooling = pooling

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        return none_to_choose_on(data) if len(self.settings) > 1 else None

    def tune(self, subject: Subject) -> Result:
        """Trains heads on the subject, which stays as it is, and scores them."""
        data, several, labels = subject.data, len(self.settings) > 1, subject.data.labels("train")
        classes = max(len(data.classes), int(labels.max()) + 1)
        fits, held_out = data.selection() if several else (torch.arange(len(labels)), None)
        with frozen(subject.backbone):
            heads = self._heads(subject, classes)
            groups = [
                {"params": [*head.parameters()], "lr": s.lr, "weight_decay": s.weight_decay}
                for heads_of in heads.values()
                for head, s in zip(heads_of, self.settings, strict=True)
            ]
            with torch.enable_grad():
                fit(
                    lambda x, y: self._loss(subject.backbone, heads, x, y),
                    optimizer(
                        self.optimizer, groups, momentum=self.momentum, nesterov=self.nesterov
                    ),
                    subject,
                    fits,
                    self.schedule,
                    self.decode,
                    *(subject.seed, "linear_augmented"),
                    bf16=self.bf16,
                )
            for heads_of in heads.values():
                same_everywhere(heads_of.eval())  # running statistics

            def every(x: Tensor) -> Tensor:  # B stages settings classes
                maps = self._features(subject.backbone, x)
                found = [[h(maps[stage]) for h in of] for stage, of in heads.items()]
                return torch.stack([torch.stack(some, 1) for some in found], 1)

            tested = predictions(every, subject, "test")
            tried = predictions(every, subject, "train", held_out) if several else None
        return self._result(list(heads), tested, tried, labels, held_out, data, classes)

    def _heads(self, subject: Subject, classes: int) -> dict[str, nn.ModuleList]:
        """For every stage one classifier per setting, all starting from the same weights."""
        shapes = shapes_of(subject.backbone, subject.data, subject.device)
        self.cells = {
            name: pools.cells(name, shape, self.pooling, self.max_features)
            for name, shape in shapes.maps.items()
        }
        sizes = {name: shapes.maps[name][0] * r.grid**2 for name, r in self.cells.items()}
        if not (shapes.pooled and list(self.cells.values())[-1].grid == 1):
            sizes["final"] = shapes.dim
        if self.stages != "all" and "pixels" not in shapes.maps:
            known = {**sizes, "final": shapes.dim}
            if unknown := [name for name in self.stages if name not in known]:
                raise ValueError(f"the backbone has no stages {unknown}; it has {list(known)}")
            sizes = {name: known[name] for name in self.stages}
        heads: dict[str, nn.ModuleList] = {}
        for name, size in sizes.items():
            channels = shapes.maps[name][0] if name in self.cells else size
            generator = torch.Generator().manual_seed(seed_of(subject.seed, "head", name))
            weight = 0.01 * torch.randn(classes, size, generator=generator)
            heads[name] = nn.ModuleList(
                _Head(channels, weight, norm=self.norm == "batch") for _ in self.settings
            ).to(subject.device)
        return heads

    def _features(self, backbone: nn.Module, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            maps: dict[str, Tensor] = backbone.stages(x) if self.cells else {}  # type: ignore
            found = {name: pooled(maps[name].float(), r) for name, r in self.cells.items()}
            return {**found, "final": backbone(x).float()[:, :, None, None]}

    def _loss(
        self, backbone: nn.Module, heads: dict[str, nn.ModuleList], x: Tensor, y: Tensor
    ) -> Tensor:
        # The sum over heads: each learns from its own term alone.
        features = self._features(backbone, x)
        terms = [
            F.cross_entropy(head(features[stage]), y, reduction="sum")
            for stage, heads_of in heads.items()
            for head in heads_of
        ]
        return torch.stack(terms).sum()

    def _result(
        self,
        stages: list[str],
        tested: Tensor,
        tried: Tensor | None,
        labels: Tensor,
        held_out: Tensor | None,
        data: Any,
        classes: int,
    ) -> Result:
        scores, details, right = {}, {}, {}
        for i, stage in enumerate(stages):
            accuracy = [0.0]
            if tried is not None and held_out is not None:
                ranks = label_rank(tried[:, i].transpose(0, 1), labels[held_out])
                accuracy = (ranks == 0).double().mean(1).tolist()
            best = max(range(len(accuracy)), key=lambda s: accuracy[s])
            ranks = label_rank(tested[:, i, best], data.labels("test"))
            for kind, x in tops(ranks, classes).items():
                name = f"{stage}/{kind}"
                scores[name], right[name] = x.double().mean().item(), x
                details[name] = self._details(stage, best, accuracy)
        return Result(scores, details, right)

    def _details(self, stage: str, best: int, accuracy: list[float]) -> dict[str, Any]:
        schedule, several = self.schedule, len(self.settings) > 1
        return {
            "protocol": "linear classifier on a frozen trunk, random crops and flips, last epoch",
            "stage": stage,
            "hyperparameters": {
                **self.settings[best]._asdict(),
                "epochs": schedule.epochs,
                "batch_size": schedule.batch_size,
                "optimizer": self.optimizer,
                "momentum": self.momentum,
                "nesterov": self.nesterov,
                "norm": self.norm,
                "schedule": schedule.kind,
                "grid": (cells := self.cells.get(stage, FINAL)).grid,
                "pooling": pools.said(cells),
            },
            "selection": "learning rate and weight decay with the best top-1 on the held-out "
            "split of the training set, tested as trained without it"
            if several
            else "none: learning rate and weight decay are given",
            "tried": [
                {**s._asdict(), "held_out_top1": a}
                for s, a in zip(self.settings, accuracy, strict=True)
            ]
            if several
            else [],
        }


class _Head(nn.Module):
    """Batch norm without parameters over channels, or none, and a linear layer."""

    def __init__(self, channels: int, weight: Tensor, *, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False) if norm else nn.Identity()
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(torch.zeros(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self.norm(x.float()).flatten(1), self.weight, self.bias)
