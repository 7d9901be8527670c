"""Context Encoders: Feature Learning by Inpainting, without the adversary.

Pathak, Krahenbuhl, Donahue, Darrell and Efros, CVPR 2016. https://arxiv.org/abs/1604.07379

    x_ctx = (1 - M') x + M' mean           M': the hole, M without a band along its border
    L = sum of w (x - F(x_ctx))^2 over M, per pixel;  w = 1 in M', 10 in the band M - M'

F is the encoder, a channel-wise fully-connected layer with a stride-1 convolution, and the decoder.
This is the paper's network for features, where an adversary did not converge (AlexNet, random
regions, L2 alone): the recipe is from memory, the holes are the official code's. That code has no
band where regions are random (`overlap` is 0), and also reconstructs what is around the hole, with
the weight 1, or 10 with its `useOverlapPred`: `context_weight`. The paper's loss is 0 there.

Invariants: what is predicted outside M changes nothing; x_ctx is x outside M', bit for bit; F = x
has no loss, and F = mean the region's variance about it. Traps: the encoder, with its batch norm,
sees holes only, and nothing is resized after the hole was cut.
"""

from collections.abc import Callable
from typing import ClassVar, cast

from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts import inpainting
from unlabeled.parts.decoder import last_map
from unlabeled.parts.inpainting import Predicts
from unlabeled.parts.pixels import explained


class Inpainting(Method):
    """Fills a hole in from what is around it, by least squares.

    Args:
        backbone: the encoder, of which the last stage's map is decoded.
        augment: `unlabeled.augment.holes.Holes`.
        optim: see `Method`.
        decoder: makes the decoder, with the bottleneck, from the map's channels:
            `unlabeled.parts.decoder.Decoder`, partial.
        predicts: the whole "image", or a centre's "hole" only.
        overlap_weight: w in the visible band of the region.
        context_weight: w outside the region; 0: nothing there is looked at.
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        decoder: Callable[..., nn.Module],
        predicts: Predicts = "image",
        overlap_weight: float = 10.0,
        context_weight: float = 0.0,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if overlap_weight < 0 or context_weight < 0:
            raise ValueError(
                "weights must not be negative, got "
                f"overlap_weight={overlap_weight}, context_weight={context_weight}"
            )
        if predicts == "hole" and context_weight:
            raise ValueError(f"predicts=hole has no context for context_weight={context_weight}")
        self.hole = inpainting.side_of(augment, predicts)
        self.decoder = decoder(self.feature_dim)
        self.overlap_weight, self.context_weight = overlap_weight, context_weight

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,), mask = batch["views"], batch["mask"]
        target = cast(dict[str, Tensor], batch["target"])
        h = last_map(self.backbone, x)  # B C h w
        prediction = inpainting.predicted(self.decoder, h, x.shape[-1], self.hole)
        self.watch(features=h.mean((2, 3)))
        self.note("explained", explained(prediction, target["image"], mask))
        loss = inpainting.hole_loss(
            prediction,
            target["image"],
            mask,
            target["hidden"],
            overlap_weight=self.overlap_weight,
            context_weight=self.context_weight,
        )
        return {"reconstruction": loss}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        (x,) = batch["views"]
        h = last_map(self.backbone, x)
        return inpainting.pictures(
            batch, inpainting.predicted(self.decoder, h, x.shape[-1], self.hole)
        )
