"""Context Encoders with the adversary that judges what fills the hole.

Pathak, Krahenbuhl, Donahue, Darrell and Efros, CVPR 2016. https://arxiv.org/abs/1604.07379

    max over D:  log D(M x) + log(1 - D(M F(x_ctx)))                     (2 log 2 at D = 1/2)
    min over F:  l_rec |M (x - F(x_ctx))|^2 + l_adv log(1 - D(M F(x_ctx)))

as in `inpainting`, the squares of pixels in [-1, 1], where the official code has them, so that the
weights mean the same. D sees what fills the hole, never what is around it. The official code lowers
-log D(F) in place of log(1 - D(F)) (`adversary`), and shows D whole images where regions are random
(`judges`). D and F take turns on each batch: D's step first, on what F fills in now, then F's
against the new D, at `generator_lr` times the rate. (That code sends outputs of the old D back
through the new one: `old_outputs`.) Each has an optimizer and a schedule, both of the same recipe.

Traps: true and made holes are batches of their own for D, or its batch norm would tell them apart;
D's step gives F no gradient, nor F's step D. D runs in full precision, and only F's step counts as
an update. The trainer can neither clip nor accumulate gradients here: Lightning refuses it.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts import adversary as adversaries
from unlabeled.parts import inpainting
from unlabeled.parts.decoder import last_map
from unlabeled.parts.pixels import explained, pixels


class InpaintingAdversarial(Method):
    """Fills a hole in so that a discriminator takes it for the truth, too.

    Args:
        backbone, augment, decoder, predicts, overlap_weight: see `Inpainting`.
        optim: D's recipe, and F's but for its learning rate.
        discriminator: D, images (B, 3, s, s) to logits (B,).
        lambda_rec, lambda_adv: l_rec and l_adv.
        adversary: what F lowers: "minimax" or "non_saturating".
        judges: D sees the "hole" (cut out of the centre, or else on grey), or a whole "image".
        generator_lr: F's learning rate in D's.
        old_outputs: whether F lowers what D said before its step.
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        decoder: Callable[..., nn.Module],
        discriminator: nn.Module,
        predicts: inpainting.Predicts = "hole",
        overlap_weight: float = 10.0,
        lambda_rec: float = 0.999,
        lambda_adv: float = 0.001,
        adversary: adversaries.Kind = "minimax",
        judges: Literal["hole", "image"] = "hole",
        generator_lr: float = 10.0,
        old_outputs: bool = False,
    ) -> None:
        turns = adversaries.Turns(optim, {"discriminator": 1.0}, factor=generator_lr)
        super().__init__(backbone, augment, cast(Any, turns))
        weights = dict(overlap_weight=overlap_weight, lambda_rec=lambda_rec, lambda_adv=lambda_adv)
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if adversary not in ("minimax", "non_saturating"):
            raise ValueError(f"adversary must be minimax or non_saturating, got {adversary!r}")
        if judges not in ("hole", "image") or (judges, predicts) == ("image", "hole"):
            raise ValueError(f"judges must be hole, or image with predicts=image, got {judges!r}")
        self.automatic_optimization = False
        self.turn = 1  # which of the trainer's optimizers is D's; another as one of several tasks
        self.hole = inpainting.side_of(augment, predicts)
        self.decoder, self.discriminator = decoder(self.feature_dim), discriminator
        self.overlap_weight, self.lambda_rec, self.lambda_adv = weights.values()
        self.adversary: adversaries.Kind = adversary
        self.whole, self.old_outputs = judges == "image", old_outputs

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """F's terms. In training D makes its step on the way, before it judges F."""
        (x,), mask = batch["views"], batch["mask"]
        target = cast(dict[str, Tensor], batch["target"])
        h = last_map(self.backbone, x)  # B C h w
        prediction = inpainting.predicted(self.decoder, h, x.shape[-1], self.hole)
        self.watch(features=h.mean((2, 3)))
        self.note("explained", explained(prediction, target["image"], mask))
        image, filled = 2 * pixels(target["image"]) - 1, 2 * pixels(prediction) - 1  # in [-1, 1]
        reconstruction = inpainting.hole_loss(
            filled, image, mask, target["hidden"], overlap_weight=self.overlap_weight
        )
        true, made = self._judged(image, mask), self._judged(filled, mask)
        optimizer = cast(Any, self.optimizers(False))[self.turn] if self.training else None
        d, kind = self.discriminator, self.adversary
        if optimizer is not None and self.old_outputs:
            told, adversarial = adversaries.with_old_outputs(d, true, made, optimizer, kind)
        else:
            told = adversaries.discriminate(d, true, made, optimizer)
            adversarial = adversaries.judged(d, made, kind)
        self.note("discriminator", told)
        weighted = self.lambda_rec * reconstruction, self.lambda_adv * adversarial
        return dict(zip(("reconstruction", "adversarial"), weighted, strict=True))

    def _judged(self, image: Tensor, mask: Tensor) -> Tensor:
        """What D sees of images (B, 3, S, S)."""
        if self.hole is None:
            return image if self.whole else image * mask
        side = image.shape[-1]
        border = (side - self.hole(side)) // 2
        return image[..., border : side - border, border : side - border]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        names = [f"discriminator.{name}" for name in self.discriminator.state_dict()]
        self._ddp_params_and_buffers_to_ignore += names  # `discriminate` does for it what DDP does

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return adversaries.update(self, super().training_step(batch, batch_idx))

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        (x,) = batch["views"]
        h = last_map(self.backbone, x)
        made = inpainting.predicted(self.decoder, h, x.shape[-1], self.hole)
        return inpainting.pictures(batch, made)
