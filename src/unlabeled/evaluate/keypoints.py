"""Key-points of objects, regressed from the backbone's features."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unlabeled.draws import Draws, subset
from unlabeled.evaluate.annotated import FROZEN, Counted, Poly, freeze, lacks
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.frozen import frozen
from unlabeled.evaluate.iterations import Place, train
from unlabeled.evaluate.keypoints_scored import Limits, predicted, scored, sheet
from unlabeled.evaluate.posed import Cutter, Example, Objects, Unit, flipped, objects
from unlabeled.evaluate.regressor import loss, regressor
from unlabeled.evaluate.trunk import unfit


class KeyPoints:
    """Coordinates of every key-point, by regression from a crop (Toshev and Szegedy, 2014).

    A head on the last stage's map, averaged over `grid` x `grid` cells, gives (x, y) of every
    key-point; the loss is the squared distance of those that are given, in standard deviations
    of the training set. Scores are shares of the test set's key-points that are no further off
    than `threshold` times the object's unit, in pixels of the image: `pck@t` of all, one of
    each, and `auc`, the mean over thresholds from 0 to t. With the unit "given" they are called
    `pckh`. Intervals are over images.

    Args:
        unit: "box": the longer side of the object's box; "given": the annotation `lengths`; or
            the names of two key-points: their distance.
        threshold: t.
        points: names of the key-points that are learned; None: all.
        uncounted: names of those that are learned, but not in the score of all.
        hidden: whether key-points that are given, but hidden, count.
        crop: "image": all of it; "box": a square about the object's box.
        enlarge: side of the square over the box's longer side.
        side: of a crop in pixels; None: that of the data module's crops.
        jitter: most shift of a training crop, and most change of its size, as shares.
        flip: whether training crops are mirrored with probability 1/2.
        swap: pairs of names that are each other's mirror image.
        grid: cells along each side; fewer where the map is smaller. 0: the backbone's output.
        width: hidden units of the head; 0: it is linear.
        freeze_at: how many of (stem, res2, res3, res4, res5) keep their weights; 5: all.
        steps: updates.
        batch_size: crops per update, over all processes.
        lr: peak learning rate, of this batch.
        power: of its polynomial fall to zero.
        momentum: of SGD.
        weight_decay: of weights but those of norms.
        limit: training images that are used.
        pictures: test objects on the sheet.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})
    trains = True
    needs_labels = False
    reads_pixels = True

    def __init__(
        self,
        *,
        unit: Unit = "box",
        threshold: float = 0.2,
        points: Sequence[str] | None = None,
        uncounted: Sequence[str] = (),
        hidden: bool = True,
        crop: str = "image",
        enlarge: float = 1.0,
        side: int | None = None,
        jitter: float = 0.0,
        flip: bool = False,
        swap: Sequence[Sequence[str]] = (),
        grid: int = 4,
        width: int = 0,
        freeze_at: int = FROZEN,
        steps: int = 1000,
        batch_size: int = 64,
        lr: float = 1.0,
        power: float = 0.9,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        limit: int | None = None,
        pictures: int = 8,
        data: Data | None = None,
    ) -> None:
        if isinstance(unit, str):
            if unit not in ("box", "given"):
                raise ValueError(f"unit must be box, given or two key-points, got {unit!r}")
        elif len(unit) != 2:
            raise ValueError(f"unit must be box, given or two key-points, got {list(unit)}")
        if crop not in ("image", "box"):
            raise ValueError(f"crop must be image or box, got {crop!r}")
        if any(len(pair) != 2 for pair in swap):
            raise ValueError(f"swap lists pairs of key-points, got {[list(p) for p in swap]}")
        for name, value in (("threshold", threshold), ("enlarge", enlarge)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, least, number in (
            *(("side", 1, side), ("limit", 1, limit), ("grid", 0, grid)),
            *(("width", 0, width), ("pictures", 0, pictures), ("power", 0, power)),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {jitter}")
        if not 0 <= freeze_at <= FROZEN:
            raise ValueError(f"freeze_at must be from 0 to {FROZEN}, got {freeze_at}")
        self.unit: Unit = unit if isinstance(unit, str) else tuple(unit)
        self.threshold, self.points = threshold, None if points is None else tuple(points)
        self.uncounted, self.least = tuple(uncounted), 1.0 if hidden else 2.0
        self.crop, self.enlarge, self.side = crop, enlarge, side
        self.jitter, self.flip, self.swap = jitter, flip, [tuple(pair) for pair in swap]
        self.grid, self.width, self.freeze_at = grid, width, freeze_at
        self.schedule = Poly(
            steps, batch_size, lr, momentum=momentum, weight_decay=weight_decay, power=power
        )
        self.limit, self.pictures, self.data = limit, pictures, data

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        kinds = ["keypoints"]
        kinds += ["boxes"] if "box" in (self.crop, self.unit) else []
        kinds += ["lengths"] if self.unit == "given" else []
        for kind in kinds:
            if reason := lacks(data, kind):
                return reason
        known = data.names("train", "keypoints")  # type: ignore[attr-defined]
        pairs = [name for pair in self.swap for name in pair]
        own = () if isinstance(self.unit, str) else self.unit
        wanted = [*(self.points or ()), *self.uncounted, *pairs, *own]
        if missing := [name for name in wanted if name not in known]:
            return f"there are no key-points {missing}, only {list(known)}"
        return None

    def misfit(self, backbone: nn.Module) -> str | None:
        """Why this backbone cannot be trained so."""
        return unfit(backbone) if 1 < self.freeze_at < FROZEN else None

    def tune(self, subject: Subject) -> Result:
        """Trains a head, and what of the backbone is not frozen, and scores it."""
        data = subject.data
        every = data.names("train", "keypoints")
        names = [n for n in every if self.points is None or n in self.points]
        kept = torch.tensor([every.index(n) for n in names])
        sides: dict[str, Objects] = {}
        for split in ("train", "test"):
            boxed = self.crop == "box"
            found = objects(data, split, self.unit, every, boxed=boxed, least=self.least)
            sides[split] = replace(found, points=found.points[:, kept])
            if not len(found):
                raise ValueError(f"no {split} image has an object with key-points that count")
        if self.limit is not None:
            n = data.size("train")
            rows = subset(None, n, min(n, self.limit), subject.seed, "keypoints", "limit")
            taken = torch.isin(sides["train"].owner, rows).nonzero().flatten()
            sides["train"] = sides["train"].take(taken)
        side = self.side or data.thumbnail("test", 0).shape[-1]
        cutter = Cutter(data, self.crop, self.enlarge, side)
        mean, spread = cutter.usual(sides["train"], self.least, subject.seed)
        learns = self.freeze_at < FROZEN and any(True for _ in subject.backbone.parameters())
        with nullcontext() if learns else frozen(subject.backbone):
            still = freeze(subject.backbone, self.freeze_at if learns else FROZEN)
            example, _ = cutter(sides["test"], "test", 0)
            network = regressor(
                subject, example.crop, mean, spread, grid=self.grid, width=self.width, learns=learns
            )
            mirrored = self._mirrored(names)

            def load(place: Place) -> Example:
                draws = Draws(subject.seed, "keypoints", "crop", place.step, place.slot)
                moves = draws.uniform(3, low=-self.jitter, high=self.jitter)[0]
                at = (moves[:2], 1 + float(moves[2]))
                made, _ = cutter(sides["train"], "train", place.position, *at)
                turned = self.flip and bool(draws.chance(0.5))
                return flipped(made, mirrored) if turned else made

            with torch.enable_grad():
                train(
                    lambda some: loss(network, some, self.least, subject.device),
                    network,
                    replace(subject, data=Counted(len(sides["train"]))),
                    load,
                    self.schedule,
                    *(subject.seed, "keypoints"),
                    still=still,
                )
            with torch.no_grad():
                made = predicted(network, cutter, sides["test"], subject)
        counted = torch.tensor([name not in self.uncounted for name in names])
        limits = Limits("pckh" if self.unit == "given" else "pck", self.threshold, self.least)
        scores = scored(made, sides["test"], names, counted, limits, subject.seed)
        usual = cutter.constant(sides["test"], mean)
        nothing = scored(usual, sides["test"], names, counted, limits, subject.seed)
        details = {
            name: {
                **self._details(network.stage, {k: len(v) for k, v in sides.items()}),
                "ci95": list(interval),
                "n": len(sides["test"].owner.unique()),
                "objects": len(sides["test"]),
                "left_out": sides["test"].left_out,
                "constant": nothing[name][0],  # the same of the mean place in a crop
            }
            for name, (_, interval) in scores.items()
        }
        values = {name: value for name, (value, _) in scores.items()}
        note = f"{limits.name}: {values[limits.name]:.1%}; of the mean places of the "
        note += f"training set: {nothing[limits.name][0]:.1%}."
        rows = subset(None, len(made), min(self.pictures, len(made)), subject.seed, "keypoints")
        figures = sheet(cutter, sides["test"], made, rows, self.least, note)
        return Result(values, details, {}, figures)

    def _mirrored(self, names: Sequence[str]) -> Tensor:
        """For every key-point the one that a mirror makes of it."""
        order = torch.arange(len(names))
        for a, b in self.swap:
            if a in names and b in names:
                i, j = names.index(a), names.index(b)
                order[i], order[j] = j, i
        return order

    def _details(self, stage: str, objects: dict[str, int]) -> dict[str, Any]:
        return {
            "protocol": "key-points by regression from crops, "
            + ("frozen trunk" if self.freeze_at == FROZEN else "part of the trunk trained"),
            "stage": stage,
            "hyperparameters": {
                "unit": self.unit if isinstance(self.unit, str) else list(self.unit),
                "threshold": self.threshold,
                "uncounted": list(self.uncounted),
                "hidden": self.least < 2,
                "crop": self.crop,
                "enlarge": self.enlarge,
                "jitter": self.jitter,
                "flip": self.flip,
                "grid": self.grid,
                "width": self.width,
                "freeze_at": self.freeze_at,
                "training_objects": objects["train"],
                **self.schedule.said(),
            },
            "selection": "none: settings are given, last update",
        }
