"""Images with boxes around their objects: read, searched by a detector, and drawn."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unlabeled import dist
from unlabeled.evaluate.box_precision import Boxes
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.drawing import with_boxes
from unlabeled.evaluate.iterations import ahead

KINDS = ("boxes", "box_labels", "difficult")
SURE = 0.5  # score from which a detection is drawn


class Example(NamedTuple):
    """An image with its boxes, in its own pixels."""

    image: Tensor  # (3, h, w) uint8
    boxes: Tensor  # (M, 4) float32
    labels: Tensor  # (M,) int64
    difficult: Tensor  # (M,) bool

    def truth(self) -> Boxes:
        """What a detector should find."""
        return Boxes(self.boxes.numpy(), self.labels.numpy(), self.difficult.numpy())


@torch.no_grad()
def detect(model: nn.Module, subject: Subject, split: str) -> list[Boxes]:
    """What a detector finds in every image of a split; processes share the images."""
    data, device = subject.data, subject.device
    positions = range(dist.rank(), data.size(split), dist.world_size())
    rows = [torch.zeros(0, 7, dtype=torch.float64)]
    read = ahead(lambda i: data.image(split, i), positions)
    for i, image in zip(positions, read, strict=True):
        (answer,) = model([image.to(device) / 255])
        parts = [answer["labels"][:, None] - 1, answer["scores"][:, None], answer["boxes"]]
        row = torch.cat([part.double().cpu() for part in parts], 1)
        rows.append(torch.cat([row.new_full((len(row), 1), i), row], 1))
        if (done := i + 1) % 100 < dist.world_size() or done == data.size(split):
            subject.progress("detecting", done, data.size(split))
    here = torch.cat(rows).to(device)
    table = dist.gather(here, rows=dist.all_rows(here)).cpu().numpy()
    table = table[np.argsort(table[:, 0], kind="stable")]
    ends = np.searchsorted(table[:, 0], np.arange(data.size(split) + 1))
    return [
        Boxes(x[:, 3:], x[:, 1].astype(np.int64), x[:, 2])
        for x in (table[a:b] for a, b in itertools.pairwise(ends))
    ]


def drawn(true: Example, found: Boxes, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of an image: with its true boxes, and with those that were found."""
    image = true.image.permute(1, 2, 0).numpy()
    labels = true.labels.tolist()
    said: list[str] = [
        f"{classes[c]} (difficult)" if d else str(classes[c])
        for c, d in zip(labels, true.difficult.tolist(), strict=True)
    ]
    sure = np.flatnonzero(found.extra >= SURE)
    scored = [f"{classes[found.labels[i]]} {found.extra[i]:.2f}" for i in sure]
    return (
        with_boxes(image, true.boxes.numpy(), labels, said),
        with_boxes(image, found.corners[sure], found.labels[sure].tolist(), scored),
    )


def flipped(boxes: Tensor, width: int) -> Tensor:
    """Boxes (M, 4) of an image of some width, mirrored."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def reader(data: Any, split: str, *, images: bool = True) -> Callable[[int], Example]:
    """Reads an image and its boxes by position; without images, they are empty."""
    known = {kind: data.annotation(split, kind) for kind in KINDS if kind in data.kinds(split)}

    def read(position: int) -> Example:
        boxes = known["boxes"][position].float().reshape(-1, 4)
        none = torch.zeros(len(boxes), dtype=torch.bool)
        difficult = known["difficult"][position] if "difficult" in known else none
        labels = known["box_labels"][position].long()
        image = data.image(split, position) if images else torch.empty(0, dtype=torch.uint8)
        return Example(image, boxes, labels, difficult.bool())

    return read


def sheet(pictures: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """The figure of some images, by `drawn`."""
    if not pictures:
        return {}
    columns: dict[str, np.ndarray] = {}
    for first in range(min(2, len(pictures))):  # two images stand side by side
        for i, shown in enumerate(zip(*pictures[first::2], strict=True)):
            columns[f"column{2 * first + i}"] = np.stack(shown)
    titles = ["true boxes", "detections"] * 2
    return {
        "detections": {
            "kind": "sheet",
            "title": "Detections",
            "note": f"Test images with their true boxes, and with those found with a score of at "
            f"least {SURE}.",
            "titles": np.array(titles[: len(columns)], dtype=np.str_),
            **columns,
        }
    }
