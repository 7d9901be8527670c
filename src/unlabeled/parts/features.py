"""Features of a training set: extracting them, and their principal components."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch, normalize
from unlabeled.dist import rank, reduce_sum, world_size

CHUNK = 1 << 16  # rows that are worked on at once


class ScannedData(Protocol):
    """What a data module must offer to be clustered."""

    def size(self, split: str) -> int:
        """Number of images."""
        ...

    def scan(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of deterministic crops, in order."""
        ...


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode, without gradients; afterwards in the modes they had."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        with torch.no_grad():
            for module in modules:
                module.eval()
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def extract(
    network: Callable[[Tensor], Tensor],
    dim: int,
    data: ScannedData,
    device: torch.device,
    *,
    whole: bool = True,
) -> Tensor:
    """Features (n, dim) of the training set on the CPU, in its order.

    Crops are deterministic; call it within `evaluating`. Each process passes its share of the
    images, a contiguous one.

    Args:
        network: images to features.
        dim: their width.
        data: gives the images.
        device: where the network is.
        whole: every process gets the features of all images; else those of its share.
    """
    n = data.size("train")
    share = -(-n // world_size())
    start, stop = min(n, rank() * share), min(n, (rank() + 1) * share)
    found = torch.zeros(n if whole else stop - start, dim)  # for ImageNet too much for a device
    at = start if whole else 0
    for batch in data.scan("train", start=start, stop=stop) if start < stop else ():
        x = normalize(batch["crops"][0].to(device)).contiguous(memory_format=torch.channels_last)
        rows = network(x).float().cpu()
        found[at : at + len(rows)] = rows
        at += len(rows)
    for some in found.split(CHUNK) if whole and world_size() > 1 else ():
        some.copy_(reduce_sum(some.to(device)))
    return found


def principal(
    features: Tensor, dim: int, *, whiten: bool = False, shared: torch.device | None = None
) -> Tensor:
    """The first principal components of features (n, d): (n, at most dim).

    Args:
        features: (n, d), centred here.
        dim: how many.
        whiten: each to variance 1. Components without variance (fewer images than `dim`, dead
            units) are left out: whitened, they would be rounding errors.
        shared: features are this process's rows out of those of all, and the components are of
            all; processes add up their sums on this device. None: each has all rows.
    """

    def add(x: Tensor) -> Tensor:
        return x if shared is None else reduce_sum(x.to(shared)).to(x.device)

    parts, width = features.split(CHUNK), features.shape[1]
    n = add(torch.tensor(float(len(features)), dtype=torch.float64))
    mean, covariance = features.new_zeros(width).double(), torch.zeros(width, width).double()
    for x in parts:
        mean += x.double().sum(0)
    mean = add(mean) / n
    for x in parts:
        covariance += (x.double() - mean).T @ (x.double() - mean)
    covariance = add(covariance) / n
    variance, axes = torch.linalg.eigh(covariance)  # in ascending order
    variance, axes = variance.flip(0)[:dim], axes.flip(1)[:, :dim]
    if whiten:
        kept = int((variance > 1e-9 * variance[0].clamp(min=1e-30)).sum())
        axes = axes[:, :kept] / variance[:kept].sqrt()
    return torch.cat([((x.double() - mean) @ axes).to(x.dtype) for x in parts])
