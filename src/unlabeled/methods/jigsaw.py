"""Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles.

Noroozi and Favaro, ECCV 2016. https://arxiv.org/abs/1603.09246
Goyal, Mahajan, Gupta and Misra, ICCV 2019. https://arxiv.org/abs/1905.01235 (the ResNet head)

    slot i of an image holds tile perm[p][i]; every tile goes through the trunk alone
    L = CE(W [g(f(slot 1)), ..., g(f(slot 9))], p)            p: one of P permutations

g, shared by the tiles, is a linear layer with norm and ReLU. Behind the concatenation the ResNets
of 2019 have the linear layer W alone, the AlexNets of 2016 a `hidden` one of 4096 before it. The
permutations are a buffer of the augmentation, so that a checkpoint brings the answers back with
the questions. Invariants: chance is log P; shuffling slots shuffles blocks of the concatenation.
Traps: permutation files number tiles from 1, and by columns in VISSL; tiles flipped or turned
grey one by one; slots and tiles exchanged.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.dense import Dense
from unlabeled.parts.montage import framed, montage
from unlabeled.parts.pixels import pixels
from unlabeled.parts.precision import full_precision


class Jigsaw(Method):
    """Predicts which permutation shuffled an image's tiles.

    Args:
        backbone: f, applied to each tile.
        augment: gives tiles (B, T, 3, h, w), `target`, and has the (P, T) `permutations`.
        optim: see `Method`.
        dim: width of g, per tile.
        hidden: widths of layers between the concatenation and W.
        norm: of g and of these layers: "batch" (of this process), "sync" (of all) or "none".
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        dim: int = 1000,
        hidden: Sequence[int] = (),
        norm: Literal["batch", "sync", "none"] = "batch",
    ) -> None:
        super().__init__(backbone, augment, optim)
        count, tiles = cast(Tensor, augment.permutations).shape
        self.tile_head = Dense(self.feature_dim, dim, norm=norm)
        self.hidden = Dense(tiles * dim, *hidden, norm=norm)
        self.head = nn.Linear(self.hidden.dim, count)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (tiles,), target = batch["views"], cast(Tensor, batch["target"])  # B T 3 h w
        h, logits = self._answer(tiles)
        self.watch(features=h.view(len(tiles), -1, h.shape[1]).mean(1))
        self.note("accuracy", (logits.argmax(1) == target).float().mean())
        return {"jigsaw": full_precision(F.cross_entropy)(logits, target)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The tiles as they are given, in the order that the answer says, and in the right one."""
        (tiles,), target = batch["views"], cast(Tensor, batch["target"])
        answer = self._answer(tiles)[1].argmax(1)
        shown, rows = pixels(tiles).clamp(0, 1), torch.arange(len(tiles))[:, None]
        orders = cast(Tensor, self.augment.permutations)
        answered, solved = (
            montage(shown[rows, orders[p].argsort(1)]) for p in (answer, target)
        )  # slot i holds tile orders[p][i]
        answered = framed(answered, answer == target)
        return {"shuffled": montage(shown), "put back by the answer": answered, "truth": solved}

    def _answer(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Features (BT, D) of tiles (B, T, 3, h, w), and logits (B, P)."""
        h = self.backbone(tiles.flatten(0, 1))
        return h, self.head(self.hidden(self.tile_head(h).view(len(tiles), -1)))
