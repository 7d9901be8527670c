"""Against shortcuts of patches: the colours and the sharpness that tell where a lens put them.

Lenses bend the colours of light differently, so green and magenta lie apart, the more and in the
direction in which a patch lies from the image's centre: a network that sees the distance knows
the answer of a puzzle without knowing what it shows (Doersch et al., 2015, section 3.1).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from unlabeled.augment.rows import on_rows, share, spread
from unlabeled.batch import MEAN
from unlabeled.draws import Draws, to, where

GREEN_MAGENTA = (-1.0, 2.0, -1.0)  # a


def projection() -> Tensor:
    """B = I - a'a / (a a'): what it leaves of a colour has no green-magenta part; greys stay."""
    a = torch.tensor(GREEN_MAGENTA)
    return torch.eye(3) - a.outer(a) / a.dot(a)


class ProjectColors(nn.Module):
    """Takes the green-magenta axis out of each image's colours. Values may leave [0, 1].

    Args:
        p: probability.
    """

    def __init__(self, *, p: float = 1.0) -> None:
        super().__init__()
        self.p = share(p, "p")

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        matrix = to(projection(), x.device)
        rows = where(draws.chance(self.p))
        return on_rows(x, rows, lambda some: torch.einsum("ij,...jhw->...ihw", matrix, some))


class DropColors(nn.Module):
    """Keeps one random channel of each image, and fills the two others with faint noise.

    The kept channel is brought to the mean of all images' channels by its own mean, so that
    normalised it is centred, as the noise is: brightness does not tell neighbours. Values may
    leave [0, 1].

    Args:
        p: probability.
        noise: "gaussian" with a hundredth of the kept channel's deviation (the paper), or
            "uniform" in half a grey level up and down (the official code).
    """

    def __init__(
        self, *, p: float = 1.0, noise: Literal["gaussian", "uniform"] = "gaussian"
    ) -> None:
        super().__init__()
        if noise not in ("gaussian", "uniform"):
            raise ValueError(f"noise must be gaussian or uniform, got {noise!r}")
        self.p, self.noise = share(p, "p"), noise

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        rows, kept = where(draws.chance(self.p)), draws.integers(3)
        plane = (*[1] * (x.ndim - 4), 2, *x.shape[-2:])  # the frames of a clip share it
        gaussian = self.noise == "gaussian"
        noise = draws.normal(*plane) if gaussian else draws.uniform(*plane, low=-0.5, high=0.5)

        def change(some: Tensor) -> Tensor:
            # Channel c of the result is channel (c - kept) mod 3 of [kept one, noise, noise].
            channel = spread(kept[rows], some)
            one = some.take_along_dim(channel, -3)
            one = one - one.mean((-2, -1), keepdim=True)
            scale = one.std((-2, -1), correction=0, keepdim=True) / 100 if gaussian else 1 / 255
            other = (to(noise[rows], some.device) * scale).expand(*some.shape[:-3], 2, -1, -1)
            source = (torch.arange(3, device=some.device).view(3, 1, 1) - channel) % 3
            out = torch.cat([one, other], -3).take_along_dim(source, -3)
            return out.add_(to(torch.tensor(MEAN), some.device).view(3, 1, 1))

        return on_rows(x, rows, change)


class Pixelate(nn.Module):
    """Makes some square images small and large again, by as much as the draw says.

    The small one has sqrt(u) pixels a side, rounded down, u uniform between `least` pixels and
    those of an image one pixel smaller (100 to 9025 of 96 x 96). Both ways are bilinear, and the
    way down is antialiased.

    Args:
        p: probability.
        least: pixels of the smallest image.
    """

    def __init__(self, *, p: float = 0.33, least: int = 100) -> None:
        super().__init__()
        if least < 1:
            raise ValueError(f"least is a number of pixels, at least 1, got {least}")
        self.p, self.least = share(p, "p"), least

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        side = x.shape[-1]
        if x.shape[-2] != side or self.least > (side - 1) ** 2:
            raise ValueError(
                f"Pixelate takes square images of more than least={self.least} pixels, "
                f"got {x.shape[-2]}x{side}"
            )
        rows = where(draws.chance(self.p))
        pixels = draws.uniform(low=self.least, high=(side - 1) ** 2)
        matrix = through(pixels.sqrt().long()[rows], side)

        def change(some: Tensor) -> Tensor:
            m = to(matrix, some.device).view(-1, *[1] * (some.ndim - 3), side, side)
            return m @ some @ m.mT

        return on_rows(x, rows, change)


def through(small: Tensor, side: int) -> Tensor:
    """(n, side, side): what makes lines of `side` pixels small, `small` (n,), and large again."""
    here = torch.arange(side) + 0.5
    size = small.view(-1, 1, 1)
    scale = side / size
    exists = here.view(1, -1, 1) < size  # rows of `down`, beyond which a small line has ended
    down = _hat((here - here.view(-1, 1) * scale) / scale) * exists  # n small side
    up = _hat(here - here.view(-1, 1) / scale) * exists.mT  # n side small
    return _rows(up) @ _rows(down)


def _hat(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).clamp_(min=0)


def _rows(weights: Tensor) -> Tensor:
    """Rows that sum to one, where they are not zero."""
    return weights / weights.sum(-1, keepdim=True).clamp_(min=1e-12)
