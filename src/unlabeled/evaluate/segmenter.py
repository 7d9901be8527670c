"""Networks that give every pixel of an image a class, and the images they are trained on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import normalize
from unlabeled.draws import Draws
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.iterations import ahead
from unlabeled.truth import UNKNOWN

WIDTH = 256  # channels of the FCN head
FILL = 124  # about the mean colour, where a crop has no image


class Example(NamedTuple):
    """An image and the class of each of its pixels."""

    image: Tensor  # (3, h, w) uint8
    classes: Tensor  # (h, w) uint8: 0 is the background, 255 unknown


def head_of(kind: str, channels: int, classes: int, holes: int) -> nn.Sequential:
    """A "linear" or "fcn" head, drawn from the global random state."""
    layers: list[nn.Module] = []
    if kind == "fcn":
        for wide in (channels, WIDTH):
            conv = nn.Conv2d(wide, WIDTH, 3, padding=holes, dilation=holes, bias=False)
            layers += [conv, nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)]
        channels = WIDTH
    last = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers, last)


class Segmenter(nn.Module):
    """A head on a stage of a backbone: images (B, 3, h, w) uint8 to logits (B, C, *size).

    The size is the image's where none is given.
    """

    def __init__(
        self, backbone: nn.Module, stage: str, head: nn.Module, *, frozen: bool, bf16: bool
    ) -> None:
        super().__init__()
        self.backbone, self.stage, self.head = backbone, stage, head
        self.frozen, self.bf16 = frozen, bf16

    def forward(self, x: Tensor, size: Sequence[int] = ()) -> Tensor:
        size, grad = size or x.shape[-2:], torch.is_grad_enabled() and not self.frozen
        x = normalize(x)
        if x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        with (
            torch.set_grad_enabled(grad),
            torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            found = self.backbone.stages(x)[self.stage]  # type: ignore[operator]
        return F.interpolate(
            self.head(found.float()), list(size), mode="bilinear", align_corners=False
        )


def reader(data: Any, split: str, side: int | None) -> Callable[[int], Example]:
    """Reads an image by position, resized to a length of its shorter side."""
    known = data.annotation(split, "segmentation")

    def read(position: int) -> Example:
        example = Example(data.image(split, position), known[position])
        short = min(example.image.shape[1:])
        return example if side in (None, short) else resized(example, (side or short) / short)

    return read


def resized(example: Example, scale: float) -> Example:
    """Both enlarged by a factor: the image without aliasing, of the classes the nearest."""
    size = [max(1, round(scale * n)) for n in example.image.shape[1:]]
    image = F.interpolate(example.image[None].float(), size, mode="bilinear", antialias=True)
    image = image[0].round().clamp(0, 255).to(torch.uint8)
    classes = F.interpolate(example.classes[None, None], size, mode="nearest-exact")[0, 0]
    return Example(image, classes)


def cut(example: Example, draws: Draws, size: int, scales: tuple[float, float]) -> Example:
    """A training image: resized, cut or filled up to a square, perhaps mirrored."""
    image, classes = resized(example, draws.uniform(low=scales[0], high=scales[1]).item())
    pads: list[int] = []  # left, right, top, bottom; less than 0 cuts
    for n in reversed(image.shape[1:]):
        spare = size - n
        first = int(draws.integers(abs(spare) + 1).item()) * (1 if spare >= 0 else -1)
        pads += [first, spare - first]
    image, classes = F.pad(image, pads, value=FILL), F.pad(classes, pads, value=UNKNOWN)
    if draws.chance(0.5).item():
        image, classes = image.flip(-1), classes.flip(-1)
    return Example(image, classes)


@torch.no_grad()
def answers(
    network: nn.Module, subject: Subject, positions: Sequence[int], side: int | None
) -> Iterator[tuple[int, Example, Tensor]]:
    """Position, example and predicted classes (h, w) uint8 of test images, one after another.

    Where images are resized, the prediction still is of the image as it was.
    """
    examples = ahead(reader(subject.data, "test", None), positions)
    for position, example in zip(positions, examples, strict=True):
        short = min(example.image.shape[1:])
        shown = example if side in (None, short) else resized(example, (side or short) / short)
        logits = network(shown.image[None].to(subject.device), example.classes.shape)
        yield position, example, logits[0].argmax(0).to(torch.uint8).cpu()
