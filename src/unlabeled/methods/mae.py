"""Masked Autoencoders Are Scalable Vision Learners (MAE).

He, Chen, Xie, Li, Dollar and Girshick, CVPR 2022. https://arxiv.org/abs/2111.06377

    M_i: round(ratio L) of the L patches of image i, chosen at random
    y   = decoder(encoder(x without M_i)), a prediction of each patch's pixels
    t   = (x - mean) / std of a patch's own pixels (biased variance)
    L   = mean over images and patches in M_i of the mean over a patch's numbers of (y - t)^2

The encoder sees a class token and the visible patches and computes nothing for others; the decoder
sees their tokens and a learned one for each masked patch. Predicting a patch's mean gives L = 1.

From memory: sine-cosine positions and Glorot's initialisation in both networks; pixels are those of
normalised views; the official code's variance has n - 1 for n, 768 there: `unbiased`. Invariants:
visible patches cost nothing and get no gradient of the loss; the order in which patches are seen
changes nothing; each image has as many masked patches. Traps: masks that the images of a batch
share; mask tokens in the encoder; positions that are shuffled with the patches but not back; flat
patches, whose deviation is zero.
"""

from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch, denormalize
from unlabeled.draws import to
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.masked import masked_error, standardized
from unlabeled.parts.patch_decoder import PatchDecoder, initialize
from unlabeled.parts.patchify import patchify, sine_positions, unpatchify


class MAE(Method):
    """MAE with the paper's ImageNet numbers.

    Args:
        backbone: the encoder, a vision transformer of timm.
        augment: gives one view.
        optim: see `Method`.
        ratio: share of patches that are masked.
        dim: width of the decoder; `depth` are its blocks, `heads` those of its attention.
        normalize: predict pixels normalised by patch; else those of the view.
        unbiased: by a variance with n - 1 for n (the official code).
        positions: "fixed" gives the encoder sines and cosines; "own" leaves what it has to learn.
        glorot: initialise the encoder as the paper does; else it stays as it is.
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        ratio: float = 0.75,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        normalize: bool = True,
        unbiased: bool = False,
        positions: Literal["fixed", "own"] = "fixed",
        glorot: bool = True,
    ) -> None:
        super().__init__(backbone, augment, optim)
        encoder: Any = backbone
        if not hasattr(encoder, "visible"):
            raise ValueError(
                f"{type(backbone).__name__} is no vision transformer of timm, whose patches can "
                "be masked: choose backbone=vit_base, vit_small or vit_tiny_small_image"
            )
        if not 0 < ratio < 1:
            raise ValueError(f"ratio is a share of the patches, in (0, 1), got {ratio}")
        if positions not in ("fixed", "own"):
            raise ValueError(f"positions must be fixed or own, got {positions!r}")
        if encoder.config.get("pretrained") and (glorot or positions == "fixed"):
            raise ValueError(
                f"{glorot=}, {positions=} would overwrite pretrained weights of the backbone: set "
                "method.glorot=false method.positions=own"
            )
        self.ratio, self.normalize, self.unbiased = ratio, normalize, unbiased
        self.patch = encoder.patch
        sizes = dict(dim=dim, depth=depth, heads=heads, outputs=3 * self.patch[0] * self.patch[1])
        self.decoder = PatchDecoder(self.feature_dim, encoder.prefix, **sizes)
        initialize(self.decoder)
        if glorot:
            initialize(backbone)
        if positions == "fixed":
            encoder.fix_positions(sine_positions)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        patches, predicted, mask, features = self.fill_in(batch)
        target = standardized(patches, self.unbiased)[0] if self.normalize else patches
        self.watch(features=features)
        return {"reconstruction": masked_error(predicted, target, mask)}

    def fill_in(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Patches and their predictions (B, L, P), the mask (B, L), and the encoder's features."""
        (x,) = batch["views"]
        patches = patchify(x, self.patch)
        count = patches.shape[1]
        masked = round(self.ratio * count)
        if not 0 < masked < count:
            raise ValueError(f"ratio={self.ratio} masks {masked} of {count} patches")
        order = to(self.draws("mask", len(x)).permutations(count), x.device)
        kept = order[:, : count - masked]
        features, tokens = cast(Any, self.backbone).visible(x, kept)
        mask = torch.ones(order.shape, device=x.device).scatter(1, kept, 0.0)
        return patches, self.decoder(tokens, order, x.shape[2] // self.patch[0]), mask, features

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Normalised predictions are shown with the true patch's mean and deviation."""
        patches, predicted, mask, _ = self.fill_in(batch)
        _, mean, std = standardized(patches, self.unbiased)
        hidden, shown = mask[..., None].bool(), predicted.float()
        shown = shown * std + mean if self.normalize else shown
        masked, filled = patches.masked_fill(hidden, 0.0), torch.where(hidden, shown, patches)
        columns = {"masked": masked, "filled in": filled, "image": patches}
        rows = batch["views"][0].shape[2] // self.patch[0]
        return {k: denormalize(unpatchify(v, self.patch, rows)) for k, v in columns.items()}
