"""Recognition of actions: a network of clips or pictures learns the classes of recordings."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.finetune import FineTune
from unlabeled.evaluate.folds import distinct, missing, together
from unlabeled.evaluate.forward import images
from unlabeled.evaluate.shares import share
from unlabeled.evaluate.tuning import Decode, Dropout


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
        dropout: share of the features that the classifier does not see, drawn for each clip.
        warmup: share of the training in which the classifier alone learns; batch norm's
            statistics follow the clips from the start, unless `norm` is frozen.
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
        dropout: float = 0.0,
        warmup: float = 0.0,
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
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {warmup}")
        self.dropout, self.warmup = Dropout(dropout), warmup
        self.test_decode, self.folds = test_decode, distinct(folds)

    def obstacle(self, data: Data) -> str | None:
        """Why these data have no clips, or no such splits."""
        if not hasattr(data, "fold"):
            return "it needs recordings, as data=video_folder, and these are images"
        return missing(self.folds, data)

    def tune(self, subject: Subject) -> Result:
        """Trains the subject, or a copy for each split, and scores it on test recordings."""
        if not self.folds:
            return super().tune(subject)
        found: dict[int, Result] = {}
        for number in self.folds:
            own = copy.deepcopy(subject.backbone)
            data = subject.data.fold(number)
            found[number] = super().tune(replace(subject, backbone=own, data=data, features={}))
        return together(found, subject.seed, "action", "bootstrap")

    def _answers(
        self, network: Any, subject: Subject, split: str, rows: Tensor | None = None
    ) -> Tensor:
        rows = torch.arange(subject.data.size(split)) if rows is None else rows
        mine = share(len(rows))
        parts = rows[mine.start : mine.stop].split(32)
        scan = subject.data.cut(split, [p.tolist() for p in parts], self.test_decode, "plain")
        found = []
        with torch.no_grad():
            for i, batch in enumerate(scan):
                clips = [network(images(x, subject.device)) for x in batch["crops"]]
                found.append(torch.stack(clips).float().softmax(-1).mean(0).cpu())
                subject.progress(f"{split} recordings", i + 1, len(parts))
        return mine.all(torch.cat(found), subject.device)

    def _name(self) -> str:
        return "finetune" if max(rates.trunk for rates in self.rates) > 0 else "linear"

    def _details(self, best: Any, tried: list[dict[str, Any]], count: int) -> dict[str, Any]:
        known = super()._details(best, tried, count)
        what = "whole network" if best.trunk else "linear classifier on a frozen backbone"
        known["protocol"] = f"{what}, a random clip an epoch; softmax averaged over test clips"
        known["hyperparameters"] |= {"test": repr(self.test_decode), "folds": [*self.folds]}
        known["hyperparameters"] |= {"dropout": self.dropout.share, "warmup": self.warmup}
        return known
