"""Gaussian blur for batches, each image with a width of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.augment.fuse import fusible
from unlabeled.augment.rows import on_rows, parts, share
from unlabeled.draws import Draws, to, where

SHIFTED = 9  # up to this width, shifted copies are added up; wider filters are convolutions


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
    if kernel <= SHIFTED:
        # Convolutions would be planned anew for every number of images, which is another each
        # step: longer than the arithmetic of small images.
        return torch.cat([_shifted(x[some], weight[some]) for some in parts(x)])
    # Rows and channels become the groups of one image: every one has a filter of its own.
    images = x.flatten(0, -3)
    count = len(images)
    weight = weight.repeat_interleave(count // len(x), 0)[:, None]  # BC 1 K
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    down = F.conv2d(padded, weight.unsqueeze(3), groups=count)
    return F.conv2d(down, weight.unsqueeze(2), groups=count).view(x.shape)


@fusible(writes=False)
def _shifted(x: Tensor, weight: Tensor) -> Tensor:
    """One symmetric filter (B, K) per row along both axes, two neighbours at a time."""
    radius = weight.shape[1] // 2
    padded = F.pad(x.flatten(1, -3), (radius,) * 4, mode="reflect")
    for axis in (-2, -1):
        size = padded.shape[axis] - 2 * radius
        taps = weight.T.view(-1, len(x), 1, 1, 1)
        out = padded.narrow(axis, radius, size) * taps[radius]
        for i in range(1, radius + 1):
            pair = padded.narrow(axis, radius - i, size) + padded.narrow(axis, radius + i, size)
            out.addcmul_(pair, taps[radius + i])
        padded = out
    return padded.view(x.shape)


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
