"""Colorful Image Colorization.

Zhang, Isola and Efros, ECCV 2016. https://arxiv.org/abs/1603.08511

    X = L of CIE Lab, Y = (a, b); bins c_1, ..., c_Q of the ab plane (Q = 313 for a grid of 10)
    Z = soft code of Y: its 10 nearest bins, ~ exp(-d^2 / (2 sigma^2)), sigma = 5; q* the nearest
    L_cl = -mean_{h,w} w(q*) sum_q Z_q log Z'_q
    w ~ 1 / ((1 - lambda) p~ + lambda / Q), E_p~[w] = 1
    Y' = sum_q f_T(Z')_q c_q,  f_T(z)_q ~ z_q^(1 / T): T = 1 is the mean, T -> 0 the mode, T = 0.38

p~ are the colours' frequencies, smoothed by a Gaussian of sigma: see `parts.colors`. Colours are
taken at every `stride`-th pixel and never averaged, which would make colours that do not exist.

objective=regression is the paper's comparison, L_2 = mean_{h,w} |Y - Y'|^2 / 2 with Y / 110. Of
several possible colours it gives the mean, greyish where they are opposite; L_cl's optimum keeps
them apart, half the probability on each of two.

Where the paper and the official code (richzhang/colorization) differ: the loss is a mean over
places instead of a sum; the code scales logits by 2.606 = 1 / 0.3837 (temperature=0.3837), and
its PyTorch version decodes with temperature=1, in duller colours. There images without a colour
above |ab| = 5 count nothing (grey=5). The code weighs the gradient alone, and to weigh
each place's loss by a constant has the same gradient.

The trunk takes L / 100 in three channels, normalised as every image; the head is small.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.lab import AB
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.colors import ColorBins, colored, regression_loss, soft_cross_entropy
from unlabeled.parts.map_head import MapHead


class Colorization(Method):
    """Predicts colours from light.

    Args:
        backbone: trunk, with `stages`; it sees grey images.
        augment: gives a grey view and its colours.
        optim: see `Method`.
        objective: "classification" or "regression".
        bin_size: step of the grid of colours: 5, 10, 15 or 20.
        neighbours: bins of a soft code.
        sigma: of soft codes and of the smoothing of frequencies.
        mix: lambda.
        prior: see `ColorBins`.
        temperature: T.
        stride: pixels from one place to the next.
        grey: |a| or |b| that an image must have somewhere to count; None: every image counts.
        width: of the head.
        stages: of the backbone that the head sees; None: the last.
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        objective: str = "classification",
        bin_size: int = 10,
        neighbours: int = 10,
        sigma: float = 5.0,
        mix: float = 0.5,
        prior: str | None = None,
        temperature: float = 0.38,
        stride: int = 4,
        grey: float | None = None,
        width: int = 256,
        stages: Sequence[str] | None = None,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if objective not in ("classification", "regression"):
            raise ValueError(f"objective must be classification or regression, got {objective!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        self.classify, self.grey = objective == "classification", grey
        self.temperature, self.stride = temperature, stride
        self.colors = ColorBins(
            bin_size=bin_size, neighbours=neighbours, sigma=sigma, mix=mix, prior=prior
        )
        out = len(self.colors.bins) if self.classify else 2
        self.head = MapHead(backbone, out, width=width, stages=stages)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,), target = batch["views"], cast(dict[str, Tensor], batch["target"])
        ab = target["ab"][..., :: self.stride, :: self.stride]
        maps = self.backbone.stages(x)  # type: ignore[operator]
        out = self.head(maps, ab.shape[-2:])
        self.watch(features=list(maps.values())[-1].mean((2, 3)))
        weight = torch.ones_like(ab[:, 0])
        if self.grey is not None:
            weight = weight * (target["ab"].abs().amax((1, 2, 3)) > self.grey)[:, None, None]
        if not self.training:
            self.note("error", (self._colors(out) - ab).square().sum(1).mean().sqrt())
        if not self.classify:
            return {"regression": regression_loss(out, ab / AB, weight)}
        index, codes = self.colors.encode(ab)
        nearest = index[..., 0]
        if self.training:
            self.colors.count(nearest)
        weight = weight * self.colors.weights()[nearest]
        hit = (out.argmax(1) == nearest) * weight
        self.note("accuracy", hit.sum() / weight.sum().clamp(min=1e-12))  # weighted as the loss
        return {"classification": soft_cross_entropy(out, index, codes, weight)}

    def _colors(self, out: Tensor, temperature: float | None = None) -> Tensor:
        """a and b (B, 2, h, w) of the head's output."""
        temperature = temperature or self.temperature
        return self.colors.decode(out, temperature) if self.classify else out.float() * AB

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        (x,), ab = batch["views"], cast(dict[str, Tensor], batch["target"])["ab"]
        size = ab[..., :: self.stride, :: self.stride].shape[-2:]
        out = self.head(self.backbone.stages(x), size)  # type: ignore[operator]
        if not self.classify:
            return colored(x, {"regression": self._colors(out)}, ab)
        shown = {f"classes, T = {self.temperature:g}": self._colors(out)}
        return colored(x, {**shown, "classes, mean (T = 1)": self._colors(out, 1.0)}, ab)
