"""Learning Diverse Image Colorization.

Deshpande, Lu, Yeh, Chong and Forsyth, CVPR 2017. https://arxiv.org/abs/1612.01958

    C = a and b / 110 of S x S pixels, G the grey image, w_p a colour's rarity (`parts.colors`)
    VAE: q(z | C) = N(mu, diag s^2), C' = decoder(z)
    L_vae = mean_i sqrt(sum_p w_p |C_p - C'_p|^2) + 1e-3 |grad C - grad C'| + 0.1 L_pc + beta KL
    L_pc = sum_{k<=20} (P_k.(C - C'))^2 / v_k + |rest|^2 / v_20, along principal components of C
    KL = sum_d (mu^2 + s^2 - log s^2 - 1) / 2, beta rising linearly from 0 to 1e-2
    MDN: P(z | G) = sum_{k<=8} pi_k N(z; mu_k, 0.1^2) from the backbone's last map of G
    L_mdn = -log pi_k* + |z - mu_k*|^2 / (2 sigma^2), k* the component with the nearest mean

Colours of G are the decoded means of the likeliest components. principal_reduction=mean divides
L_pc by the numbers of a field; the official code has it in its network without grey skips alone.

Both stages learn at once: z enters L_mdn without gradients, so that the VAE is what it would be
alone, and the mixture follows it until the learning rate falls to 0. One after the other, as in
the paper: a second run, with the first as `source`, keeps its VAE. The backbone learns from L_mdn.
Where the official code (aditya12agd5/divcolor) differs the paper's is the default: kl_reduction=sum
(of KL alone), divide_by=sigma (not its square), stop_gradient=false (its result is dropped),
truncated=true (noise), grey_skips=true with principal=0, dropout 0.3 (VAE), 0.25 (mixture).
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.lab import AB, rgb_to_lab
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.color_vae import ColorVAE, scattered
from unlabeled.parts.colors import ColorBins, colored
from unlabeled.parts.field_error import errors
from unlabeled.parts.map_head import channels
from unlabeled.parts.mixture import MixtureHead, likeliest


class DiverseColorization(Method):
    """Predicts a distribution of colour fields from a grey image.

    Args:
        backbone: with `stages`; it sees grey images.
        augment: gives a grey view and its colours.
        optim: see `Method`.
        vae: of colour fields.
        mixture: makes the head: `unlabeled.parts.mixture.MixtureHead`, partial.
        fields: about how many training images give the principal components, once.
        bin_size, mix: of colours' rarity: see `ColorBins`.
        stop_gradient: whether z enters L_mdn without gradients.
        samples: colours per image in the report, at most the mixture's components.
        source: what a run of this method ended with, for its VAE; null: both stages at once.
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        vae: ColorVAE,
        mixture: Callable[..., MixtureHead],
        fields: int = 2048,
        bin_size: int = 10,
        mix: float = 0.5,
        stop_gradient: bool = True,
        samples: int = 4,
        source: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(backbone, augment, optim)
        self.vae = vae
        self.mixture = mixture(list(channels(backbone).values())[-1], vae.dim)
        if not 1 <= samples <= (most := self.mixture.components):
            raise ValueError(f"samples must lie in [1, {most}], got {samples}")
        if fields < 2:
            raise ValueError(f"fields must be at least 2, got {fields}")
        self.fields, self.stop_gradient, self.samples = fields, stop_gradient, samples
        self.colors = ColorBins(bin_size=bin_size, mix=mix)
        if source is not None:
            vae.fix(source)

    def begin_epoch(self, epoch: int) -> None:
        if not self.vae.known:
            crops = scattered(self.trainer.datamodule, self.fields)  # type: ignore[attr-defined]
            found = (rgb_to_lab(x.to(self.device).float() / 255)[:, 1:] / AB for x in crops)
            self.vae.learn_axes(torch.cat([self._small(ab) for ab in found]))

    def _small(self, x: Tensor) -> Tensor:
        """Every so many pixels (B, C, S, S) of images: colours are not averaged."""
        return F.interpolate(x, size=(self.vae.size, self.vae.size), mode="nearest")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,), target = batch["views"], cast(dict[str, Tensor], batch["target"])
        ab, light = self._small(target["ab"]), self._small(x[:, :1])
        nearest = self.colors.nearest(ab)
        if self.training:
            self.colors.count(nearest)
        dropout = self.draws("dropout", len(x)) if self.training else None
        mu, log_var = self.vae.encode(ab / AB, None if self.vae.fixed else dropout)
        z = self.vae.sample(mu, log_var, self.draws("vae", len(x)))
        h = list(self.backbone.stages(x).values())[-1]  # type: ignore[operator]
        predicted = self.mixture(h, dropout)
        self.watch(features=h.mean((2, 3)))
        if not self.training:
            fields = self._fields(predicted, light, self.mixture.components) * AB
            for name, value in errors(fields, ab, (1, self.samples)).items():
                self.note(name, value)
        terms = {"mixture": self.mixture.loss(z.detach() if self.stop_gradient else z, *predicted)}
        if not self.vae.fixed:
            field, weight = self.vae.decode(z, light), self.colors.weights()[nearest]
            terms |= self.vae.terms(field, ab / AB, weight, mu, log_var, self.progress)
        return terms

    def _fields(self, predicted: tuple[Tensor, Tensor], light: Tensor, count: int) -> Tensor:
        """The likeliest fields (B, count, 2, S, S)."""
        z = likeliest(*predicted, count)
        each = self.vae.decode(z.flatten(0, 1), light.repeat_interleave(count, 0))
        return each.float().unflatten(0, (-1, count))

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        (x,), ab = batch["views"], cast(dict[str, Tensor], batch["target"])["ab"]
        h = list(self.backbone.stages(x).values())[-1]  # type: ignore[operator]
        fields = self._fields(self.mixture(h), self._small(x[:, :1]), self.samples) * AB
        shown = {f"sample {k + 1}": field for k, field in enumerate(fields.unbind(1))}
        return colored(x, shown, ab)
