"""Bins of the ab plane of CIE Lab: soft codes, rarity and decoding (Zhang et al., 2016).

The centres are in color_bins.npz, made by scripts/make_color_bins.py: multiples of the bin size,
those around sRGB's gamut (313 for a bin size of 10).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import denormalize
from unlabeled.dist import reduce_sum
from unlabeled.lab import lab_to_rgb
from unlabeled.parts.precision import full_precision

FILE = Path(__file__).with_name("color_bins.npz")


def centres(bin_size: int) -> Tensor:
    """Centres (Q, 2) of the bins, float32."""
    with np.load(FILE) as file:
        sizes = [int(name.removeprefix("bins")) for name in file.files]
        if bin_size not in sizes:
            raise ValueError(f"bin_size must be one of {sizes}, got {bin_size}")
        return torch.from_numpy(file[f"bins{bin_size}"].astype(np.float32))


@full_precision
def soft_codes(ab: Tensor, bins: Tensor, neighbours: int, sigma: float) -> tuple[Tensor, Tensor]:
    """The bins nearest to each colour, nearest first, and their Gaussian weights.

    Args:
        ab: (B, 2, h, w).
        bins: (Q, 2).
        neighbours: k, how many bins share a colour.
        sigma: of the Gaussian of distances.

    Returns:
        Indices and weights, both (B, h, w, k); weights sum to 1.
    """
    flat = ab.movedim(1, -1).reshape(-1, 2)
    distance = torch.cdist(flat, bins.to(flat.dtype), compute_mode="donot_use_mm_for_euclid_dist")
    near, index = distance.topk(neighbours, dim=1, largest=False)
    shape = (len(ab), *ab.shape[2:], neighbours)
    return index.view(shape), (-near.square() / (2 * sigma**2)).softmax(1).view(shape)


@full_precision
def rarity(p: Tensor, mix: float) -> Tensor:
    """Weights w (Q,) of bins of probabilities p: w ~ 1 / ((1 - mix) p + mix / Q), E_p[w] = 1."""
    w = 1 / ((1 - mix) * p + mix / len(p))
    return w / (p * w).sum()


@full_precision
def annealed_mean(logits: Tensor, bins: Tensor, temperature: float) -> Tensor:
    """Colours (B, 2, h, w) of logits (B, Q, h, w): the mean bin under softmax(logits / T)."""
    p = (logits / temperature).softmax(1)
    return torch.einsum("bqhw,qc->bchw", p, bins.to(p.dtype))


@full_precision
def soft_cross_entropy(logits: Tensor, index: Tensor, codes: Tensor, weight: Tensor) -> Tensor:
    """Mean over places of weight (B, h, w) times the cross-entropy with soft codes.

    Args:
        logits: (B, Q, h, w).
        index: (B, h, w, k), bins of which the codes are not 0.
        codes: (B, h, w, k).
        weight: of each place.
    """
    chosen = logits.log_softmax(1).gather(1, index.movedim(-1, 1))
    return -(weight * (codes.movedim(-1, 1) * chosen).sum(1)).mean()


@full_precision
def regression_loss(ab: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Mean over places of weight (B, h, w) times half the squared distance of (B, 2, h, w)."""
    return (weight * (ab - truth).square().sum(1)).mean() / 2


class ColorBins(nn.Module):
    """Bins, and how often colours fell into each.

    The paper counts the colours of all training images beforehand; here every training batch
    adds its own to the counts (over all processes), which are exact after a pass over the data
    and good after the first batches: what is counted is what the loss looks at.

    Args:
        bin_size: step of the grid: 5, 10, 15 or 20.
        neighbours: bins that share a colour in its soft code.
        sigma: of the Gaussian of soft codes, and of the smoothing of frequencies.
        mix: lambda, the share of the uniform distribution in the weights' denominator.
        prior: a `.npy` file of frequencies (Q,), of scripts/make_color_bins.py, instead of counts.
    """

    alike = True  # every process counts the same
    bins: Tensor
    counts: Tensor
    smoothing: Tensor
    table: Tensor

    def __init__(
        self,
        *,
        bin_size: int = 10,
        neighbours: int = 10,
        sigma: float = 5.0,
        mix: float = 0.5,
        prior: str | None = None,
    ) -> None:
        super().__init__()
        bins = centres(bin_size)
        if not 1 <= neighbours <= len(bins):
            raise ValueError(f"neighbours must lie in [1, {len(bins)}], got {neighbours}")
        if sigma <= 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        if not 0 < mix <= 1:
            raise ValueError(f"mix must lie in (0, 1]: at 0 unseen bins weigh inf, got {mix}")
        self.bin_size, self.neighbours, self.sigma, self.mix = bin_size, neighbours, sigma, mix
        self.counting = prior is None
        counts = torch.zeros(len(bins), dtype=torch.int64)
        self.register_buffer("bins", bins, persistent=False)
        self.register_buffer("counts", counts if prior is None else _frequencies(prior, bins))
        reach = int(bins.abs().max()) // bin_size
        line = torch.arange(-reach, reach + 1) * float(bin_size)
        table = torch.cdist(torch.cartesian_prod(line, line), bins).argmin(1)
        self.register_buffer("table", table.view(len(line), -1), persistent=False)
        kernel = (-torch.cdist(bins, bins).square() / (2 * sigma**2)).exp()
        self.register_buffer("smoothing", kernel / kernel.sum(0), persistent=False)

    def encode(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and weights (B, h, w, neighbours) of the soft codes of colours (B, 2, h, w)."""
        return soft_codes(ab, self.bins, self.neighbours, self.sigma)

    def nearest(self, ab: Tensor) -> Tensor:
        """Indices (B, h, w) of the bins nearest to colours (B, 2, h, w): they lie on a grid."""
        reach = self.table.shape[0] // 2
        cell = (ab.float() / self.bin_size).round().clamp(-reach, reach).long() + reach
        return F.embedding(cell[:, 0] * len(self.table) + cell[:, 1], self.table.view(-1, 1))[
            ..., 0
        ]

    @torch.no_grad()
    def count(self, nearest: Tensor) -> None:
        """Adds the nearest bins of this batch's colours, of every process, to the counts."""
        if self.counting:
            flat = nearest.flatten()
            found = torch.zeros_like(self.counts).index_add_(0, flat, torch.ones_like(flat))
            self.counts += reduce_sum(found)

    def frequencies(self) -> Tensor:
        """p (Q,) of the colours counted; uniform before the first."""
        total = self.counts.sum()
        uniform = torch.full_like(self.bins[:, 0], 1 / len(self.bins))
        return torch.where(total > 0, self.counts / total.clamp(min=1), uniform)

    def weights(self) -> Tensor:
        """w (Q,), from frequencies smoothed by a Gaussian, under which its mean is 1."""
        return rarity(self.smoothing @ self.frequencies(), self.mix)

    def decode(self, logits: Tensor, temperature: float) -> Tensor:
        """Colours (B, 2, h, w) of logits (B, Q, h, w)."""
        return annealed_mean(logits, self.bins, temperature)


def _frequencies(path: str, bins: Tensor) -> Tensor:
    if not Path(path).is_file():
        raise ValueError(f"no file of colour frequencies at {path}: see prior")
    try:
        found = np.asarray(np.load(path))
    except Exception as error:  # on what is no such file numpy raises nearly anything
        raise ValueError(f"{path} cannot be read as colour frequencies: {error}") from error
    if found.shape != (len(bins),) or found.min() < 0 or not found.sum() > 0:
        raise ValueError(f"{path} holds no frequencies of {len(bins)} bins: {found.shape}")
    parts = found.astype(np.float64) / found.sum()
    return torch.from_numpy((parts * 2**40).round().astype(np.int64))


def colored(view: Tensor, shown: Mapping[str, Tensor], truth: Tensor) -> dict[str, Tensor]:
    """Columns of a report: the grey view, it in the colours of each guess, and in its own.

    Args:
        view: (B, 3, H, W), normalised, L / 100 in all channels.
        shown: guesses of a and b by title, (B, 2, h, w) of any size.
        truth: (B, 2, H, W).
    """
    light = (denormalize(view)[:, :1] * 100).clamp(0, 100)
    every = {"grey input": torch.zeros_like(truth), **shown, "truth": truth}
    grown = {
        title: F.interpolate(ab.float(), size=tuple(truth.shape[-2:]), mode="bilinear")
        for title, ab in every.items()
    }
    return {title: lab_to_rgb(torch.cat([light, ab], 1)) for title, ab in grown.items()}
