"""A variational autoencoder of colour fields and its loss (Deshpande et al., 2017)."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.draws import Draws, to
from unlabeled.parts.color_distances import (
    FLOOR,
    gradient_distance,
    kl_divergence,
    principal_axes,
    principal_distance,
    weighted_distance,
)
from unlabeled.parts.continued import continue_from
from unlabeled.parts.dropout import dropped, probability
from unlabeled.parts.precision import raised

LEAST = 4  # side of the smallest map


class ColorVAE(nn.Module):
    """q(z | C) = N(mu, diag s^2) of fields C (B, 2, S, S) in [-1, 1], a decoder, and their loss.

    Convolutions of stride 2 down to 4x4, a linear layer to z, and the same way back.

    Args:
        size: S, 4 times a power of 2.
        dim: of z.
        width: channels after the first convolution; they double with every one.
        kl: weight of the divergence at the end of training.
        kl_reduction: over the batch, "mean" or "sum".
        gradient: weight of the gradients' term.
        principal: how many principal components have a term.
        specific: weight of that term.
        principal_reduction: over numbers of a field, "sum" or "mean".
        truncated: whether noise is cut at 2 deviations.
        grey_skips: whether the decoder sees maps of the field's light.
        dropout: of the map that gives z's moments, the share left out in training (official
            code: 0.3).
    """

    axes: Tensor
    variances: Tensor
    known: Tensor

    def __init__(
        self,
        *,
        size: int = 64,
        dim: int = 64,
        width: int = 128,
        kl: float = 1e-2,
        kl_reduction: str = "mean",
        gradient: float = 1e-3,
        principal: int = 20,
        specific: float = 0.1,
        principal_reduction: str = "sum",
        truncated: bool = False,
        grey_skips: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        levels = (size // LEAST).bit_length() - 1
        if levels < 1 or LEAST * 2**levels != size:
            raise ValueError(f"size must be 8, 16, 32, 64, ..., got {size}")
        for name, value in (("dim", dim), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        weights = {"kl": kl, "gradient": gradient, "principal": principal, "specific": specific}
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        reductions = {"kl_reduction": kl_reduction, "principal_reduction": principal_reduction}
        for name, reduction in reductions.items():
            if reduction not in ("mean", "sum"):
                raise ValueError(f"{name} must be mean or sum, got {reduction!r}")
        self.dim, self.kl, self.kl_reduction, self.gradient = dim, kl, kl_reduction, gradient
        self.specific, self.truncated = specific, truncated
        self.principal_reduction = principal_reduction
        self.register_buffer("axes", torch.zeros(principal, 2 * size**2))
        self.register_buffer("variances", torch.full((principal,), FLOOR))
        self.register_buffer("known", torch.tensor(False))  # whether there are axes yet
        widths = [width * 2**i for i in range(levels)]
        self.size, self.grey_skips, self.dropout = size, grey_skips, probability(dropout)
        self.down = nn.ModuleList(map(_halved, [2, *widths[:-1]], widths))
        self.moments = nn.Linear(widths[-1] * LEAST**2, 2 * dim)
        self.start = nn.Sequential(
            nn.Linear(dim, widths[-1] * LEAST**2),
            nn.BatchNorm1d(widths[-1] * LEAST**2),
            nn.ReLU(inplace=True),
        )
        light = [1, *widths[:-1]] if grey_skips else []
        self.light = nn.ModuleList(map(_halved, light, widths))
        twice = 2 if grey_skips else 1
        self.up = nn.ModuleList(
            _convolved(twice * wide, narrow)
            for wide, narrow in zip(widths[::-1], [*widths[-2::-1], width], strict=True)
        )
        self.last = nn.Conv2d(width, 2, 5, padding=2)
        self.fixed = False

    def fix(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what a run of the method ended with, and learns no more.

        Args:
            state: the method's, by name.

        Raises:
            ValueError: there is no such autoencoder in it.
        """
        mine = "vae."
        own = {k.removeprefix(mine): x for k, x in state.items() if k.startswith(mine)}
        continue_from(own, self.requires_grad_(False))
        self.fixed = True
        self.eval()

    def train(self, mode: bool = True) -> "ColorVAE":
        return super().train(mode and not self.fixed)

    def encode(self, field: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """mu and log sigma^2 (B, dim); nothing is dropped without draws."""
        for block in self.down:
            field = block(field)
        field = dropped(field, self.dropout, draws)
        mu, log_var = self.moments(field.flatten(1)).chunk(2, 1)
        return raised(mu), raised(log_var).clamp(-20, 20)

    def decode(self, z: Tensor, light: Tensor) -> Tensor:
        """Fields (B, 2, S, S) of codes z and, with `grey_skips`, of the light (B, 1, S, S)."""
        skips = []
        for block in self.light:
            light = block(light)
            skips.append(light)
        x = self.start(z).view(len(z), -1, LEAST, LEAST)
        for block in self.up:
            x = torch.cat([x, skips.pop()], 1) if skips else x
            x = F.interpolate(block(x), scale_factor=2, mode="nearest")
        return self.last(x).tanh()

    def sample(self, mu: Tensor, log_var: Tensor, draws: Draws) -> Tensor:
        """z (B, dim) of the posterior."""
        drawn = draws.uniform(self.dim) if self.truncated else draws.normal(self.dim)
        epsilon = to(truncated_normal(drawn) if self.truncated else drawn, mu.device)
        return mu + (log_var / 2).exp() * epsilon

    def terms(
        self,
        field: Tensor,
        truth: Tensor,
        weight: Tensor,
        mu: Tensor,
        log_var: Tensor,
        share: float,
    ) -> dict[str, Tensor]:
        """The weighted terms of the loss.

        Args:
            field: decoded (B, 2, S, S).
            truth: likewise.
            weight: (B, S, S), of each colour.
            mu: of the posterior (B, dim).
            log_var: likewise.
            share: of training that is done.
        """
        divergence = kl_divergence(mu, log_var, self.kl_reduction)
        terms = {
            "reconstruction": weighted_distance(field, truth, weight),
            "gradient": self.gradient * gradient_distance(field, truth),
            "kl": self.kl * share * divergence,
        }
        if len(self.axes):
            distance = principal_distance(field, truth, self.axes, self.variances)
            distance = distance / (1 if self.principal_reduction == "sum" else field[0].numel())
            terms["principal"] = self.specific * distance
        return terms

    @torch.no_grad()
    def learn_axes(self, fields: Tensor) -> None:
        """Fixes the principal axes: those of these fields (n, 2, S, S)."""
        if len(self.axes):
            axes, variances = principal_axes(fields, len(self.axes))
            self.axes.copy_(axes)
            self.variances.copy_(variances)
        self.known.fill_(True)


def _halved(channels: int, out: int) -> nn.Module:
    return _convolved(channels, out, stride=2)


def _convolved(channels: int, out: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(channels, out, 5, stride, padding=2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


def scattered(data: Any, count: int, runs: int = 32) -> Iterator[Tensor]:
    """About `count` training images, uint8, from `runs` places: files may lie in order of class."""
    n, each = data.size("train"), -(-count // runs)
    for i in range(runs):
        start, end = i * n // runs, (i + 1) * n // runs
        if start < end:
            yield from (b["crops"][0] for b in data.scan("train", start, min(start + each, end)))


def truncated_normal(uniform: Tensor) -> Tensor:
    """Normal numbers cut at 2 deviations, made of uniform ones in [0, 1)."""
    mass = 0.9544997361036416  # of a Gaussian between -2 and 2
    return (2 * uniform - 1).mul(mass).erfinv() * 2**0.5
