"""From an image to uint8 crops: one by one in workers, or whole batches on the device.

Both ways crop the same boxes for the same numbers. They are given different keys, (seed, epoch,
index) and (seed, step), so the tiers of a data set show a run different crops. A seed gives the
same crops to the last bit on every machine with a CPU of whatever kind: decoding (see
`unlabeled.data.rgb`) and resizing in workers count in whole numbers. Whole batches on a device are
the same within rounding.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unlabeled.data.resample import FILTERS, TRIES, Axis, box, boxes, resample, short_side
from unlabeled.data.rgb import pil, tensor
from unlabeled.draws import Draws, to
from unlabeled.truth import Window

Interpolation = Literal["bilinear", "bicubic"]
STRIP = 32  # times as long as wide: more is no photograph
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Decode(Protocol):
    """An image in, its crops out. `repr` says everything that decides their pixels."""

    def __call__(self, image: Tensor, *key: int | str) -> list[Tensor]:
        """Crops (3, S, S) uint8 of one image (3, H, W) uint8; `key` fixes what is random."""
        ...

    def batched(self, images: Tensor, draws: Draws) -> list[Tensor]:
        """Crops (B, 3, S, S) uint8 of images (B, 3, H, W) uint8, on their device."""
        ...


class Crops:
    """`count` random resized crops of an image, with torchvision's distribution of boxes.

    Args:
        size: side of a crop in pixels.
        count: crops of each image, drawn independently.
        scale: lowest and highest share of the image's area.
        ratio: lowest and highest width / height of the box.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    def __init__(
        self,
        *,
        size: int,
        count: int = 1,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bilinear",
    ) -> None:
        if size < 1 or count < 1:
            raise ValueError(f"size and count must be at least 1, got {size} and {count}")
        self.size, self.count = size, count
        self.scale, self.ratio = _range(scale, "scale"), _range(ratio, "ratio")
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the image's area, at most 1, got {self.scale}")
        self.interpolation = _filter(interpolation)

    def __call__(self, image: Tensor, *key: int | str) -> list[Tensor]:
        rows, columns = image.shape[-2:]
        crops = []
        for i in range(self.count):
            u = Draws(*key, i).uniform(TRIES, 4)[0].tolist()
            top, left, height, width = box(u, rows, columns, self.scale, self.ratio)
            part = image[:, top : top + height, left : left + width]
            crops.append(resized(part, self.size, self.size, self.interpolation))
        return crops

    def batched(self, images: Tensor, draws: Draws) -> list[Tensor]:
        height, width = images.shape[-2:]
        crops = []
        for i in range(self.count):
            box = to(self.boxes(draws.fork(i), height, width), images.device)
            top, left, h, w = box.unbind(1)
            down, across = Axis(top, h, self.size), Axis(left, w, self.size)
            crops.append(resample(images, self.size, down, across, self.interpolation))
        return crops

    def boxes(self, draws: Draws, height: int, width: int) -> Tensor:
        """(B, 4) int64: top, left, height, width of one random box per row of the draws."""
        return boxes(draws.uniform(TRIES, 4), height, width, self.scale, self.ratio)

    def __repr__(self) -> str:
        return (
            f"Crops(size={self.size}, count={self.count}, scale={self.scale}, "
            f"ratio={self.ratio}, interpolation={self.interpolation!r})"
        )


class RandomCrop:
    """`count` squares cut anywhere out of the image, after its short side became `resize`.

    The arguments are those of `Crops`; `resize` is `size` if None.
    """

    def __init__(
        self,
        *,
        size: int,
        resize: int | None = None,
        count: int = 1,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        if size < 1 or count < 1:
            raise ValueError(f"size and count must be at least 1, got {size} and {count}")
        self.size, self.count = size, count
        self.resize = size if resize is None else resize
        if self.resize < size:
            raise ValueError(f"resize={resize} is smaller than the crop, size={size}")
        self.interpolation = _filter(interpolation)

    def __call__(self, image: Tensor, *key: int | str) -> list[Tensor]:
        image = _middle(image)
        height, width = short_side(image.shape[-2], image.shape[-1], self.resize)
        whole = self.resized(image, height, width)
        crops = []
        for i in range(self.count):
            top, left = self.corners(Draws(*key, i), height, width)[0].tolist()
            crops.append(whole[:, top : top + self.size, left : left + self.size].contiguous())
        return crops

    def resized(self, image: Tensor, height: int, width: int) -> Tensor:
        """The whole image in the size that squares are cut from."""
        return resized(image, height, width, self.interpolation)

    def batched(self, images: Tensor, draws: Draws) -> list[Tensor]:
        height, width = images.shape[-2:]
        if height == width == self.resize == self.size:
            return [images.contiguous()] * self.count
        tall, wide = short_side(height, width, self.resize)
        zero = torch.zeros(len(images), device=images.device)
        crops = []
        for i in range(self.count):
            top, left = to(self.corners(draws.fork(i), tall, wide), images.device).unbind(1)
            down = Axis(zero, zero + height, tall, top)
            across = Axis(zero, zero + width, wide, left)
            crops.append(resample(images, self.size, down, across, self.interpolation))
        return crops

    def corners(self, draws: Draws, height: int, width: int) -> Tensor:
        """(B, 2) int64: top and left of one square per row of the draws."""
        room = torch.tensor([height - self.size + 1, width - self.size + 1])
        return (draws.uniform(2) * room).long()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(size={self.size}, resize={self.resize}, count={self.count}, "
            f"interpolation={self.interpolation!r})"
        )


class Center(RandomCrop):
    """The central square, after the short side became `resize` (`size` if None): to evaluate.

    Files are resized by Pillow, as published evaluations do, to the last grey level.
    """

    def __init__(
        self, *, size: int, resize: int | None = None, interpolation: Interpolation = "bilinear"
    ) -> None:
        super().__init__(size=size, resize=resize, interpolation=interpolation)

    def corners(self, draws: Draws, height: int, width: int) -> Tensor:
        """(B, 2) int64: top and left of the centre, rounded as torchvision's `center_crop`."""
        corner = torch.tensor([round((height - self.size) / 2), round((width - self.size) / 2)])
        return corner.expand(draws.rows, 2)

    def resized(self, image: Tensor, height: int, width: int) -> Tensor:
        """The whole image in the size that the square is cut from."""
        if image.device.type != "cpu":
            return super().resized(image, height, width)
        return tensor(pil(image).resize((width, height), PILLOW[self.interpolation]))

    def window(self, height: int, width: int) -> Window:
        """The part of an image of that size that the crop shows."""
        tall, wide = short_side(height, width, self.resize)
        top, left = self.corners(Draws("none"), tall, wide)[0].tolist()
        down, across = height / tall, width / wide
        box = (top * down, left * across, self.size * down, self.size * across)
        return Window(*box, self.size, self.size)


class Several:
    """The crops of several decodes of one image, one after the other.

    `parts` maps names, which are for overrides only (`decode.parts.local.size=40`), to decodes.
    """

    def __init__(self, *, parts: Mapping[str, Decode]) -> None:
        if not parts:
            raise ValueError("parts is empty: name at least one decode")
        self.parts = dict(parts.items())

    def __call__(self, image: Tensor, *key: int | str) -> list[Tensor]:
        parts = enumerate(self.parts.values())
        return [crop for i, part in parts for crop in part(image, *key, f"part{i}")]

    def batched(self, images: Tensor, draws: Draws) -> list[Tensor]:
        parts = enumerate(self.parts.values())
        return [x for i, part in parts for x in part.batched(images, draws.fork(f"part{i}"))]

    def __repr__(self) -> str:
        return f"Several({', '.join(map(repr, self.parts.values()))})"


def resized(image: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """(..., 3, height, width) uint8 of an image (3, h, w) or pictures (T, 3, h, w), antialiased.

    In whole numbers, which give the same on every CPU; within two grey levels of Pillow, which
    takes 3.5 times as long (1.75 instead of 0.48 ms for two crops of 224 of a photograph).
    """
    if image.shape[-2:] == (height, width):
        return image.contiguous()
    size, whole = (height, width), image if image.ndim == 4 else image[None]
    if whole.device.type != "cpu":  # CUDA resizes no whole numbers
        found = F.interpolate(whole.float(), size, mode=interpolation, antialias=True)
        found = found.round_().clamp_(0, 255).byte()
    else:
        found = F.interpolate(whole, size, mode=interpolation, antialias=True).contiguous()
    return found if image.ndim == 4 else found[0]


def _middle(image: Tensor) -> Tensor:
    """An image, of a strip the middle: 2 x 20 000 pixels would become 256 x 2 560 000."""
    height, width = image.shape[-2:]
    most = STRIP * min(height, width)
    top, left = (max(0, n - most) // 2 for n in (height, width))
    return image[..., top : top + most, left : left + most]


def _range(values: Sequence[float], name: str) -> tuple[float, float]:
    low, high = (float(v) for v in values) if len(values) == 2 else (0.0, 0.0)
    if not 0 < low <= high:
        raise ValueError(f"{name} must be [low, high] with 0 < low <= high, got {list(values)}")
    return low, high


def _filter(name: str) -> Interpolation:
    if name not in FILTERS:
        raise ValueError(f"interpolation must be one of {sorted(FILTERS)}, got {name!r}")
    return name  # type: ignore[return-value]
