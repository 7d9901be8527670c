"""Object detection on Pascal VOC: a Faster R-CNN trained from the backbone's weights."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unlabeled.draws import Draws, subset
from unlabeled.evaluate.box_precision import RECALLS, BoxPrecision
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.faster_rcnn import Detector, Sides, faster_rcnn
from unlabeled.evaluate.frozen import same_everywhere
from unlabeled.evaluate.iterations import Iterations, Place, seeded, train
from unlabeled.evaluate.objects import Example, detect, drawn, flipped, reader, sheet
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.trunk import (
    freeze_to,
    stages_of,
    still_norms,
    synchronised,
    unfit,
    with_maps,
)

CALLED = {"coco": "COCO", "voc07": "VOC2007's 11 recalls, as Detectron2 averages it"}


class Detection:
    """Faster R-CNN on the backbone, trained on boxes; average precision on the test images.

    Scores are `coco/AP`, `AP50` and `AP75`, and `voc07/AP`, `AP50` and `AP75` by the metric of
    VOC 2007: the latter are what papers print for VOC, and the former are by COCO's 101 recalls
    (see `box_precision`). Boxes that are marked difficult count neither as found nor as missed.

    Args:
        head: "c4" (res4 proposes, res5 is the box head) or "fpn" (a pyramid of res2 to res5).
        norm: "train": the backbone's batch norm uses the batch, over all processes, and
            learns; "frozen": it stays as it is.
        extra_norm: batch norm after res5 (C4) or after the pyramid's convolutions (FPN).
        freeze_at: parts of the backbone that do not learn: 1 the stem, 2 res2 too, ... 5 res5.
        steps: updates.
        batch_size: images per update, over all processes.
        lr: peak learning rate of this batch.
        milestones: updates after which it drops.
        gamma: factor of a drop.
        warmup: updates over which it rises linearly.
        warmup_factor: share of lr it rises from.
        momentum: of SGD.
        weight_decay: of all weights but those of norm layers.
        precise: batches that running statistics are averaged over in the end; 0: none.
        train_sides: lengths of the shorter side in pixels, one drawn for each image.
        test_side: of the shorter side.
        longest: of the longer side.
        anchors: sides of anchors in pixels of the resized image; FPN has one for each of five
            levels.
        pre_nms: proposals before suppression, in training and in testing.
        post_nms: those that are left.
        rois: of one image that train the box head.
        learn_difficult: whether difficult boxes train.
        per_pass: images of one forward pass; None: a process's whole share of a batch.
        bf16: the backbone computes in bfloat16 where autocast does.
        resamples: sets of test images that intervals come from.
        shown: test images in the report.
        data: another data module than the run's.
    """

    splits = frozenset({"train", "test"})
    trains = True
    needs_labels = False
    reads_pixels = True

    def __init__(
        self,
        *,
        head: Literal["c4", "fpn"] = "c4",
        norm: Literal["train", "frozen"] = "frozen",
        extra_norm: bool = False,
        freeze_at: int = 0,
        steps: int = 12500,
        batch_size: int = 16,
        lr: float = 0.003,
        milestones: Sequence[int] = (9500,),
        gamma: float = 0.1,
        warmup: int = 1000,
        warmup_factor: float = 0.333,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        precise: int = 0,
        train_sides: Sequence[int] = tuple(range(480, 801, 32)),
        test_side: int = 800,
        longest: int = 1333,
        anchors: Sequence[int] = (32, 64, 128, 256, 512),
        pre_nms: Sequence[int] = (12000, 6000),
        post_nms: Sequence[int] = (2000, 1000),
        rois: int = 512,
        learn_difficult: bool = True,
        per_pass: int | None = None,
        bf16: bool = False,
        resamples: int = 200,
        shown: int = 8,
        data: Data | None = None,
    ) -> None:
        if head not in ("c4", "fpn"):
            raise ValueError(f"head must be c4 or fpn, got {head!r}")
        if norm not in ("train", "frozen"):
            raise ValueError(f"norm must be train or frozen, got {norm!r}")
        if not 0 <= freeze_at <= 5:
            raise ValueError(f"freeze_at must be from 0 to 5, got {freeze_at}")
        if not train_sides or min(*train_sides, test_side, longest) < 16:
            raise ValueError(
                "train_sides, test_side and longest must be at least 16 pixels, got "
                f"{[*train_sides]}, {test_side} and {longest}"
            )
        if not anchors or min(anchors) < 1 or (head == "fpn" and len(anchors) != 5):
            raise ValueError(f"anchors must be positive, and five for head=fpn, got {[*anchors]}")
        for name, pair in (("pre_nms", pre_nms), ("post_nms", post_nms)):
            if len(pair) != 2 or min(pair) < 1:
                raise ValueError(f"{name} must be two numbers, (training, testing), got {[*pair]}")
        if min(rois, resamples) < 1 or min(shown, precise) < 0:
            raise ValueError(
                "rois and resamples must be at least 1, shown and precise not negative, got "
                f"{rois}, {resamples}, {shown} and {precise}"
            )
        self.schedule = Iterations(
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            milestones=tuple(milestones),
            gamma=gamma,
            warmup=warmup,
            warmup_factor=warmup_factor,
            momentum=momentum,
            weight_decay=weight_decay,
            per_pass=per_pass,
        )
        self.plan = Detector(
            head=head,
            classes=0,
            sides=Sides(tuple(train_sides), test_side, longest),
            anchors=tuple(anchors),
            pre_nms=(pre_nms[0], pre_nms[1]),
            post_nms=(post_nms[0], post_nms[1]),
            rois=rois,
            extra_norm=extra_norm,
            bf16=bf16,
        )
        self.norm, self.freeze_at, self.precise = norm, freeze_at, precise
        self.learn_difficult, self.resamples, self.shown = learn_difficult, resamples, shown
        self.data = data

    def obstacle(self, data: Any) -> str | None:
        """Why these data are not enough."""
        for split in ("train", "test"):
            known = data.kinds(split) if hasattr(data, "kinds") else frozenset()
            if not {"boxes", "box_labels"} <= known:
                return f"the {split} images have no boxes with labels (data=voc07 and scenes do)"
        return None if len(data.classes) else "the boxes' classes have no names"

    def misfit(self, backbone: nn.Module) -> str | None:
        """Why this backbone cannot detect."""
        return unfit(backbone, *([("res4", "res5")] if self.plan.head == "c4" else []))

    def tune(self, subject: Subject) -> Result:
        """Trains a detector on the subject's backbone and scores it."""
        data, key = subject.data, (subject.seed, "detection")
        model, done = self._model(subject)
        same_everywhere(model)  # running statistics
        metric, count = BoxPrecision(len(data.classes)), data.size("test")
        found = detect(model, subject, "test")
        known = reader(data, "test", images=False)
        for i, boxes in enumerate(found):
            metric.add(boxes, known(i).truth())
        chosen = subset(None, count, min(self.shown, count), *key, "shown").tolist()
        read = reader(data, "test")
        pictures = [drawn(read(i), found[i], data.classes) for i in chosen]
        raw = {"stage": "pixels"} if isinstance(subject.backbone, Pixels) else {}
        scores: dict[str, float] = {}
        details: dict[str, dict[str, Any]] = {}
        for rule in RECALLS:
            bounds = metric.intervals(rule, *key, "bootstrap", resamples=self.resamples)
            ap50 = metric.by_class(rule)[:, 0]
            for kind, value in metric.mean(rule).items():
                scores[f"{rule}/{kind}"] = value
                details[f"{rule}/{kind}"] = {
                    **self._details(rule),
                    **raw,
                    "ci95": list(bounds[kind]),
                    "n": count,
                    "updates": done,
                    "absent": [data.classes[c] for c in np.flatnonzero(np.isnan(ap50))],
                }
            details[f"{rule}/AP50"]["by_class"] = {
                data.classes[c]: float(x) for c, x in enumerate(ap50) if not np.isnan(x)
            }
        return Result(scores, details, {}, sheet(pictures))

    def _model(self, subject: Subject) -> tuple[nn.Module, int]:
        """The detector, and how many updates it was trained for."""
        device, key = subject.device, (subject.seed, "detection")
        backbone = with_maps(subject.backbone).to(device)
        stages = stages_of(backbone)
        same_everywhere(synchronised(backbone))
        freeze_to(backbone, self.freeze_at)
        still = still_norms(backbone, every=self.norm == "frozen")
        with seeded(device, *key, "layers"):
            plan = self.plan._replace(classes=len(subject.data.classes))
            model = faster_rcnn(backbone, stages, plan).to(device)
        read = reader(subject.data, "train")

        def load(place: Place) -> Example:
            example = read(place.position)
            kept = (example.boxes[:, 2:] - example.boxes[:, :2]).min(1).values >= 1
            if not self.learn_difficult:
                kept &= ~example.difficult
            image, boxes = example.image, example.boxes[kept]
            if Draws(*key, "flip", place.step, place.slot).chance(0.5).item():
                image, boxes = image.flip(-1), flipped(boxes, image.shape[-1])
            return Example(image, boxes, example.labels[kept], example.difficult[kept])

        def loss(examples: list[Example]) -> Tensor:
            images = [e.image.to(device) / 255 for e in examples]
            targets = [
                {"boxes": e.boxes.to(device), "labels": e.labels.to(device) + 1} for e in examples
            ]
            return torch.stack([*model(images, targets).values()]).sum()

        settings = {"still": still, "precise": self.precise}
        done = train(loss, model, subject, load, self.schedule, *key, "train", **settings)
        return model, done

    def _details(self, rule: str) -> dict[str, Any]:
        plan = self.plan
        return {
            "protocol": f"Faster R-CNN {plan.head.upper()} trained from the backbone; AP of "
            + CALLED[rule],
            "stage": "res4 and res5" if plan.head == "c4" else "res2 to res5",
            "hyperparameters": {
                **self.schedule.said(),
                "norm": self.norm,
                "extra_norm": plan.extra_norm,
                "freeze_at": self.freeze_at,
                "precise": self.precise,
                "train_sides": list(plan.sides.train),
                "test_side": plan.sides.test,
                "learn_difficult": self.learn_difficult,
            },
            "selection": "none: the detector after the last update",
        }
