"""The whole image as a square, without regard to its proportions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.data.decode import PILLOW, Interpolation
from unlabeled.data.resample import FILTERS, short_side
from unlabeled.data.rgb import pil, tensor
from unlabeled.draws import Draws
from unlabeled.truth import Window


class Squash:
    """Height and width both become `size`: nothing is cut off, proportions are lost.

    As benchmarks of VOC classification do (Goyal et al., 2019), whose objects often touch the
    border.

    Args:
        size: side of the square in pixels.
        resize: first make the short side this long (VISSL: 256), which blurs a little; None:
            resize once.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    def __init__(
        self, *, size: int, resize: int | None = None, interpolation: Interpolation = "bilinear"
    ) -> None:
        for name, value in (("size", size), ("resize", resize)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if interpolation not in FILTERS:
            raise ValueError(
                f"interpolation must be one of {sorted(FILTERS)}, got {interpolation!r}"
            )
        self.size, self.resize, self.interpolation = size, resize, interpolation

    def __call__(self, image: Tensor, *key: int | str) -> list[Tensor]:
        whole = pil(image)
        for height, width in self._sizes(*image.shape[-2:]):
            whole = whole.resize((width, height), PILLOW[self.interpolation])
        return [tensor(whole).contiguous()]

    def batched(self, images: Tensor, draws: Draws) -> list[Tensor]:
        for size in self._sizes(*images.shape[-2:]):
            x = F.interpolate(
                images.float(), size, mode=self.interpolation, antialias=True, align_corners=False
            )
            images = x.round().clamp(0, 255).to(torch.uint8)
        return [images.contiguous()]

    def window(self, height: int, width: int) -> Window:
        """The part of an image of that size that the crop shows: all of it."""
        return Window(0, 0, height, width, self.size, self.size)

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        first = [] if self.resize is None else [short_side(height, width, self.resize)]
        sizes = [*first, (self.size, self.size)]
        return [size for i, size in enumerate(sizes) if size != ((height, width), *sizes)[i]]

    def __repr__(self) -> str:
        return (
            f"Squash(size={self.size}, resize={self.resize}, interpolation={self.interpolation!r})"
        )
