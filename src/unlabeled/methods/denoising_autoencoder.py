"""Extracting and Composing Robust Features with Denoising Autoencoders.

Vincent, Larochelle, Bengio and Manzagol, ICML 2008. https://dl.acm.org/doi/10.1145/1390156.1390294
Vincent et al., JMLR 2010. https://www.jmlr.org/papers/v11/vincent10a.html

    x~ ~ q(x~ | x), h = f(x~), x^ = g(h)
    L = mean over images, channels and pixels of (x^ - x)^2              x: the clean image
    or, for pixels x in [0, 1], of -x log s(x^) - (1 - x) log(1 - s(x^))     s: the sigmoid

From memory of the papers, whose networks are small and their images digits: there is no published
recipe for photographs. The numbers of conf/method are this project's choice.

Invariants: without corruption this is an autoencoder; the identity network has L = sigma^2 under
Gaussian noise (0 would mean that the target is the noisy image); the best network gives E[x | x~].
Traps: the corruption stays out of evaluations, which see clean images; a sigmoid's targets are
pixels in [0, 1], not normalised ones; nothing leads around the bottleneck.
"""

from collections.abc import Callable
from typing import ClassVar, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.decoder import last_map
from unlabeled.parts.pixels import explained, pixels
from unlabeled.parts.precision import full_precision


@full_precision
def reconstruction_loss(prediction: Tensor, image: Tensor, kind: Literal["l2", "bce"]) -> Tensor:
    """The loss of predictions (B, 3, H, W), which are logits for "bce", of normalised images."""
    if kind == "l2":
        return (prediction - image).square().mean()
    return F.binary_cross_entropy_with_logits(prediction, pixels(image).clamp(0, 1))


class DenoisingAutoencoder(Method):
    """Restores a clean image from a corrupted one.

    Args:
        backbone: f, of which the last stage's map is decoded.
        augment: gives one corrupted view, and the clean one as `target`.
        optim: see `Method`.
        decoder: makes g from the map's channels: `unlabeled.parts.decoder.Decoder`, partial.
        distance: "l2" between normalised images, or "bce" between pixels in [0, 1].
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        decoder: Callable[..., nn.Module],
        distance: Literal["l2", "bce"] = "l2",
    ) -> None:
        super().__init__(backbone, augment, optim)
        if distance not in ("l2", "bce"):
            raise ValueError(f"distance must be l2 or bce, got {distance!r}")
        self.distance: Literal["l2", "bce"] = distance
        self.decoder = decoder(self.feature_dim)
        if distance == "bce" and getattr(self.decoder, "output", "linear") != "linear":
            raise ValueError("distance=bce reads logits: set decoder.output=linear")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,), image = batch["views"], cast(Tensor, batch["target"])
        h = last_map(self.backbone, x)  # B C h w
        prediction = self.decoder(h, x.shape[-1])
        self.watch(features=h.mean((2, 3)))
        if self.distance == "l2":
            self.note("explained", explained(prediction, image, image.new_ones(1)))
        return {"reconstruction": reconstruction_loss(prediction, image, self.distance)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        (x,), image = batch["views"], cast(Tensor, batch["target"])
        made = self.decoder(last_map(self.backbone, x), x.shape[-1]).float()
        restored = pixels(made) if self.distance == "l2" else made.sigmoid()
        columns = {"corrupted": pixels(x), "restored": restored, "truth": pixels(image)}
        return {title: y.clamp(0, 1) for title, y in columns.items()}
