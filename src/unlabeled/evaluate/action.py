"""Recognition of actions: a network of clips or pictures learns the classes of recordings."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unlabeled.draws import seed_of
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.finetune import FineTune
from unlabeled.evaluate.forward import images
from unlabeled.evaluate.intervals import percentiles
from unlabeled.evaluate.tuning import Decode

RESAMPLES = 1000


class Action(FineTune):
    """A classifier of clips, or of pictures, whose scores are averaged over each recording.

    As the two-stream networks of Simonyan and Zisserman (2014) and their followers are tested:
    clips (or pictures) at equal distances over a test recording, the softmax of each, the mean of
    these. Each epoch trains on one random clip of every recording. With `lr_trunk=[0]` the
    backbone stays as it is: scores are called `linear`, else `finetune`. Official splits are
    trained one after the other, each from the checkpoint; the score is the mean over them, the
    interval is over test recordings, resampled within each split.

    Args:
        decode: gives the random clip, or picture, of a training recording; it is mirrored with
            probability 1/2.
        test_decode: gives the clips, or pictures, of a test recording: as many `crops`.
        folds: official splits, e.g. [1, 2, 3]; empty: the data module's own.
        lr_trunk: learning rates of the backbone to try; [0] keeps its weights.
        lr_head: as of `FineTune`, and so are all arguments below.
        epochs: passes over the recordings, one clip of each.
        batch_size: clips per update, over all processes.
        optimizer: "sgd", "lars" or "adamw".
        momentum: of SGD and LARS.
        nesterov: whether SGD's momentum is Nesterov's.
        weight_decay: of all weights.
        schedule: "cosine" or "step".
        milestones: shares of the training at which a step schedule drops.
        gamma: factor of a drop.
        norm: "train" or "frozen".
        bf16: compute in bfloat16 where autocast does.
        data: another data module than the run's.
    """

    def __init__(
        self,
        *,
        decode: Decode,
        test_decode: Any,
        folds: Sequence[int] = (),
        lr_trunk: Sequence[float] = (0.01,),
        lr_head: Sequence[float] = (0.1,),
        epochs: int = 20,
        batch_size: int = 64,
        optimizer: Literal["sgd", "lars", "adamw"] = "sgd",
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        schedule: Literal["cosine", "step"] = "step",
        milestones: Sequence[float] = (0.6, 0.8),
        gamma: float = 0.1,
        norm: Literal["train", "frozen"] = "train",
        bf16: bool = False,
        data: Data | None = None,
    ) -> None:
        super().__init__(
            decode=decode,
            lr_trunk=lr_trunk,
            lr_head=lr_head,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            schedule=schedule,
            milestones=milestones,
            gamma=gamma,
            norm=norm,
            bf16=bf16,
            data=data,
        )
        if len(set(folds)) < len(folds):
            raise ValueError(f"folds names a split twice: {[*folds]}")
        self.test_decode, self.folds = test_decode, tuple(folds)

    def obstacle(self, data: Data) -> str | None:
        """Why these data have no clips, or no such splits."""
        if not hasattr(data, "fold"):
            return "it needs recordings, as data=video_folder, and these are images"
        if self.folds and not hasattr(data.layout, "fold"):  # type: ignore[attr-defined]
            return f"these data have no official splits {[*self.folds]}: set folds=[]"
        return None

    def tune(self, subject: Subject) -> Result:
        """Trains the subject, or a copy for each split, and scores it on test recordings."""
        if not self.folds:
            return super().tune(subject)
        found: dict[int, Result] = {}
        for number in self.folds:
            own = copy.deepcopy(subject.backbone)
            data = subject.data.fold(number)
            found[number] = super().tune(replace(subject, backbone=own, data=data, features={}))
        first = found[self.folds[0]]
        scores, details = {}, {}
        for name, known in first.details.items():
            each = {n: r.per_image[name].double() for n, r in found.items()}
            means = {n: x.mean().item() for n, x in each.items()}
            settings = {n: r.details[name]["hyperparameters"] for n, r in found.items()}
            scores[name] = sum(means.values()) / len(means)
            details[name] = {
                **known,
                "hyperparameters": settings[self.folds[0]],
                "by_fold": means,
                "hyperparameters_by_fold": settings,
                "tried": {n: r.details[name]["tried"] for n, r in found.items()},
                "n": sum(len(x) for x in each.values()),
                "ci95": list(_interval([*each.values()], subject.seed)),
            }
        return Result(scores, details, {})

    def _tested(self, network: nn.Module, subject: Subject) -> Tensor:
        parts = torch.arange(subject.data.size("test")).split(32)
        scan = subject.data.cut("test", [p.tolist() for p in parts], self.test_decode, "plain")
        found = []
        with torch.no_grad():
            for i, batch in enumerate(scan):
                clips = [network(images(x, subject.device)) for x in batch["crops"]]
                found.append(torch.stack(clips).float().softmax(-1).mean(0).cpu())
                subject.progress("test recordings", i + 1, len(parts))
        return torch.cat(found)

    def _name(self) -> str:
        return "finetune" if max(rates.trunk for rates in self.rates) > 0 else "linear"

    def _details(self, best: Any, tried: list[dict[str, Any]], count: int) -> dict[str, Any]:
        known = super()._details(best, tried, count)
        what = "whole network" if best.trunk else "linear classifier on a frozen backbone"
        known["protocol"] = f"{what}, a random clip an epoch; softmax averaged over test clips"
        known["hyperparameters"] |= {"test": repr(self.test_decode), "folds": [*self.folds]}
        return known


def _interval(each: Sequence[Tensor], seed: int) -> tuple[float, float]:
    """Of the mean over splits of the means over recordings (n,) of each."""
    generator = torch.Generator().manual_seed(seed_of(seed, "action", "bootstrap"))
    means = torch.zeros(RESAMPLES, dtype=torch.float64)
    for x in each:
        for i in range(RESAMPLES):
            drawn = torch.randint(len(x), (len(x),), generator=generator)
            means[i] += x[drawn].mean() / len(each)
    return percentiles(means.tolist())
