"""Surface normals of every pixel, by classification into a codebook of directions."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import normalize
from unlabeled.draws import Draws, seed_of, subset
from unlabeled.evaluate.annotated import (
    FROZEN,
    Counted,
    Poly,
    check_stages,
    chosen,
    first,
    freeze,
    lacks,
    maps_of,
    resized,
)
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.dense import Dense, LinearMaps, PyramidPooling, dilate_to_eight
from unlabeled.evaluate.directions import Words, codebook
from unlabeled.evaluate.frozen import frozen, same_everywhere
from unlabeled.evaluate.iterations import Place, seeded, train
from unlabeled.evaluate.normals_scored import figure, score
from unlabeled.evaluate.trunk import unfit
from unlabeled.truth import UNKNOWN

AUXILIARY = 0.4  # weight of the auxiliary head's loss (Zhao et al., 2017)


class Example(NamedTuple):
    """A training image and its words."""

    image: Tensor  # (3, h, w) in [0, 1]
    words: Tensor  # (h, w) uint8


class Normals:
    """Each pixel's surface normal, from a head on the backbone's maps.

    After Wang et al. (2015) and Goyal et al. (2019, section 6.4): the training set's normals
    are clustered into words, a head classifies every pixel, and the prediction is the sum of
    the words' directions weighted by the softmax, normalised. Errors are angles, pooled over
    all known pixels of all test images, in their own resolution: `mean_degrees`,
    `median_degrees` (to 0.01 degrees) and `within_11.25`, `_22.5`, `_30`, shares of pixels.
    Intervals are over images. Images are read whole, in their own proportions, and never
    mirrored.

    Args:
        words: directions in the codebook.
        stages: what the linear head reads: "all", "last", or names.
        head: "linear": on every stage's map; "pyramid": pyramid pooling on the last stage.
        freeze_at: how many of (stem, res2, res3, res4, res5) keep their weights; 5: all.
        dilate: res4 and res5 keep the resolution of res3.
        steps: updates.
        batch_size: images per update, over all processes.
        lr: peak learning rate, of this batch; 0.02 with pyramid pooling, as published.
        power: of its polynomial fall to zero.
        momentum: of SGD.
        weight_decay: of weights but those of norms.
        sides: short sides in pixels; every update draws one. None: images as they are.
        test_sides: short sides over which the softmax is averaged. None: images as they are.
        loss_stride: pixels of the image per side of a pixel of the loss.
        limit: training images that are used.
        pictures: test images on the sheet.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})
    trains = True
    needs_labels = False
    reads_pixels = True

    def __init__(
        self,
        *,
        words: int = 40,
        stages: Literal["all", "last"] | Sequence[str] = "all",
        head: Literal["linear", "pyramid"] = "linear",
        freeze_at: int = FROZEN,
        dilate: bool = False,
        steps: int = 1000,
        batch_size: int = 16,
        lr: float = 4.0,
        power: float = 0.9,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        sides: Sequence[int] | None = None,
        test_sides: Sequence[int] | None = None,
        loss_stride: int = 1,
        limit: int | None = None,
        pictures: int = 8,
        data: Data | None = None,
    ) -> None:
        if not 2 <= words <= 255:
            raise ValueError(f"words must be from 2 to 255, got {words}")
        if head not in ("linear", "pyramid"):
            raise ValueError(f"head must be linear or pyramid, got {head!r}")
        if not 0 <= freeze_at <= FROZEN:
            raise ValueError(f"freeze_at must be from 0 to {FROZEN}, got {freeze_at}")
        for name, value in (("sides", sides), ("test_sides", test_sides)):
            if value is not None and (not value or min(value) < 1):
                raise ValueError(f"{name} must list pixels, or be null, got {list(value)}")
        for name, value in (("loss_stride", loss_stride), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if pictures < 0:
            raise ValueError(f"pictures must not be negative, got {pictures}")
        if power < 0:
            raise ValueError(f"power must not be negative, got {power}")
        self.words, self.head, self.stages = words, head, check_stages(stages)
        self.freeze_at, self.dilate = freeze_at, dilate
        self.schedule = Poly(
            steps, batch_size, lr, momentum=momentum, weight_decay=weight_decay, power=power
        )
        self.sides = (None,) if sides is None else tuple(sides)
        self.test_sides = (None,) if test_sides is None else tuple(test_sides)
        self.loss_stride, self.limit, self.pictures = loss_stride, limit, pictures
        self.data = data
        self._known: tuple[tuple[Any, ...], Words] | None = None

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        return lacks(data, "normals")

    def misfit(self, backbone: nn.Module) -> str | None:
        """Why this backbone cannot be trained so."""
        if self.dilate:
            return unfit(backbone, ("res3", "res4"), ("res4", "res5"))
        return unfit(backbone) if 1 < self.freeze_at < FROZEN else None

    def tune(self, subject: Subject) -> Result:
        """Trains a head, and what of the backbone is not frozen, and scores it."""
        n = subject.data.size("train")
        rows = subset(None, n, min(n, self.limit or n), subject.seed, "normals", "limit")
        known = self._codebook(subject, rows)
        raw = not any(True for _ in subject.backbone.parameters())  # pixels have no stage to dilate
        if self.dilate and not raw:
            dilate_to_eight(subject.backbone)
        learns = self.freeze_at < FROZEN and not raw
        with nullcontext() if learns else frozen(subject.backbone):
            network, still = self._network(subject, learns)
            images = subject.data

            def load(place: Place) -> Example:
                draws = Draws(subject.seed, "normals", "side", place.step)
                side = self.sides[int(draws.integers(len(self.sides)))]
                at = int(rows[place.position])
                return Example(resized(images.image("train", at), side), known.maps[place.position])

            with torch.enable_grad():
                train(
                    lambda some: self._loss(network, some, subject.device),
                    network,
                    replace(subject, data=Counted(len(rows))),
                    load,
                    self.schedule,
                    *(subject.seed, "normals"),
                    still=still,
                )
            same_everywhere(network)  # running statistics
            made = score(network, subject, known, self.test_sides, self.pictures)
        details = {name: self._details(network.stages, len(rows)) for name in made.values}
        for name, detail in details.items():
            detail |= {"ci95": list(made.intervals[name]), "n": subject.data.size("test")}
            detail["constant"] = made.constant[name]  # the same of the mean direction
            if name.endswith("_degrees"):  # an error; the others are shares that are within
                detail["better"] = "lower"
        return Result(made.values, details, {}, figure(made))

    def _codebook(self, subject: Subject, rows: Tensor) -> Words:
        """Words of these training images, made once for the backbone and its baselines."""
        key = (id(subject.data), subject.data.split_hash(), subject.seed, len(rows))
        if self._known is None or self._known[0] != key:
            made = codebook(
                subject.data.annotation("train", "normals"),
                rows,
                self.words,
                seed_of(subject.seed, "normals", "codebook"),
                subject.progress,
                subject.device,
            )
            self._known = (key, made)
        return self._known[1]

    def _network(self, subject: Subject, learns: bool) -> tuple[Dense, list[nn.Module]]:
        backbone = subject.backbone
        raw = not any(True for _ in backbone.parameters())
        still = freeze(backbone, self.freeze_at if learns else FROZEN)
        with torch.no_grad():
            maps = maps_of(backbone.eval(), normalize(first(subject)[None].to(subject.device)))
        channels = {name: m.shape[1] for name, m in maps.items()}
        if self.head == "pyramid" and not raw and len(channels) < 2:
            raise ValueError("head=pyramid reads two stages, and the backbone has one")
        with seeded(torch.device("cpu"), subject.seed, "normals", "head"):
            if self.head == "pyramid" and not raw:
                head: nn.Module = PyramidPooling(channels, self.words)
            else:
                names = chosen(channels, self.stages)
                head = LinearMaps({name: channels[name] for name in names}, self.words)
        return Dense(backbone, head, learns=learns).to(subject.device), still

    def _loss(self, network: Dense, some: list[Example], device: torch.device) -> Tensor:
        h, w = (max(e.image.shape[i] for e in some) for i in (1, 2))
        images, words = [], []
        for image, true in some:
            at = F.interpolate(true[None, None].float(), image.shape[1:], mode="nearest-exact")[0]
            room = (0, w - image.shape[2], 0, h - image.shape[1])
            images.append(F.pad(normalize(image), room))
            words.append(F.pad(at, room, value=UNKNOWN))
        size = (-(-h // self.loss_stride), -(-w // self.loss_stride))
        target = F.interpolate(torch.stack(words), size, mode="nearest-exact")
        target = target[:, 0].long().to(device)
        count = (target != UNKNOWN).sum().clamp(min=1)
        answers = network(torch.stack(images).to(device), size)
        terms = [
            F.cross_entropy(x, target, ignore_index=UNKNOWN, reduction="sum") / count
            for x in answers
        ]
        return terms[0] + AUXILIARY * sum(terms[1:])

    def _details(self, stages: list[str], used: int) -> dict[str, Any]:
        return {
            "protocol": f"surface normals by {self.words} words, "
            + ("frozen trunk" if self.freeze_at == FROZEN else "part of the trunk trained"),
            "stage": "+".join(stages),
            "hyperparameters": {
                "head": self.head,
                "words": self.words,
                "freeze_at": self.freeze_at,
                "dilate": self.dilate,
                "sides": list(self.sides),
                "test_sides": list(self.test_sides),
                "loss_stride": self.loss_stride,
                "images": used,
                **self.schedule.said(),
            },
            "selection": "none: settings are given, last update",
        }
