"""The raw-pixel row of evaluations that train the whole network on labels.

Pixels have no weights to tune, so a linear classifier stands for the network. It learns from the
same images, crops and updates. Learning rates are made for features of a network, and pixels are
neither of their size nor as independent: each is also tried at a tenth and a hundredth.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.draws import seed_of, shuffled
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.forward import images
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.tuning import Decode

FACTORS = (1.0, 0.1, 0.01)  # of a learning rate
SEEN = 2048  # training images whose crops give mean and variance, at most


class Standardised(nn.Module):
    """Pixels of crops (B, 3, h, w) or clips (B, T, 3, h, w), each of mean 0 and variance 1 (B, D).

    Args:
        side: in pixels that pictures are resized to.
        pictures: of a clip; clips of another length give so many, at equal distances.
        mean: (D,).
        scale: (D,) one over the standard deviation.
    """

    def __init__(self, side: int, pictures: int, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.pixels, self.pictures = Pixels(side=side), pictures
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (_flat(self.pixels, x, self.pictures) - self.mean) * self.scale


def standardised(subject: Subject, rows: Tensor, decode: Decode, *key: int | str) -> Standardised:
    """Pixels by the statistics of one random crop each of at most 2048 of the images `rows`."""
    order = rows[shuffled(len(rows), *key, "statistics")][:SEEN]
    parts = [part.tolist() for part in order.split(256)]
    count, side, pictures = 0, 0, 1
    moments = torch.zeros(1)
    for batch in subject.data.cut("train", parts, decode, *key, "statistics"):
        x = images(batch["crops"][0], subject.device)
        if not count:
            side, pictures = min(32, x.shape[-1]), x.shape[1] if x.ndim == 5 else 1
        flat = _flat(Pixels(side=side), x, pictures).double()
        moments = torch.stack([flat.sum(0), flat.square().sum(0)]) + (moments if count else 0)
        count += len(flat)
    mean, square = moments / count
    scale = (square - mean.square()).clamp(min=0).add(1e-5).rsqrt()  # the eps of a batch norm
    return Standardised(side, pictures, mean.float(), scale.float()).to(subject.device)


class Classifiers(nn.Module):
    """Linear classifiers of the same features, which learn side by side.

    Args:
        features: gives (B, D).
        classes: C.
        count: of classifiers; all begin with the same weights.
        key: names what their weights are drawn by.
    """

    def __init__(self, features: Standardised, classes: int, count: int, *key: int | str) -> None:
        super().__init__()
        self.features, dim = features, len(features.mean)
        generator = torch.Generator().manual_seed(seed_of(*key))
        weight = 0.01 * torch.randn(classes, dim, generator=generator)
        self.heads = nn.ModuleList(nn.Linear(dim, classes) for _ in range(count))
        for head in self.heads:
            head.weight.data.copy_(weight)  # type: ignore[operator, union-attr]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        self.to(features.mean.device)

    def groups(self, lrs: Sequence[float], weight_decay: float) -> list[dict[str, Any]]:
        """What an optimizer is given: each classifier with a learning rate of its own."""
        return [
            {"params": [*head.parameters()], "lr": lr, "weight_decay": weight_decay}
            for head, lr in zip(self.heads, lrs, strict=True)
        ]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropies, summed over images and classifiers: each learns from its own."""
        z = self.features(x)
        terms = [F.cross_entropy(head(z).float(), y, reduction="sum") for head in self.heads]
        return torch.stack(terms).sum()

    def alone(self, number: int) -> Callable[[Tensor], Tensor]:
        """One of them, a network."""
        return nn.Sequential(self.features, self.heads[number])


def rates(given: Sequence[float]) -> list[float]:
    """Learning rates to try of those that were given for heads on features of a network."""
    return sorted({lr * factor for lr in given for factor in FACTORS}, reverse=True)


def _flat(pixels: Pixels, x: Tensor, pictures: int) -> Tensor:
    if x.ndim == 5 and x.shape[1] != pictures:
        places = (torch.arange(pictures, device=x.device) + 0.5) * x.shape[1] / pictures
        x = x[:, places.long()]
    return pixels(x)
