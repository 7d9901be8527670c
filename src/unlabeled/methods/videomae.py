"""VideoMAE: Masked Autoencoders are Data-Efficient Learners for Self-Supervised Video Pre-Training.

Tong, Song, Wang and Wang, NeurIPS 2022. https://arxiv.org/abs/2203.12602

    a clip is cut into cubes of 2 frames and 16 x 16 pixels, t x h x w of them
    M_i: round(ratio h w) places of clip i, chosen at random and masked at all t times (tubes)
    y   = decoder(encoder(cubes of i without those at M_i)), the pixels of each cube
    y*  = (x - mean) / std of a cube's own pixels (biased variance)
    L   = mean over clips and masked cubes of the mean over a cube's numbers of (y - y*)^2

Tubes, and 90 %, because what is hidden in one frame would be seen in the next. The encoder attends
to visible cubes in all of space and time and computes nothing for others.

From memory of the paper: its decoder is of half the encoder's width with 4 blocks; every 2nd (4th)
frame of 16 on Something-Something (Kinetics). Ours: the decoder's positions are sines and cosines
of a cube's row, which counts through time, and its column; pixels are those of normalised views,
and mean and std are of a cube's 3 channels together, as in our MAE.

Invariants: a place is masked at all times or at none; exactly t round(ratio h w) cubes are masked;
predictions of visible cubes do not matter; predicting a cube's mean costs 1; what lies under the
mask does not change what the encoder makes. Traps: one mask for the whole batch; masks drawn per
frame; loss on visible cubes; a still clip, which visible cubes say nothing less about.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch, denormalize
from unlabeled.draws import to
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.cubes import cubes, tubes, whole
from unlabeled.parts.masked import masked_error, standardized
from unlabeled.parts.patch_decoder import PatchDecoder, initialize


class VideoMAE(Method):
    """VideoMAE with the paper's numbers.

    Args:
        backbone: the encoder, a `VideoTransformer`.
        augment: gives one clip (B, T, 3, H, W).
        optim: see `Method`.
        ratio: share of places that are masked.
        dim: width of the decoder; `depth` are its blocks, `heads` those of its attention.
        normalize: predict pixels normalised by cube; else those of the view.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"crops", "index", "frames"})
    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        ratio: float = 0.9,
        dim: int = 384,
        depth: int = 4,
        heads: int = 6,
        normalize: bool = True,
    ) -> None:
        super().__init__(backbone, augment, optim)
        encoder: Any = backbone
        if not hasattr(encoder, "tubelet"):
            raise ValueError(
                f"{type(backbone).__name__} has no cubes of space and time that can be masked: "
                "choose backbone=video_transformer or video_transformer_tiny"
            )
        if not 0 < ratio < 1:
            raise ValueError(f"ratio is a share of the places, in (0, 1), got {ratio}")
        self.ratio, self.normalize = ratio, normalize
        self.cube = (int(encoder.patch), int(encoder.tubelet))
        outputs = 3 * self.cube[0] ** 2 * self.cube[1]
        sizes = dict(dim=dim, depth=depth, heads=heads, outputs=outputs)
        self.decoder = PatchDecoder(self.feature_dim, 0, **sizes)
        initialize(self.decoder)
        initialize(backbone)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        pixels, predicted, mask, features = self.fill_in(batch)
        target = standardized(pixels)[0] if self.normalize else pixels
        self.watch(features=features)
        return {"reconstruction": masked_error(predicted, target, mask)}

    def fill_in(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cubes and their predictions (B, L, P), the mask (B, L), and the encoder's features."""
        (x,) = batch["views"]  # B T 3 H W
        pixels, (times, rows) = cubes(x, *self.cube), self._grid(x)
        places = pixels.shape[1] // times
        masked = round(self.ratio * places)
        if not 0 < masked < places:
            raise ValueError(f"ratio={self.ratio} masks {masked} of {places} places")
        order = to(tubes(self.draws("mask", len(x)), times, places, masked), x.device)
        kept = order[:, : times * (places - masked)]
        features, tokens = cast(Any, self.backbone).visible(x, kept)
        mask = torch.ones(order.shape, device=x.device).scatter(1, kept, 0.0)
        return pixels, self.decoder(tokens, order, times * rows), mask, features

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The middle frame; normalised predictions with the true cube's mean and deviation."""
        pixels, predicted, mask, _ = self.fill_in(batch)
        (x,), (_, mean, std) = batch["views"], standardized(pixels)
        hidden, shown = mask[..., None].bool(), predicted.float()
        shown = shown * std + mean if self.normalize else shown
        masked, filled = pixels.masked_fill(hidden, 0.0), torch.where(hidden, shown, pixels)
        columns = {"masked": masked, "filled in": filled, "clip": pixels}
        _, rows = self._grid(x)
        sides = (*self.cube, rows, x.shape[4] // self.cube[0])
        middle = {k: whole(v, *sides)[:, x.shape[1] // 2] for k, v in columns.items()}
        return {k: denormalize(v).clamp(0, 1) for k, v in middle.items()}

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """How many cubes of clips (B, T, 3, H, W) lie behind and above one another."""
        return x.shape[1] // self.cube[1], x.shape[3] // self.cube[0]
