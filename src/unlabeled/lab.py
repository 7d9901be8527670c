"""CIE Lab, in which colourisation tells light (L) from colour (a, b): sRGB under D65, 2 degrees.

Batched, on any device, with gradients. Numbers are Python's, so nothing is copied to a device.
"""

import torch
from torch import Tensor

AB = 110.0  # no colour of sRGB has a larger |a| or |b| (its largest is 107.9)
TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
TO_RGB = (  # its inverse
    (3.2404813432005266, -1.5371515162713185, -0.49853632616888777),
    (-0.9692549499965682, 1.8759900014898907, 0.041555926558292815),
    (0.05564663913517715, -0.20404133836651123, 1.0573110696453443),
)
WHITE = (0.95047, 1.0, 1.08883)
DARK = 0.008856  # of a white of 1: below, the cube root becomes a line


def rgb_to_lab(x: Tensor) -> Tensor:
    """Lab (..., 3, H, W), L in [0, 100], of sRGB images in [0, 1]: not normalised ones."""
    linear = torch.where(x > 0.04045, ((x.clamp(min=0.04) + 0.055) / 1.055).pow(2.4), x / 12.92)
    fx, fy, fz = (
        torch.where(v > DARK, v.clamp(min=DARK).pow(1 / 3), 7.787 * v + 16 / 116)
        for v in (v / w for v, w in zip(_times(TO_XYZ, linear), WHITE, strict=True))
    )
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], -3)


def lab_to_rgb(x: Tensor) -> Tensor:
    """sRGB images (..., 3, H, W) in [0, 1] of Lab ones; what sRGB cannot show is clipped."""
    light, a, b = x.unbind(-3)
    fy = (light + 16) / 116
    f = torch.stack([fy + a / 500, fy, (fy - b / 200).clamp(min=0)], -3)
    xyz = torch.where(f > 0.2068966, f.pow(3), (f - 16 / 116) / 7.787)
    scaled = torch.stack([v * w for v, w in zip(xyz.unbind(-3), WHITE, strict=True)], -3)
    linear = torch.stack(_times(TO_RGB, scaled), -3).clamp(0, 1)
    bright = 1.055 * linear.clamp(min=0.003).pow(1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, bright, linear * 12.92)


def _times(matrix: tuple[tuple[float, float, float], ...], x: Tensor) -> list[Tensor]:
    r, g, b = x.unbind(-3)
    return [p * r + q * g + s * b for p, q, s in matrix]
