"""Recognition of sounds: a linear classifier on the frozen network of a backbone that listens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.evaluate.accuracy import label_rank, tops
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.folds import distinct, missing, together
from unlabeled.evaluate.forward import SOUND
from unlabeled.evaluate.frozen import frozen
from unlabeled.evaluate.shares import share
from unlabeled.evaluate.sound_heads import Head

BATCH = 16  # recordings that are decoded together
SPANS = 32  # per forward: a large network's maps of spectrograms take much memory


class Sound:
    """Classes of recordings by what is heard: spans of each, whose scores are averaged.

    As SoundNet's and Look, Listen and Learn's features are tested: spans at equal distances over
    a recording, each of which is a sample to train on; of a test recording the class of the
    highest mean score. Where there are several settings, those with the best accuracy on held-out
    training recordings (of one source all or none) are trained again on all of them. Official
    splits are taken one after the other: the score is the mean over them, the interval is over
    test recordings, resampled within each split. Raw log-spectrograms are the baseline of pixels.

    Args:
        decode: gives the spans of a recording: `audio` (spans, samples). Where it has no `sound`,
            length and rate are those of `data.eval_decode.sound`: those of the training.
        head: the classifier.
        folds: official splits, e.g. [1, 2, 3, 4, 5]; empty: the data module's own.
        pool: the last stage's maps are max-pooled to so many cells, [frequencies, times]; None:
            features as the network of sound gives them.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})
    trains = True  # takes long: see `Tuned`
    reads_pixels = True
    hears = True

    def __init__(
        self,
        *,
        decode: Any,
        head: Head,
        folds: Sequence[int] = (),
        pool: Sequence[int] | None = None,
        data: Data | None = None,
    ) -> None:
        if pool is not None and (len(pool) != 2 or min(pool) < 1):
            raise ValueError(f"pool must be two positive numbers of cells or null, got {[*pool]}")
        self.decode, self.head, self.data = decode, head, data
        self.folds, self.pool = distinct(folds), None if pool is None else (pool[0], pool[1])

    def obstacle(self, data: Data) -> str | None:
        """Why these data have no sound, or no such splits."""
        if not hasattr(data, "sounding"):
            return "it needs recordings with sound, as data=audio_folder, and these are images"
        if not data.sounding("train"):  # type: ignore[attr-defined]
            return "these recordings have no sound"
        if self.decode.sound is None and _sound(data) is None:
            return (
                "length and rate of sound are not known: set data.eval_decode.sound, to those of "
                "the training"
            )
        return missing(self.folds, data)

    def misfit(self, backbone: nn.Module) -> str | None:
        """Why it cannot: the backbone does not listen."""
        if not hasattr(backbone, "hear"):
            return (
                f"the backbone {type(backbone).__name__} does not listen: choose one with a "
                "network of sound, as backbone=audio_video"
            )
        if self.pool is not None and not hasattr(backbone, "hear_stages"):
            return f"the backbone {type(backbone).__name__} has no maps of sound: set pool=null"
        return None

    def tune(self, subject: Subject) -> Result:
        """Scores the subject, which is only looked at."""
        known: dict[str, Tensor] = {}
        if not self.folds:
            return self._split(subject, known)
        found = {}
        for number in self.folds:
            data = subject.data.fold(number)
            found[number] = self._split(replace(subject, data=data, features={}), known)
        return together(found, subject.seed, "sound", "bootstrap")

    def _split(self, subject: Subject, known: dict[str, Tensor]) -> Result:
        data, head = subject.data, self.head
        x, test = (self._features(subject, side, known) for side in ("train", "test"))
        y, truth = data.labels("train"), data.labels("test")
        classes = max(len(data.classes), int(max(y.max(), truth.max())) + 1)

        def scores(rows: Tensor, asked: Tensor, settings: Sequence[Any]) -> list[Tensor]:
            """(n, C) of recordings, for each setting, trained on some rows."""
            spans = x.shape[1]
            found = head.answers(
                x[rows].flatten(0, 1),
                y[rows].repeat_interleave(spans),
                asked.flatten(0, 1),
                settings,
                classes=classes,
                seed=subject.seed,
                device=subject.device,
            )
            return [s.view(len(asked), spans, -1).mean(1) for s in found]

        tried, best = [], head.settings[0]
        if len(head.settings) > 1:
            fits, held = data.selection()
            if not len(held):
                raise ValueError(
                    "no training recordings are left to choose a setting on: give one, or raise "
                    "data.val_share"
                )
            for setting, s in zip(head.settings, scores(fits, x[held], head.settings), strict=True):
                right = label_rank(s, y[held]) == 0
                tried.append({**setting, "held_out_top1": right.double().mean().item()})
            best = head.settings[max(range(len(tried)), key=lambda i: tried[i]["held_out_top1"])]
        (s,) = scores(torch.arange(len(y)), test, [best])
        right = tops(label_rank(s, truth), classes)
        details = self._details(subject, {**best}, tried, x)
        per_image = {f"{head.name}/{kind}": hits for kind, hits in right.items()}
        return Result(
            {name: hits.double().mean().item() for name, hits in per_image.items()},
            {name: details for name in per_image},
            per_image,
        )

    def _features(self, subject: Subject, side: str, known: dict[str, Tensor]) -> Tensor:
        """(n, spans, d) float32 of a split; those that another split had are in `known`."""
        data, net = subject.data, subject.backbone
        names = self._names(data, side)
        todo = [i for i, name in enumerate(names) if name not in known]
        if not todo:
            return torch.stack([known[name] for name in names])
        mine, made = share(len(todo)), []
        own = mine.of(todo)
        parts = [own[i : i + BATCH] for i in range(0, len(own), BATCH)]
        scan = data.cut(side, parts, self.decode.of(_sound(data)), "plain")
        with frozen(net):
            for done, batch in enumerate(scan, 1):
                count, spans, samples = batch["audio"].shape
                each = batch["audio"].view(-1, samples).split(SPANS)
                found = torch.cat([self._heard(net, a.to(subject.device)) for a in each])
                if not found.isfinite().all():
                    raise FloatingPointError(
                        "features of sound are not finite: did the training diverge?"
                    )
                made.append(found.view(count, spans, -1))
                subject.progress(f"sounds, {side}", done, len(parts))
        every = mine.all(torch.cat(made), subject.device)
        known |= {names[i]: features for i, features in zip(todo, every, strict=True)}
        return torch.stack([known[name] for name in names])

    def _heard(self, net: nn.Module, audio: Tensor) -> Tensor:
        """(B, d) on the CPU, of spans (B, samples)."""
        stages = getattr(net, "hear_stages", None)
        if self.pool is None or stages is None:  # as the spectrograms themselves
            return net.hear(audio).float().cpu()  # type: ignore[operator]
        maps = list(stages(audio).values())[-1]
        return F.adaptive_max_pool2d(maps.float(), self.pool).flatten(1).cpu()

    def _names(self, data: Any, side: str) -> list[str]:
        """What tells recordings apart: in files, where they lie, for all official splits."""
        sides = {s: [data.path(s, i) for i in range(data.size(s))] for s in self.splits}
        if self.folds and len({name for each in sides.values() for name in each}) == sum(
            len(each) for each in sides.values()
        ):
            return sides[side]
        number = getattr(data.layout, "fold", 0)
        return [f"{number} {side} {i}" for i in range(data.size(side))]

    def _details(
        self, subject: Subject, best: dict[str, float], tried: list[dict[str, float]], x: Tensor
    ) -> dict[str, Any]:
        return {
            "protocol": f"{self.head.protocol}; scores averaged over the spans of a recording",
            "stage": SOUND,
            "hyperparameters": {
                **best,
                **self.head.common,
                "spans": repr(self.decode.of(_sound(subject.data))),
                "pool": self.pool and [*self.pool],
                "features": x.shape[2],
                "folds": [*self.folds],
            },
            "selection": "the setting with the best top-1 on held-out training recordings, then "
            "trained on all of them"
            if tried
            else "none: the setting is given",
            "tried": tried,
        }


def _sound(data: Any) -> Any:
    """Length and rate of what evaluations of these data hear, or None."""
    return getattr(getattr(data, "eval_decode", None), "sound", None)
