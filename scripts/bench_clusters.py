"""k-means as ClusterFit and DeepCluster call it, against faiss called directly."""

import time
from collections.abc import Callable

import faiss
import torch
from bench_rows import Row, per_round, seconds

from unlabeled.parts.clustering import kmeans_alone

BAR = 1.1


def rows(rounds: int = 3, images: int = 50_000, dim: int = 128, clusters: int = 200) -> list[Row]:
    """Features to labels and centroids.

    Args:
        rounds: turns of both, after one that is not counted.
        images: rows.
        dim: of the features.
        clusters: k.
    """
    x = torch.randn(images, dim, generator=torch.Generator().manual_seed(0))

    def direct() -> None:
        model = faiss.Kmeans(dim, clusters, niter=10, seed=0)
        model.train(x.numpy())
        model.index.search(x.numpy(), 1)

    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: kmeans_alone(x, clusters, iterations=10),
        "faiss": direct,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn:
                times[name].append(time.process_time() - start)
    return [
        Row(
            "k-means for ClusterFit and DeepCluster / faiss called directly",
            per_round(times["ours"], times["faiss"]),
            bar=BAR,
            better="low",
            ours=seconds(times["ours"]),
            other=seconds(times["faiss"]),
            note=f"{images:,} x {dim}, k = {clusters}, 10 iterations, one thread; median of "
            f"{rounds} rounds of CPU time",
        )
    ]
