"""Features of a whole training set, and k-means over them by faiss."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from unlabeled.batch import Batch, normalize
from unlabeled.dist import rank, reduce_sum, world_size


class ScannedData(Protocol):
    """What a data module must offer to be clustered."""

    def size(self, split: str) -> int:
        """Number of images."""
        ...

    def scan(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of deterministic crops, in order."""
        ...


def kmeans(features: Tensor, clusters: int, *, iterations: int = 50, seed: int = 0) -> Tensor:
    """Cluster of every row: (n,) int64 in [0, clusters), Euclidean, on the CPU.

    faiss trains on a sample of at most 256 points per cluster and re-seeds empty clusters by
    splitting large ones; every row is then assigned to its nearest centroid.

    Args:
        features: (n, d).
        clusters: k, at most n.
        iterations: of Lloyd's algorithm.
        seed: of the initial centroids and of the sample.
    """
    import faiss  # heavy, and only these methods need it

    x = np.ascontiguousarray(features.detach().float().cpu().numpy())
    if clusters > len(x):
        raise ValueError(f"{clusters} clusters need at least as many images, got {len(x)}")
    if not np.isfinite(x).all():
        raise ValueError("features to cluster hold values that are not finite")
    model = faiss.Kmeans(
        x.shape[1], clusters, niter=iterations, seed=seed % 2**31, min_points_per_centroid=1
    )
    model.train(x)
    _, assigned = model.index.search(x, 1)
    return torch.from_numpy(assigned[:, 0].astype(np.int64))


@torch.no_grad()
def extract(network: nn.Module, data: ScannedData, device: torch.device) -> Tensor:
    """Features (n, d) of the whole training set on the CPU, in its order, on every process.

    The network is in evaluation mode and crops are deterministic. Each process passes its share
    of the images.
    """
    network = network.to(device).eval()
    n = data.size("train")
    share = -(-n // world_size())
    start, stop = min(n, rank() * share), min(n, (rank() + 1) * share)
    rows = [
        network(normalize(batch["crops"][0].to(device))).float()
        for batch in data.scan("train", start=start, stop=stop)
    ]
    everyone = torch.zeros(n, network.dim, device=device)  # type: ignore[arg-type]
    if rows:
        everyone[start:stop] = torch.cat(rows)
    return reduce_sum(everyone).cpu()
