"""Gaussian blur for batches, each image with a width of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.augment.rows import on_rows, share
from unlabeled.draws import Draws, to, where

ONE_PASS = 9  # up to this width, one convolution in two dimensions beats two in one


def gaussian_blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Images (B, ..., H, W) blurred as by torchvision, which mirrors them at their borders.

    Args:
        x: images.
        sigma: (B,) standard deviations in pixels.
        kernel: odd width of the filter in pixels, less than twice the image's.
    """
    radius = kernel // 2
    offset = torch.arange(-radius, radius + 1)
    weight = to((-0.5 * (offset / sigma[:, None]).square()).softmax(1), x.device)  # B K
    # Rows and channels become the groups of one image: every one has a filter of its own.
    images = x.flatten(0, -3)
    count = len(images)
    weight = weight.repeat_interleave(count // len(x), 0)[:, None]  # BC 1 K
    down, across = weight.unsqueeze(3), weight.unsqueeze(2)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    if kernel <= ONE_PASS:
        out = F.conv2d(padded, down * across, groups=count)
    else:
        out = F.conv2d(F.conv2d(padded, down, groups=count), across, groups=count)
    return out.view(x.shape)


class GaussianBlur(nn.Module):
    """Blurs each image with a probability and a width of its own.

    Args:
        p: probability.
        sigma: lowest and highest standard deviation in pixels.
        kernel: odd width of the filter in pixels; by default a tenth of the image's height,
            made odd as in SimCLR: 23 for 224 and 3 for 32 pixels.
    """

    def __init__(
        self,
        *,
        p: float = 0.5,
        sigma: Sequence[float] = (0.1, 2.0),
        kernel: int | None = None,
    ) -> None:
        super().__init__()
        self.p = share(p, "p")
        self.low, self.high = (float(s) for s in sigma) if len(sigma) == 2 else (0.0, 0.0)
        if not 0 < self.low <= self.high:
            raise ValueError(f"sigma must be [low, high] with 0 < low <= high, got {list(sigma)}")
        if kernel is not None and (kernel < 1 or kernel % 2 == 0):
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        self.kernel = kernel

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        side = min(x.shape[-2:])
        kernel = x.shape[-2] // 10 // 2 * 2 + 1 if self.kernel is None else self.kernel
        if kernel // 2 >= side:
            raise ValueError(f"kernel={kernel} is too wide for images of {side} pixels")
        rows = where(draws.chance(self.p))
        sigma = draws.uniform(low=self.low, high=self.high)[rows]
        if kernel == 1:
            return x
        return on_rows(x, rows, lambda some: gaussian_blur(some, sigma, kernel))
