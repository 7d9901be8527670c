"""A denoising autoencoder's question and answer: a corrupted view and the clean one.

Corruptions are modules (x, draws) -> new x for normalised images (B, 3, H, W). Their numbers are
meant for pixels in [0, 1], as papers state them.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from unlabeled.augment.noise import normal, uniform
from unlabeled.augment.rows import share
from unlabeled.augment.views import channels_last
from unlabeled.batch import MEAN, STD, Batch
from unlabeled.draws import Draws, to


class Corrupted(nn.Module):
    """One view, corrupted; `target` is the clean view.

    Args:
        base: a module (Batch, Draws) -> Batch that gives one view (B, 3, H, W).
        corruption: one of those below.
    """

    def __init__(self, base: nn.Module, corruption: nn.Module) -> None:
        super().__init__()
        self.base, self.corruption = base, corruption

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        batch = self.base(batch, draws.fork("base"))
        x = one_view(batch, "a corruption")
        corrupted = self.corruption(x, draws.fork("corruption"))
        return {**batch, "views": [channels_last(corrupted)], "target": x}


class Gaussian(nn.Module):
    """Adds noise N(0, sigma^2) to every channel of every pixel; nothing is clipped.

    Args:
        sigma: of pixels in [0, 1].
    """

    def __init__(self, *, sigma: float = 0.25) -> None:
        super().__init__()
        if sigma < 0:
            raise ValueError(f"sigma must not be negative, got {sigma}")
        self.sigma = sigma

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        noise = normal(draws, x.device, *x.shape[1:])
        return x + noise * (self.sigma / channels(STD, x.device))


class Masking(nn.Module):
    """Hides each pixel, or each patch, of an image with a probability.

    Args:
        p: probability.
        patch: side in pixels of the squares that are hidden as a whole; 1: single pixels.
        fill: what hides them: "black" (0 of pixels in [0, 1], as in the paper), "mean" (ImageNet's:
            exactly 0 in normalised images, like the padding of convolutions), or "noise" (uniform
            colours, from which a network cannot read off what is hidden).
    """

    def __init__(
        self, *, p: float = 0.25, patch: int = 1, fill: Literal["black", "mean", "noise"] = "black"
    ) -> None:
        super().__init__()
        self.p = share(p, "p")
        if patch < 1:
            raise ValueError(f"patch must be at least 1 pixel, got {patch}")
        if fill not in ("black", "mean", "noise"):
            raise ValueError(f"fill must be black, mean or noise, got {fill!r}")
        self.patch, self.fill = patch, fill

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        height, width = (-(-side // self.patch) for side in x.shape[-2:])  # the last may be cut
        hidden = uniform(draws.fork("where"), x.device, 1, height, width) < self.p
        for dim in (2, 3):
            hidden = hidden.repeat_interleave(self.patch, dim)
        hidden = hidden[..., : x.shape[-2], : x.shape[-1]]
        if self.fill == "mean":
            return x.masked_fill(hidden, 0.0)
        if self.fill == "black":
            return torch.where(hidden, normalized(torch.zeros_like(x)), x)
        colours = uniform(draws.fork("fill"), x.device, *x.shape[1:])
        return torch.where(hidden, normalized(colours), x)


class SaltAndPepper(nn.Module):
    """Makes each pixel, with a probability, black or white: a fair coin says which.

    Args:
        p: probability.
    """

    def __init__(self, *, p: float = 0.25) -> None:
        super().__init__()
        self.p = share(p, "p")

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        where = uniform(draws.fork("where"), x.device, 1, *x.shape[-2:]) < self.p
        white = (uniform(draws.fork("which"), x.device, 1, *x.shape[-2:]) < 0.5).to(x.dtype)
        return torch.where(where, normalized(white), x)


def one_view(batch: Batch, what: str) -> Tensor:
    """The batch's view, if there is one only."""
    views = batch.get("views", [])
    if len(views) != 1:
        raise ValueError(f"{what} takes one view, `base` gave {len(views)}")
    return views[0]


def normalized(x: Tensor) -> Tensor:
    """As `batch.normalize`, without making the host wait."""
    return (x - channels(MEAN, x.device)) / channels(STD, x.device)


def channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """A number per channel, to be combined with images: (3, 1, 1)."""
    return to(torch.tensor(values), device).view(3, 1, 1)
