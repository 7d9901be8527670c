"""Colour ops for batches, image by image what torchvision's functional ops give."""

import torch
from torch import Tensor, nn

from unlabeled.augment.fuse import fusible
from unlabeled.augment.rows import on_rows, parts, share, spread
from unlabeled.draws import Draws, where

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def luma(x: Tensor) -> Tensor:
    """The grey value (..., 1, H, W) of colours (..., 3, H, W)."""
    r, g, b = x.unbind(-3)
    return r.mul(0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114).unsqueeze(-3)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Images (B, ..., 3, H, W) with their hues turned, in HSV, written into x.

    Args:
        x: in [0, 1].
        shift: (B,) in turns, -0.5 to 0.5.
    """
    # Its dozen temporary planes are faster in a CPU's cache than in fresh memory.
    turns = spread(shift, x[..., 0, :, :])
    for some in parts(x):
        _turn(x[some], turns[some])
    return x


@fusible(writes=True)
def _turn(x: Tensor, shift: Tensor) -> Tensor:
    # No comparison makes a mask here: on a CPU, `where` costs ten times as much as arithmetic.
    r, g, b = x.unbind(-3)
    high = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    not_red, not_green = (high - r).sign_(), (high - g).sign_()  # 0 where it is the largest
    after_green = torch.add(b - r, chroma, alpha=2)
    after_blue = torch.add(r - g, chroma, alpha=4)
    hue = torch.lerp(g - b, torch.lerp(after_green, after_blue, not_green), not_red)
    hue.div_(chroma.clamp(min=1e-20)).div_(6)  # turns, -1/6 to 5/6; 0 for greys
    hue.add_(shift + 1).frac_().mul_(6)
    # How far each channel stands between the lowest and the highest, for a hue in [0, 6).
    torch.sub(hue, 3, out=r).abs_().sub_(1)
    torch.sub(hue, 2, out=g).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=b).abs_().neg_().add_(2)
    return x.clamp_(0, 1).mul_(chroma.unsqueeze(-3)).add_(low.unsqueeze(-3)).clamp_(0, 1)


def jitter(x: Tensor, order: Tensor, factors: Tensor, rows: Tensor | None = None) -> Tensor:
    """x with brightness, contrast, saturation and hue changed, in an order for each image.

    Args:
        x: (B, ..., 3, H, W) in [0, 1], written into.
        order: (B, 4) int64 on the CPU: the ops of an image, BRIGHTNESS to HUE, first to last.
        factors: (B, 4) on the CPU: factors of brightness, contrast and saturation (1 changes
            nothing) and the shift of hue in turns (0 changes nothing).
        rows: which images, positions on the CPU; by default all.
    """
    place = (order == HUE).to(torch.uint8).argmax(1)  # of hue in the order of an image
    rows = torch.arange(len(x)) if rows is None else rows
    # With images sorted by the place of hue, those that have another op before it are a slice,
    # and those that have one after it are another: hue, the dearest, runs once for all.
    rows = rows[place[rows].argsort(stable=True)]
    weights = _weights(order[rows], factors[rows], x)
    shift = factors[rows, HUE]
    ends = torch.bincount(place[rows], minlength=4).cumsum(0)[:3].tolist()

    def change(some: Tensor) -> Tensor:
        for i, end in enumerate(ends):
            _blend(some[end:], weights[:, i, end:])
        if (shift != 0).any():
            adjust_hue(some, shift)
        for i, end in enumerate(ends):
            _blend(some[:end], weights[:, i + 1, :end])
        return some

    return on_rows(x, rows, change)


def _weights(order: Tensor, factors: Tensor, x: Tensor) -> Tensor:
    """(3, 4, B, ...) weights of image, grey value and mean grey at each of the four places.

    All ops but hue are clamp(f x + (1 - f) y), with y black, the grey value or the mean grey.
    """
    f = factors.gather(1, order)
    grey, mean = ((1 - f) * (order == op) for op in (SATURATION, CONTRAST))
    weights = torch.stack([f, grey, mean]).transpose(1, 2)
    return spread(weights.flatten(), x).view(3, 4, len(order), *[1] * (x.ndim - 1))


def _blend(x: Tensor, weights: Tensor) -> None:
    if len(x):
        _mixed(x, *weights)


@fusible(writes=True)
def _mixed(x: Tensor, f: Tensor, grey: Tensor, mean: Tensor) -> Tensor:
    y = luma(x)
    average = y.mean((-2, -1), keepdim=True).mul_(mean)
    return torch.addcmul(y.mul_(grey).add_(average), x, f, out=x).clamp_(0, 1)


class ColorJitter(nn.Module):
    """Changes brightness, contrast, saturation and hue, in a random order for every image.

    Args:
        brightness: its factor lies in [max(0, 1 - brightness), 1 + brightness].
        contrast: as brightness.
        saturation: as brightness.
        hue: its shift lies in [-hue, hue], in turns; at most 0.5.
        p: probability that an image is changed at all.
    """

    def __init__(
        self,
        *,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        p: float = 1.0,
    ) -> None:
        super().__init__()
        strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        for name, value in strengths.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue is a share of a turn, in [0, 0.5], got {hue}")
        self.p = share(p, "p")
        self.low = [max(0.0, 1 - s) for s in strengths.values()] + [-hue]
        self.high = [1 + s for s in strengths.values()] + [hue]

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        changed, u, order = draws.chance(self.p), draws.uniform(4), draws.permutations(4)
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return jitter(x, order, low + (high - low) * u, where(changed))


class Grayscale(nn.Module):
    """Takes the colour out of each image, in three equal channels.

    Args:
        p: probability.
    """

    def __init__(self, *, p: float = 0.2) -> None:
        super().__init__()
        self.p = share(p, "p")

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        rows = where(draws.chance(self.p))
        return on_rows(x, rows, lambda some: luma(some).expand_as(some))
