"""Self-Supervised Video Representation Learning with Odd-One-Out Networks (O3N).

Fernando, Bilen, Gavves and Gould, CVPR 2017. https://arxiv.org/abs/1611.06646

    v_1..v_N: sequences of F frames of one clip, in order but for v_j
    e_i = encode(v_i), one image;  h_i = f(e_i)
    L   = CE(logits(h_1, ..., h_N), j)
    encode: "differences", the F - 1 differences of neighbours, mixed to three channels by a 1x1
            convolution; "dynamic", sum_t (2t - F - 1) v_t, as an approximate rank pooling
    logits: "concatenate", an MLP of all h side by side; "differences", of each element the same
            MLP of sum_n (h_i - h_n), so that places do not matter

From memory of the paper: N = 6 and F = 6; stacked differences are its best encoder and sums of
differences its best fusion, with AlexNet's convolutions. Ours: f takes three channels, as backbones
of images do, so that stacked differences are mixed first; the head of "differences" is shared.

Invariants: equal elements cost log N; a permutation of the elements permutes the logits of
"differences"; a still clip has e = 0 in any order; the answer follows from frame indices. Traps:
crops and colours drawn per frame or per element, which make any element odd; a batch norm whose
statistics tell the odd one (`backbone.norm=group`); an order drawn that is the right one.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch, denormalize
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.mlp import mlp
from unlabeled.parts.montage import framed
from unlabeled.parts.places import Places
from unlabeled.parts.precision import full_precision


class OddOneOut(Method):
    """Tells which of several sequences is out of order.

    Args:
        backbone: f, of encoded sequences.
        augment: gives sequences (B, N, F, 3, H, W) and their `target`, with `elements`, `frames`.
        optim: see `Method`.
        encoder: "differences" or "dynamic".
        fusion: "differences" or "concatenate".
        side: see `Places`: the head sees places of the last map; null: the backbone's features.
        widths: of layers with ReLU through which each element goes.
        hidden: of layers of the head.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"crops", "index", "frames"})
    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        encoder: Literal["differences", "dynamic"] = "differences",
        fusion: Literal["differences", "concatenate"] = "differences",
        side: int | None = None,
        widths: Sequence[int] = (),
        hidden: Sequence[int] = (128,),
    ) -> None:
        super().__init__(backbone, augment, optim)
        for name, value, known in (
            ("encoder", encoder, ("differences", "dynamic")),
            ("fusion", fusion, ("differences", "concatenate")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")
        self.encoder, self.fusion = encoder, fusion
        elements, frames = int(augment.elements), int(augment.frames)  # type: ignore[arg-type]
        if encoder == "differences":
            self.mix = nn.Conv2d(3 * (frames - 1), 3, 1, bias=False)
        self.places = Places(self.feature_dim, side=side, widths=widths)
        if fusion == "concatenate":
            self.head = mlp(elements * self.places.dim, *hidden, elements, norm="none")
        else:
            self.head = mlp(self.places.dim, *hidden, 1, norm="none")

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        logits, features = self._answer(batch)
        target = cast(Tensor, batch["target"])
        self.watch(features=features[:, 0])
        self.note("accuracy", (logits.argmax(1) == target).float().mean())
        return {"odd": full_precision(F.cross_entropy)(logits, target)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The way of each element as it is shown; a green edge is the odd one's, a red one a miss.

        Ways are the differences between the second half of its frames and the first, on grey.
        """
        logits, _ = self._answer(batch)
        (x,), target = batch["views"], cast(Tensor, batch["target"])
        shown, half = denormalize(x), x.shape[2] // 2
        way = 0.5 + shown[:, :, -half:].mean(2) - shown[:, :, :half].mean(2)
        answer, columns = logits.argmax(1), {}
        for i, picture in enumerate(way.clamp(0, 1).unbind(1)):
            marked = (answer == i) | (target == i)
            edged = framed(picture, target == i)
            columns[f"element {i + 1}"] = torch.where(marked[:, None, None, None], edged, picture)
        return columns

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) of sequences (B, F, 3, H, W)."""
        if self.encoder == "differences":
            return self.mix(x.diff(dim=1).flatten(1, 2))
        weights = 2 * torch.arange(1, x.shape[1] + 1, device=x.device) - x.shape[1] - 1
        return torch.einsum("f,bfchw->bchw", weights.to(x.dtype), x)

    def _answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, N) and features (B, N, D)."""
        (x,) = batch["views"]
        e = self.encode(x.flatten(0, 1)).contiguous(memory_format=torch.channels_last)
        features, h = (y.unflatten(0, x.shape[:2]) for y in self.places(self.backbone, e))
        if self.fusion == "concatenate":
            return self.head(h.flatten(1)), features
        apart = h.shape[1] * h - h.sum(1, keepdim=True)
        return self.head(apart).squeeze(2), features
