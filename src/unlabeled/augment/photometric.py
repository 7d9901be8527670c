"""Ops on the values of pixels: solarize, posterize, sharpen and stretch the contrast."""

import torch
from torch import Tensor, nn

from unlabeled.augment.rows import on_rows, share, spread
from unlabeled.draws import Draws, where


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Images in [0, 1] with the values from their threshold (B,) on inverted."""
    return torch.lerp(x, 1 - x, (x >= spread(threshold, x)).to(x.dtype))


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Images in [0, 1] rounded down to 2 ** bits values, `bits` (B,)."""
    levels = spread(torch.exp2(bits.float()), x)
    return torch.minimum((x * levels).floor_(), levels - 1).div_(levels)


def autocontrast(x: Tensor) -> Tensor:
    """Images (..., H, W) with every channel stretched over [0, 1], unless it is constant."""
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    flat = (high == low).to(x.dtype)
    return (x - low * (1 - flat)).div_(high - low + flat).clamp_(0, 1)


def adjust_sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Images blended with their smoothed selves: factor (B,) 0 is smooth, 1 changes nothing.

    The border of one pixel stays as it is.
    """
    inside = x[..., 1:-1, 1:-1]
    total = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    total = total[..., :-2] + total[..., 1:-1] + total[..., 2:]
    smooth = total.add_(inside, alpha=4).div_(13)  # ones, and a 5 in the middle
    sharp = torch.lerp(smooth, inside, spread(factor, x)).clamp_(0, 1)
    return torch.cat(
        [
            x[..., :1, :],
            torch.cat([x[..., 1:-1, :1], sharp, x[..., 1:-1, -1:]], -1),
            x[..., -1:, :],
        ],
        -2,
    )


class Solarize(nn.Module):
    """Inverts the bright values of each image.

    Args:
        p: probability.
        threshold: in [0, 1], from which values on.
    """

    def __init__(self, *, p: float = 0.2, threshold: float = 0.5) -> None:
        super().__init__()
        self.p, self.threshold = share(p, "p"), threshold

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        rows = where(draws.chance(self.p))
        threshold = torch.full(rows.shape, self.threshold)
        return on_rows(x, rows, lambda some: solarize(some, threshold))


class Photometric(nn.Module):
    """PIRL's photometric ops, as its official code applies them: all four or none.

    With probability p an image is posterized to 4 to 8 bits, then its sharpness is changed by a
    factor in [0.1, 1.9], then it is solarized from a threshold in {0, 1, ..., 256} / 255 on,
    then its contrast is stretched.

    Args:
        p: probability.
    """

    def __init__(self, *, p: float = 0.66) -> None:
        super().__init__()
        self.p = share(p, "p")

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        rows = where(draws.chance(self.p))
        bits = draws.integers(9, low=4)[rows]
        factor = draws.uniform(low=0.1, high=1.9)[rows]
        threshold = draws.integers(257)[rows] / 255

        def change(some: Tensor) -> Tensor:
            some = adjust_sharpness(posterize(some, bits), factor)
            return autocontrast(solarize(some, threshold))

        return on_rows(x, rows, change)
