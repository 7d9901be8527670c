"""Semantic segmentation on Pascal VOC: a head on the last stage, the backbone frozen or tuned."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled import dist
from unlabeled.draws import Draws, subset
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.drawing import coloured, picture
from unlabeled.evaluate.frozen import checksum, same_everywhere
from unlabeled.evaluate.iterations import Iterations, Place, seeded, train
from unlabeled.evaluate.overlap import accuracy, by_class, counts, intervals, mean_iou
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.segmenter import Example, Segmenter, answers, cut, head_of, reader
from unlabeled.evaluate.trunk import dilate, last_stage, still_norms, synchronised, unfit, with_maps
from unlabeled.truth import UNKNOWN


class Segmentation:
    """A class for every pixel from the backbone's last stage; mIoU on the test images.

    Logits are enlarged to the image bilinearly. Pixels of unknown class neither train nor count;
    classes that neither truth nor prediction has on any test image are left out of the mean.

    Args:
        head: "linear", one convolution of single pixels, or "fcn", two 3x3 convolutions before
            it (He et al., 2020).
        trunk: "frozen" or "train".
        norm: of a trunk that trains: "train", its batch norm uses the batch over all processes,
            or "frozen".
        dilate: keep res5 at the resolution of res4, by kernels with holes.
        holes: dilation of the FCN head's kernels.
        steps: updates.
        batch_size: images per update, over all processes.
        lr: peak learning rate of this batch.
        milestones: updates after which it drops.
        gamma: factor of a drop.
        warmup: updates over which it rises linearly.
        momentum: of SGD.
        weight_decay: of all weights but those of norm layers.
        crop: side in pixels of training images.
        scales: least and largest factor by which a training image is resized before the crop.
        side: length of the shorter side in pixels that every image is first resized to; None:
            images stay as they are.
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
        head: Literal["linear", "fcn"] = "fcn",
        trunk: Literal["frozen", "train"] = "train",
        norm: Literal["train", "frozen"] = "train",
        dilate: bool = True,
        holes: int = 6,
        steps: int = 30000,
        batch_size: int = 16,
        lr: float = 0.003,
        milestones: Sequence[int] = (21000, 27000),
        gamma: float = 0.1,
        warmup: int = 0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        crop: int = 513,
        scales: Sequence[float] = (0.5, 2.0),
        side: int | None = None,
        per_pass: int | None = None,
        bf16: bool = False,
        resamples: int = 1000,
        shown: int = 8,
        data: Data | None = None,
    ) -> None:
        if head not in ("linear", "fcn"):
            raise ValueError(f"head must be linear or fcn, got {head!r}")
        if trunk not in ("frozen", "train"):
            raise ValueError(f"trunk must be frozen or train, got {trunk!r}")
        if norm not in ("train", "frozen"):
            raise ValueError(f"norm must be train or frozen, got {norm!r}")
        if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
            raise ValueError(f"scales must be two positive numbers, least first, got {[*scales]}")
        for name, value, low in (
            *(("crop", crop, 16), ("side", 16 if side is None else side, 16)),
            *(("holes", holes, 1), ("resamples", resamples, 1), ("shown", shown, 0)),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.schedule = Iterations(
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            milestones=tuple(milestones),
            gamma=gamma,
            warmup=warmup,
            momentum=momentum,
            weight_decay=weight_decay,
            per_pass=per_pass,
        )
        self.head, self.trunk, self.norm = head, trunk, norm
        self.dilate, self.holes, self.bf16 = dilate, holes, bf16
        self.crop, self.scales, self.side = crop, (scales[0], scales[1]), side
        self.resamples, self.shown, self.data = resamples, shown, data

    def obstacle(self, data: Any) -> str | None:
        """Why these data are not enough."""
        for split in ("train", "test"):
            known = data.kinds(split) if hasattr(data, "kinds") else frozenset()
            if "segmentation" not in known:
                return f"the {split} images have no segmentation (data=voc12_segmentation has)"
        return None if len(data.classes) else "the pixels' classes have no names"

    def misfit(self, backbone: nn.Module) -> str | None:
        """Why this backbone cannot segment."""
        cuts = [("res4", "res5")] if self.dilate else []
        return unfit(backbone, *cuts, needed=last_stage)

    def tune(self, subject: Subject) -> Result:
        """Trains the head, and the trunk if it is to, and scores the test images."""
        data, key = subject.data, (subject.seed, "segmentation")
        network, stage = self._network(subject)
        done = self._train(network, subject)
        classes, count = 1 + len(data.classes), data.size("test")
        chosen = subset(None, count, min(self.shown, count), *key, "shown").tolist()
        tables, pictures = [], []
        here = range(dist.rank(), count, dist.world_size())
        for i, example, answer in answers(network, subject, here, self.side):
            tables.append(counts(answer, example.classes, classes))
            if (i + 1) % 100 < dist.world_size() or i + 1 == count:
                subject.progress("segmenting", i + 1, count)
        images = torch.stack(tables) if tables else torch.zeros(0, 3, classes).long()
        images = images.to(subject.device)
        images = dist.gather(images, rows=dist.all_rows(images)).cpu()
        for _, example, answer in answers(network, subject, chosen, self.side):
            image = picture(example.image.permute(1, 2, 0).numpy())
            maps = [coloured(x.numpy(), classes) for x in (example.classes, answer)]
            pictures.append([image, *maps])
        total, names = images.sum(0), ["background", *data.classes]
        bounds = intervals(images, *key, "bootstrap", resamples=self.resamples)
        iou = by_class(total)
        details = {
            **self._details(stage),
            **({"stage": "pixels"} if isinstance(subject.backbone, Pixels) else {}),
            "n": count,
            "updates": done,
            "absent": [names[c] for c in iou.isnan().nonzero().flatten()],
        }
        each = {names[c]: x for c, x in enumerate(iou.tolist()) if x == x}
        values = {"pixel_accuracy": accuracy(total).item(), "miou": mean_iou(total).item()}
        return Result(
            {f"{self.head}/{name}": x for name, x in values.items()},
            {
                f"{self.head}/{name}": {**details, "ci95": list(bounds[name]), "by_class": each}
                for name in values
            },
            {},
            _figures(pictures),
        )

    def _network(self, subject: Subject) -> tuple[Segmenter, str]:
        """Backbone and head, and the stage that the head reads."""
        device, key = subject.device, (subject.seed, "segmentation")
        backbone, raw = with_maps(subject.backbone), isinstance(subject.backbone, Pixels)
        same_everywhere(backbone)
        if self.dilate and not raw:
            dilate(backbone)
        stage, channels = last_stage(backbone)
        if self.dilate and raw:
            stage = (
                "res4"  # places of a dilated res5 are no wider, and pixels have as many channels
            )
        classes = 1 + len(subject.data.classes)
        with seeded(device, *key, "layers"):
            head = head_of(self.head, channels, classes, self.holes)
        frozen = self.trunk == "frozen"
        return Segmenter(backbone, stage, head, frozen=frozen, bf16=self.bf16).to(device), stage

    def _train(self, network: Segmenter, subject: Subject) -> int:
        backbone, device, key = network.backbone, subject.device, (subject.seed, "segmentation")
        frozen = self.trunk == "frozen"
        synchronised(network)
        backbone.requires_grad_(not frozen)
        still = [*backbone.modules()] if frozen else []
        if not frozen:
            still = still_norms(backbone, every=self.norm == "frozen")
        before = checksum(backbone) if frozen else ""
        read = reader(subject.data, "train", self.side)

        def load(place: Place) -> Example:
            draws = Draws(*key, "cut", place.step, place.slot)
            return cut(read(place.position), draws, self.crop, self.scales)

        def loss(examples: list[Example]) -> Tensor:
            x = torch.stack([e.image for e in examples]).to(device)
            y = torch.stack([e.classes for e in examples]).to(device).long()
            logits = network(x)
            total = F.cross_entropy(logits, y, ignore_index=UNKNOWN, reduction="sum")
            return total / (y != UNKNOWN).sum().clamp(min=1)

        done = train(loss, network, subject, load, self.schedule, *key, "train", still=still)
        if frozen and checksum(backbone) != before:
            raise RuntimeError("the frozen backbone changed while its head was trained")
        same_everywhere(network)
        return done

    def _details(self, stage: str) -> dict[str, Any]:
        return {
            "protocol": f"{self.head} segmentation head on a "
            + ("frozen trunk" if self.trunk == "frozen" else "trunk that is trained with it"),
            "stage": stage,
            "hyperparameters": {
                **self.schedule.said(),
                "norm": "frozen" if self.trunk == "frozen" else self.norm,
                "dilate": self.dilate,
                "holes": self.holes,
                "crop": self.crop,
                "scales": list(self.scales),
                "side": self.side,
            },
            "selection": "none: the network after the last update",
        }


def _figures(pictures: list[list[np.ndarray]]) -> dict[str, dict[str, Any]]:
    if not pictures:
        return {}
    columns = {f"column{i}": np.stack(shown) for i, shown in enumerate(zip(*pictures, strict=True))}
    return {
        "maps": {
            "kind": "sheet",
            "title": "Segmentation",
            "note": "Test images in VOC's colours: black is the background, cream unknown.",
            "titles": np.array(["image", "truth", "prediction"], dtype=np.str_),
            **columns,
        }
    }
