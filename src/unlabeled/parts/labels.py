"""Labels per image that are not the data's own: clusters, and the true ones made noisy."""

import torch
from torch import Tensor, nn

from unlabeled.draws import Draws
from unlabeled.parts.clustering import nmi

BLOCK = 4096  # images whose noise is drawn together: that of an image must not depend on n


class PseudoLabels(nn.Module):
    """The cluster of every image, and how a labeling compares with the one before.

    Args:
        count: images in the training set.
    """

    alike = True  # equal in every process: DDP need not send them around
    of: Tensor  # (count,) int64; -1 before the first labeling
    epoch: Tensor  # () in which they were made; -1 before the first
    nmi: Tensor  # () with the labels before; 0 before the second labeling
    largest: Tensor  # () share of the images in the largest cluster

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("of", torch.full((count,), -1))
        self.register_buffer("epoch", torch.tensor(-1))
        self.register_buffer("nmi", torch.tensor(0.0))
        self.register_buffer("largest", torch.tensor(0.0))

    def update(self, labels: Tensor, epoch: int) -> None:
        """Another labeling (count,), made in an epoch."""
        labels = labels.cpu()
        if int(self.epoch) >= 0:
            self.nmi.fill_(nmi(self.of.cpu(), labels))
        self.largest.fill_(int(labels.bincount().max()) / len(labels))
        self.epoch.fill_(epoch)
        self.of.copy_(labels)

    def __getitem__(self, index: Tensor) -> Tensor:
        """The labels (B,) of images."""
        return self.of[index]


def multi_hot(tags: Tensor, classes: int) -> Tensor:
    """(B, C) float32: 1 for the classes of each row of tags (B, M) int64, where -1 is none."""
    marked = torch.zeros(len(tags), classes + 1, device=tags.device)
    marked.scatter_(1, tags.where(tags >= 0, classes), 1.0)
    return marked[:, :classes]


class LabelNoise(nn.Module):
    """Replaces each image's label with probability p, always by the same one.

    What an image's label becomes is a function of (seed, index, label).

    Args:
        count: images in the training set.
        classes: C.
        p: probability of a replacement.
        include_true: True draws from all C classes, so that a share p (C - 1) / C of labels is
            wrong; False from the others, so that a share p is.
        seed: of the draws.
    """

    alike = True
    replaced: Tensor
    drawn: Tensor

    def __init__(self, count: int, classes: int, p: float, *, include_true: bool, seed: int):
        super().__init__()
        if not include_true and classes < 2:
            raise ValueError(f"noise without the true class needs two classes, got {classes}")
        self.classes, self.include_true = classes, include_true
        blocks = [Draws(seed, "label noise", i, rows=BLOCK) for i in range(-(-count // BLOCK))]
        others = classes if include_true else classes - 1
        flips, drawn = zip(*((d.chance(p), d.integers(others)) for d in blocks), strict=True)
        # They come from the seed: a checkpoint need not carry them.
        self.register_buffer("replaced", torch.cat(flips)[:count], persistent=False)
        self.register_buffer("drawn", torch.cat(drawn)[:count], persistent=False)

    def forward(self, label: Tensor, index: Tensor) -> Tensor:
        """Labels (B,) of the images at index (B,), some of them replaced."""
        other = self.drawn[index]
        if not self.include_true:
            other = (label + 1 + other) % self.classes
        return torch.where(self.replaced[index], other, label)
