"""The whole network trained on labels, all of them or a few, from the checkpoint."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.draws import seed_of
from unlabeled.evaluate import pixel_heads
from unlabeled.evaluate.accuracy import label_rank, tops
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.few_labels import labelled
from unlabeled.evaluate.frozen import same_everywhere
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.tuning import (
    Decode,
    Dropout,
    Schedule,
    fit,
    norm_layers,
    optimizer,
    predictions,
)


class Rates(NamedTuple):
    """Peak learning rates of the backbone and of the classifier."""

    trunk: float
    head: float


class FineTune:
    """A linear classifier on the backbone's output, both trained by cross-entropy.

    With `share` below 1 or a `list` this is semi-supervised evaluation: few labels, but the whole
    network learns. Learning rates are those of the batch size given: nothing scales them. Where
    several are given, the best pair on a held-out part of the training images is trained again on
    all of them; the test set is read once, after the last epoch.

    Raw pixels have no weights to tune: their row is of a linear classifier that is trained alike.

    Args:
        decode: gives the random crop of a training image; it is flipped with probability 1/2.
        lr_trunk: learning rates of the backbone to try; 0 keeps its weights.
        lr_head: learning rates of the classifier to try.
        epochs: passes over the labelled images.
        batch_size: images per update, over all processes.
        optimizer: "sgd", "lars" or "adamw".
        momentum: of SGD and LARS.
        nesterov: whether SGD's momentum is Nesterov's.
        weight_decay: of all weights.
        schedule: "cosine" to zero, or "step": times `gamma` at `milestones`.
        milestones: shares of the training at which a step schedule drops.
        gamma: factor of a drop.
        share: of the training images whose labels are used, balanced over classes, fixed by
            the seed.
        list: a text file that names these images instead, one a line: file names as the
            published lists have them (n01440764_10026.JPEG), or paths.
        norm: "train": batch norm uses the batch and learns; "frozen": it stays as it is.
        bf16: compute in bfloat16 where autocast does.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})
    trains = True
    reads_pixels = True
    dropout, warmup = Dropout(0.0), 0.0  # see `Action`

    def __init__(
        self,
        *,
        decode: Decode,
        lr_trunk: Sequence[float] = (0.01,),
        lr_head: Sequence[float] = (0.2,),
        epochs: int = 20,
        batch_size: int = 256,
        optimizer: Literal["sgd", "lars", "adamw"] = "sgd",
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "step"] = "step",
        milestones: Sequence[float] = (0.6, 0.8),
        gamma: float = 0.2,
        share: float = 1.0,
        list: str | None = None,
        norm: Literal["train", "frozen"] = "train",
        bf16: bool = False,
        data: Data | None = None,
    ) -> None:
        if getattr(decode, "count", 1) != 1:
            raise ValueError(f"decode must give one crop of an image, got count={decode.count}")
        if not lr_trunk or min(lr_trunk) < 0:
            raise ValueError(f"lr_trunk must list numbers of at least 0, got {[*lr_trunk]}")
        if not lr_head or min(lr_head) <= 0:
            raise ValueError(f"lr_head must list positive numbers, got {[*lr_head]}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if list is not None and share != 1.0:
            raise ValueError("give either share or list, not both (share=1.0 with a list)")
        if optimizer not in ("sgd", "lars", "adamw"):
            raise ValueError(f"optimizer must be sgd, lars or adamw, got {optimizer!r}")
        if norm not in ("train", "frozen"):
            raise ValueError(f"norm must be train or frozen, got {norm!r}")
        if weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(
                "weight_decay must not be negative and momentum in [0, 1), "
                f"got {weight_decay} and {momentum}"
            )
        self.decode, self.data = decode, data
        self.rates = [Rates(*pair) for pair in itertools.product(lr_trunk, lr_head)]
        self.schedule = Schedule(epochs, batch_size, schedule, tuple(milestones), gamma)
        self.optimizer, self.momentum, self.nesterov = optimizer, momentum, nesterov
        self.weight_decay, self.norm, self.bf16 = weight_decay, norm, bf16
        self.share, self.list = share, list

    def obstacle(self, data: Data) -> str | None:
        """Why the labelled images cannot be found."""
        if self.list is not None and not Path(self.list).expanduser().is_file():
            return f"there is no list of images {self.list}"
        return None

    def tune(self, subject: Subject) -> Result:
        """Trains the subject on its labels, and scores it on the test set."""
        labels, data = subject.data.labels("train"), subject.data
        classes = max(len(data.classes), int(labels.max()) + 1)
        rows = labelled(data, self.share, self.list, subject.seed)
        raw = isinstance(subject.backbone, Pixels)
        every = self.rates
        if raw:
            every = [Rates(0.0, lr) for lr in pixel_heads.rates([r.head for r in self.rates])]
        tried, best = [], every[len(every) // 2 if raw else 0]
        held = torch.isin(rows, data.selection()[1])
        enough = bool(held.any()) and not held.all()
        if len(self.rates) > 1 and not enough:
            raise ValueError(
                f"of the {len(rows)} labelled images none are left to choose a learning rate "
                "on: give one value each for lr_trunk and lr_head, or a larger share"
            )
        if len(every) > 1 and enough:
            chosen_on = rows[held]
            networks = self._networks(subject, rows[~held], every, classes)
            for rates, network in zip(every, networks, strict=True):
                scores = self._answers(network, subject, "train", chosen_on)
                right = label_rank(scores, labels[chosen_on]) == 0
                tried.append({**rates._asdict(), "held_out_top1": right.double().mean().item()})
            best = every[max(range(len(tried)), key=lambda i: tried[i]["held_out_top1"])]
        (network,) = self._networks(subject, rows, [best], classes)
        ranks = label_rank(self._answers(network, subject, "test"), data.labels("test"))
        details = self._details(best, tried, len(rows))
        if raw:
            words = "linear classifier of raw pixels, trained as the network"
            details |= {"protocol": words, "stage": "pixels"}
            if not tried:
                details["selection"] = "none: a tenth of the learning rate that is given"
        right = {f"{self._name()}/{kind}": x for kind, x in tops(ranks, classes).items()}
        return Result(
            {name: x.double().mean().item() for name, x in right.items()},
            {name: details for name in right},
            right,
        )

    def _networks(
        self, subject: Subject, rows: Tensor, every: Sequence[Rates], classes: int
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """A network for each pair of rates, in eval mode; of copies where there are several."""
        if not isinstance(subject.backbone, Pixels):
            for rates in every:
                alone = len(every) == 1
                backbone = subject.backbone if alone else copy.deepcopy(subject.backbone)
                yield self._train(backbone, subject, rows, rates, classes)
            return
        key = (subject.seed, "finetune")
        features = pixel_heads.standardised(subject, rows, self.decode, *key)
        made = pixel_heads.Classifiers(features, classes, len(every), *key, "head")
        groups = made.groups([rates.head for rates in every], self.weight_decay)
        self._fit(made.loss, groups, subject, rows)
        yield from (made.alone(i) for i in range(len(every)))

    def _train(
        self, backbone: nn.Module, subject: Subject, rows: Tensor, rates: Rates, classes: int
    ) -> nn.Module:
        """The backbone with a classifier, trained, in eval mode."""
        dim: int = backbone.dim  # type: ignore[assignment]
        head = nn.Linear(dim, classes)
        generator = torch.Generator().manual_seed(seed_of(subject.seed, "finetune", "head"))
        nn.init.normal_(head.weight, std=0.01, generator=generator)
        nn.init.zeros_(head.bias)
        network = nn.Sequential(backbone, self.dropout, head).to(subject.device).train()
        for layer in norm_layers(backbone) if self.norm == "frozen" or not rates.trunk else []:
            layer.eval()
        backbone.requires_grad_(rates.trunk > 0)
        groups = [
            {"params": [*x.parameters()], "lr": lr, "weight_decay": self.weight_decay, "warmup": w}
            for x, lr, w in ((backbone, rates.trunk, self.warmup), (head, rates.head, 0.0))
            if lr > 0
        ]

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(network(x).float(), y, reduction="sum")

        self._fit(loss, groups, subject, rows)
        same_everywhere(network)  # running statistics
        return network.eval()

    def _fit(self, loss: Any, groups: list[Any], subject: Subject, rows: Tensor) -> None:
        made = optimizer(self.optimizer, groups, momentum=self.momentum, nesterov=self.nesterov)
        key, rest = (subject.seed, "finetune"), {"bf16": self.bf16, "dropout": self.dropout}
        fit(loss, made, subject, rows, self.schedule, self.decode, *key, **rest)

    def _answers(
        self, network: Any, subject: Subject, split: str, rows: Tensor | None = None
    ) -> Tensor:
        """Scores (n, classes) of images at positions `rows`, or of the split."""
        return predictions(network, subject, split, rows)

    def _name(self) -> str:
        return "list" if self.list else f"{100 * self.share:g}pct"

    def _details(self, best: Rates, tried: list[dict[str, Any]], count: int) -> dict[str, Any]:
        schedule = self.schedule
        return {
            "protocol": "whole network fine-tuned on labels, last epoch",
            "stage": "final",
            "hyperparameters": {
                "lr_trunk": best.trunk,
                "lr_head": best.head,
                "epochs": schedule.epochs,
                "batch_size": schedule.batch_size,
                "optimizer": self.optimizer,
                "momentum": self.momentum,
                "weight_decay": self.weight_decay,
                "schedule": schedule.kind,
                "milestones": [*schedule.milestones],
                "norm": self.norm,
                "labelled": count,
                "list": self.list,
            },
            "selection": "learning rates with the best top-1 on the held-out split of the labelled "
            "training images, then trained on all of them"
            if tried
            else "none: learning rates are given",
            "tried": tried,
        }
