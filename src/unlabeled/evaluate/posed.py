"""Objects with key-points: which there are, how they are cropped, and pictures of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import crop as cropped

from unlabeled.draws import subset
from unlabeled.truth import Window, moved

SIDE = 192  # pixels of a picture
STILL = torch.zeros(2)  # no shift

Unit = Literal["box", "given"] | Sequence[str]


@dataclass(frozen=True)
class Objects:
    """The objects of a split whose key-points can be scored.

    Args:
        owner: (N,) position of each one's image.
        points: (N, K, 3) x, y and visibility in pixels of the image.
        units: (N,) what errors are measured in, in the same pixels.
        boxes: (N, 4) or None.
        left_out: objects without any key-point that counts, or without unit.
    """

    owner: Tensor
    points: Tensor
    units: Tensor
    boxes: Tensor | None
    left_out: int

    def __len__(self) -> int:
        return len(self.owner)

    def take(self, rows: Tensor) -> "Objects":
        """Some of them."""
        boxes = None if self.boxes is None else self.boxes[rows]
        own = (self.owner[rows], self.points[rows], self.units[rows])
        return Objects(*own, boxes, self.left_out)


def objects(
    data: Any, split: str, unit: Unit, names: Sequence[str], *, boxed: bool, least: float
) -> Objects:
    """All objects of a split.

    Args:
        data: the data module.
        split: "train" or "test".
        unit: "box": the longer side of an object's box; "given": the annotation `lengths`; or
            the names of two key-points, whose distance it is.
        names: of all key-points, in their order.
        boxed: whether boxes are needed for crops too.
        least: visibility from which a key-point counts.
    """
    everything = range(data.size(split))
    points = [p.float() for p in data.annotation(split, "keypoints").several(everything)]
    counts = torch.tensor([len(p) for p in points])
    owner = torch.arange(len(points)).repeat_interleave(counts)
    whole = torch.cat(points)
    boxes = None
    if boxed or unit == "box":
        boxes = torch.cat([*data.annotation(split, "boxes").several(everything)]).float()
    if unit == "box":
        units = (boxes[:, 2:] - boxes[:, :2]).amax(1)  # type: ignore[index]
    elif unit == "given":
        units = torch.cat([*data.annotation(split, "lengths").several(everything)]).float()
    else:
        a, b = (whole[:, names.index(name)] for name in unit)
        units = (a[:, :2] - b[:, :2]).norm(dim=1) * ((a[:, 2] > 0) & (b[:, 2] > 0))
    good = (units > 0) & (whole[..., 2] >= least).any(1)
    found = Objects(owner, whole, units, boxes, int((~good).sum()))
    return found.take(good.nonzero().flatten())


def square(
    size: tuple[int, int], box: Tensor | None, enlarge: float, shift: Tensor, zoom: float
) -> tuple[int, int, int]:
    """Top, left and side, in whole pixels, of the square that shows an object.

    Args:
        size: height and width of the image.
        box: (4,) of the object; None: the whole image.
        enlarge: side of the square over the longer side of the box, or of the image.
        shift: (2,) how far it is moved down and right, as shares of its side.
        zoom: factor of its side.
    """
    h, w = size
    x0, y0, x1, y1 = (0, 0, w, h) if box is None else box.tolist()
    side = max(1, round(max(x1 - x0, y1 - y0) * enlarge * zoom))
    down, right = (shift * side).tolist()
    return round((y0 + y1 - side) / 2 + down), round((x0 + x1 - side) / 2 + right), side


def cut(image: Tensor, place: tuple[int, int, int], side: int) -> tuple[Tensor, Window]:
    """A square of an image (3, h, w) uint8, black beyond it, as (3, side, side) in [0, 1]."""
    top, left, size = place
    x = cropped(image, top, left, size, size).float() / 255
    if size != side:
        x = F.interpolate(x[None], (side, side), mode="bilinear", antialias=True)[0].clamp(0, 1)
    return x, Window(top, left, size, size, side, side)


class Example(NamedTuple):
    """A crop and where its object's key-points are."""

    crop: Tensor  # (3, side, side) in [0, 1]
    points: Tensor  # (K, 3): shares of the crop's sides, and visibility in the image


class Cutter:
    """Crops of objects.

    Args:
        data: gives images.
        crop: "image": a square about all of it; "box": about the object's box.
        enlarge: side of the square over the longer side of the image or the box.
        side: of a crop in pixels.
    """

    def __init__(self, data: Any, crop: str, enlarge: float, side: int) -> None:
        self.data, self.crop, self.enlarge, self.side = data, crop, enlarge, side

    def __call__(
        self, found: Objects, split: str, i: int, shift: Tensor = STILL, zoom: float = 1.0
    ) -> tuple[Example, Window]:
        """An object's crop, and what part of its image that is."""
        image = self.data.image(split, int(found.owner[i]))
        h, w = image.shape[1:]
        place = square((h, w), self._box(found, i), self.enlarge, shift, zoom)
        crop, window = cut(image, place, self.side)
        return Example(crop, inside(found.points[i], window)), window

    def window(self, found: Objects, split: str, i: int) -> Window:
        """The part of its image that an object's crop shows, without reading it if possible."""
        box = self._box(found, i)
        h, w = (0, 0) if box is not None else self.data.image(split, int(found.owner[i])).shape[1:]
        top, left, size = square((h, w), box, self.enlarge, STILL, 1.0)
        return Window(top, left, size, size, self.side, self.side)

    def usual(self, found: Objects, least: float, seed: int) -> tuple[Tensor, Tensor]:
        """Mean places (K, 2) in crops of up to 500 objects, and their standard deviation (2,).

        Raises:
            ValueError: a key-point counts in none of them.
        """
        rows = subset(None, len(found), min(len(found), 500), seed, "keypoints", "usual").tolist()
        places = torch.stack(
            [inside(found.points[i], self.window(found, "train", i)) for i in rows]
        )
        counts = (places[..., 2] >= least).double()
        if not bool(counts.sum(0).all()):
            missing = (counts.sum(0) == 0).nonzero().flatten().tolist()
            raise ValueError(f"no training object says where its key-points number {missing} are")
        xy = places[..., :2].double()
        mean = (xy * counts[..., None]).sum(0) / counts.sum(0)[:, None]
        variance = ((xy - mean).square() * counts[..., None]).sum((0, 1)) / counts.sum()
        return mean.float(), variance.sqrt().clamp(min=1e-3).float()

    def constant(self, found: Objects, mean: Tensor) -> Tensor:
        """Pixels (N, K, 2) of the test images where places (K, 2) in crops are."""
        windows = [self.window(found, "test", i) for i in range(len(found))]
        return torch.stack([outside(mean, window) for window in windows])

    def _box(self, found: Objects, i: int) -> Tensor | None:
        return None if self.crop == "image" or found.boxes is None else found.boxes[i]


def flipped(made: Example, mirrored: Tensor) -> Example:
    """A crop in the mirror; `mirrored` says which key-point each becomes."""
    points = made.points[mirrored].clone()
    points[:, 0] = 1 - points[:, 0]
    return Example(made.crop.flip(-1), points)


def inside(points: Tensor, window: Window) -> Tensor:
    """Points (K, 3) of an image as shares of a crop's sides; their visibility stays."""
    return torch.cat([moved("keypoints", points, window)[:, :2] / window.rows, points[:, 2:]], 1)


def outside(places: Tensor, window: Window) -> Tensor:
    """The inverse: shares (K, 2) of a crop's sides as pixels of the image."""
    scale = places.new_tensor([window.width, window.height])
    return places * scale + places.new_tensor([window.left, window.top])


def picture(crop: Tensor, points: Tensor, *, cross: bool) -> np.ndarray:
    """A crop (3, s, s) in [0, 1] with points (K, 3), as shares of its sides, drawn on it."""
    pixels = (crop * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for k, (x, y, seen) in enumerate(points.tolist()):
        if seen <= 0:
            continue
        x, y = x * SIDE, y * SIDE
        hue = round(255 * k / len(points))
        colour = Image.new("HSV", (1, 1), (hue, 230, 255)).convert("RGB").getpixel((0, 0))
        for fill, width, r in (((0, 0, 0), 5, 7), (colour, 2, 6)):
            if cross:
                draw.line((x - r, y - r, x + r, y + r), fill=fill, width=width)
                draw.line((x - r, y + r, x + r, y - r), fill=fill, width=width)
            else:
                draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=width)
    return np.asarray(image)
