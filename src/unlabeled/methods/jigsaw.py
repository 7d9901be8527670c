"""Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles.

Noroozi and Favaro, ECCV 2016. https://arxiv.org/abs/1603.09246
Goyal, Mahajan, Gupta and Misra, ICCV 2019. https://arxiv.org/abs/1905.01235 (the ResNet head)

    slot i of an image holds tile perm[p][i]; every tile goes through the trunk alone
    L = CE(W [g(f(slot 1)), ..., g(f(slot 9))], p)            p: one of P permutations

g, shared by the tiles, is a linear layer with batch norm and ReLU. The permutations are a buffer
of the augmentation, so that a checkpoint brings the answers back with the questions.
"""

from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim


class Jigsaw(Method):
    """Predicts which permutation shuffled an image's tiles.

    Args:
        backbone: f, applied to each tile.
        augment: gives tiles (B, T, 3, h, w), `target`, and has the (P, T) `permutations`.
        optim: see `Method`.
        dim: width of g, per tile.
    """

    pretext: ClassVar[bool] = True

    def __init__(
        self, backbone: nn.Module, augment: nn.Module, optim: Optim, *, dim: int = 1000
    ) -> None:
        super().__init__(backbone, augment, optim)
        count, tiles = cast(Tensor, augment.permutations).shape
        self.tile_head = nn.Sequential(
            nn.Linear(self.feature_dim, dim), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(tiles * dim, count)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (tiles,), target = batch["views"], cast(Tensor, batch["target"])  # B T 3 h w
        h = self.backbone(tiles.flatten(0, 1))  # BT D
        logits = self.head(self.tile_head(h).view(len(tiles), -1))  # B P
        self.watch(features=h.view(len(tiles), -1, h.shape[1]).mean(1))
        self.note("accuracy", (logits.argmax(1) == target).float().mean())
        return {"jigsaw": F.cross_entropy(logits.float(), target)}
