"""Mean intersection over union (mIoU) of maps of classes (Everingham et al., 2010).

torchmetrics counts the pixels of each image; it has no mIoU of resampled images, so the mean is
taken here of their sums.
"""

import torch
from torch import Tensor

from unlabeled.draws import seed_of
from unlabeled.evaluate.intervals import percentiles


def counts(predicted: Tensor, true: Tensor, classes: int, ignored: int = 255) -> Tensor:
    """Pixels (3, C) int64 of one image, for each class: both say it, truth does, prediction does.

    Args:
        predicted: (H, W) integers below `classes`.
        true: (H, W) likewise, or `ignored`: such a pixel does not exist.
        classes: C, with the background.
        ignored: see `true`.
    """
    from torchmetrics.functional.classification import multiclass_stat_scores  # slow to import

    found = multiclass_stat_scores(
        predicted[None].long(),
        true[None].long(),
        classes,
        average=None,
        ignore_index=ignored,
        validate_args=False,  # which sorts the pixels
    )
    both, more, _, less, _ = found.unbind(-1)  # true and false positives, true and false negatives
    return torch.stack([both, both + less, both + more])


def by_class(table: Tensor) -> Tensor:
    """IoU (..., C) from pixels (..., 3, C); NaN of a class that nobody says anywhere."""
    both, true, predicted = table.double().unbind(-2)
    return both / (true + predicted - both)


def mean_iou(table: Tensor) -> Tensor:
    """The mean of `by_class` over the classes that occur; 0 where none does."""
    return by_class(table).nanmean(-1).nan_to_num(0.0)


def accuracy(table: Tensor) -> Tensor:
    """The share of pixels that are right."""
    return table[..., 0, :].sum(-1) / table[..., 1, :].sum(-1).clamp(min=1)


def intervals(
    images: Tensor, *key: int | str, resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of both over resampled images, from pixels (n, 3, C) of each."""
    n, flat = len(images), images.flatten(1).double()
    generator = torch.Generator().manual_seed(seed_of(*key, n))
    found: dict[str, list[float]] = {"miou": [], "pixel_accuracy": []}
    for _ in range(resamples):
        times = torch.randint(n, (n,), generator=generator).bincount(minlength=n)
        table = (times.double() @ flat).view(images.shape[1:])
        found["miou"].append(mean_iou(table).item())
        found["pixel_accuracy"].append(accuracy(table).item())
    return {name: percentiles(values) for name, values in found.items()}
