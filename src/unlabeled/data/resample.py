"""Boxes and resampling for whole batches: what torchvision does image by image."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TRIES = 10  # torchvision's RandomResizedCrop gives up after as many and crops the centre
CACHED = 1 << 17  # numbers of a chunk on a CPU, 0.5 MB


def short_side(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width once the shorter of them is `side`, rounded down as torchvision does."""
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side


def boxes(
    u: Tensor, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """Random boxes in an image, as `RandomResizedCrop.get_params` draws them.

    Args:
        u: (B, TRIES, 4) uniform in [0, 1): area, aspect ratio, row and column of every try.
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: lowest and highest share of the image's area.
        ratio: lowest and highest width / height, drawn log-uniformly.

    Returns:
        (B, 4) int64: top, left, height, width of the first try that fits into the image, and
        where none does, the largest central box of an allowed ratio.
    """
    area_u, ratio_u, top_u, left_u = u.double().unbind(-1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * ratio_u).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    h, w, top_u, left_u = (x.gather(1, first)[:, 0] for x in (h, w, top_u, left_u))
    box = torch.stack(
        [(top_u * (height - h + 1)).floor(), (left_u * (width - w + 1)).floor(), h, w], 1
    )
    return torch.where(fits.any(1, keepdim=True), box.long(), _central(height, width, ratio))


def box(
    u: Sequence[Sequence[float]],
    height: int,
    width: int,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> tuple[int, int, int, int]:
    """The box of one row of `boxes`: its twenty small operations would cost as much as a crop."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_u, ratio_u, top_u, left_u in u:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
        aspect = math.exp(low + (high - low) * ratio_u)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_u * (height - h + 1)), int(left_u * (width - w + 1)), h, w
    top, left, h, w = _central(height, width, ratio).tolist()
    return top, left, h, w


def _central(height: int, width: int, ratio: Sequence[float]) -> Tensor:
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return torch.tensor([(height - h) // 2, (width - w) // 2, h, w])


class Axis(NamedTuple):
    """What happens along one axis of every image of a batch: a box is resized, then cut."""

    first: Tensor  # (B,) where the box starts, in input pixels
    length: Tensor  # (B,) pixels of the box
    total: int  # output pixels the whole box is resized to
    start: Tensor | None = None  # (B,) the first of these that is wanted, 0 by default

    def rows(self, some: slice) -> "Axis":
        """The same for some images of the batch."""
        start = None if self.start is None else self.start[some]
        return Axis(self.first[some], self.length[some], self.total, start)


def resample(images: Tensor, size: int, down: Axis, across: Axis, interpolation: str) -> Tensor:
    """Boxes of (B, 3, H, W) uint8 images as (B, 3, size, size) uint8, rounded once at the end."""
    b, c, h, w = images.shape
    if c > 1 and images.stride(1) == 0:  # grey images, expanded: once instead of three times
        grey = resample(images[:, :1], size, down, across, interpolation)
        return grey.expand(-1, c, -1, -1).contiguous()
    out = torch.empty(b, c, size, size, dtype=torch.uint8, device=images.device)
    # Fresh memory costs a CPU more than the arithmetic: chunks that stay in the cache are up to
    # twice as fast there as the whole batch at once.
    step = b if images.is_cuda else max(1, CACHED // (c * max(h, size) * max(w, size)))
    # Matrices are made for several chunks of small images: their small operations cost as much.
    block = step * max(1, CACHED // (step * size * max(h, w)))
    for start in range(0, b, block):
        some = slice(start, start + block)
        rows = matrix(down.rows(some), size, h, interpolation)
        columns = matrix(across.rows(some), size, w, interpolation).transpose(1, 2)
        for i in range(0, len(rows), step):
            here = slice(start + i, min(start + i + step, b))
            x = images[here].float().reshape(-1, c * h, w)
            x = torch.bmm(x, columns[i : i + step]).view(-1, c, h, size)
            x = torch.matmul(rows[i : i + step].unsqueeze(1), x).round_().clamp_(0, 255)
            out[here] = x.to(torch.int32)  # twice as fast on a CPU as straight to uint8
    return out


def matrix(axis: Axis, size: int, pixels: int, interpolation: str = "bilinear") -> Tensor:
    """The interpolation matrices (B, size, pixels) of one axis, float32; rows sum to one.

    The weights are those of Pillow and of torchvision with `antialias=True`: the filter is as
    wide as an output pixel where the image shrinks, and sees nothing outside the box.
    """
    device = axis.first.device
    first, length = axis.first.float()[:, None], axis.length.float()[:, None]
    scale = length / axis.total
    wide = scale.clamp(min=1)
    s = torch.arange(size, device=device) + 0.5
    s = s if axis.start is None else s + axis.start[:, None]
    x = torch.arange(pixels, device=device) + 0.5
    inside = ((x > first) & (x < first + length)).unsqueeze(1)  # B 1 pixels
    distance = (x / wide).unsqueeze(1) - ((first + scale * s) / wide).unsqueeze(2)
    weight = FILTERS[interpolation](distance.abs_()).mul_(inside)
    return weight.div_(weight.sum(-1, keepdim=True))


def _tent(x: Tensor) -> Tensor:
    return x.neg_().add_(1).clamp_(min=0)


def _keys(x: Tensor, a: float = -0.5) -> Tensor:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _tent, "bicubic": _keys}
