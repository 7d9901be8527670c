"""k-means by faiss, and what to do with clusters."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.dist import broadcast, rank, world_size
from unlabeled.draws import Draws


class Clusters(NamedTuple):
    """A partition of n rows."""

    labels: Tensor  # (n,) int64 in [0, k)
    centroids: Tensor  # (k, d)


def kmeans(
    features: Tensor,
    clusters: int,
    *,
    iterations: int = 50,
    seed: int = 0,
    spherical: bool = False,
    gpus: bool | None = None,
    device: torch.device | None = None,
) -> Clusters:
    """k-means of every row, Euclidean, in the first process; equal on all.

    faiss trains on a sample of at most 256 points per cluster and re-seeds clusters that become
    empty; then every row goes to its nearest centroid, and clusters that this left empty are
    filled by `fill_empty`.

    Args:
        features: (n, d), the same in every process.
        clusters: k, at most n.
        iterations: of Lloyd's algorithm.
        seed: of the initial centroids, of the sample and of what fills empty clusters.
        spherical: rows and centroids are of unit length, and the nearest is that of the largest
            product.
        gpus: distances are computed on all GPUs of this machine, where there are any, and round
            otherwise than on a CPU; none: if features lie on one.
        device: where processes tell each other what was found, a GPU if they train on GPUs, which
            exchange nothing else; none: where features lie.

    Raises:
        ValueError: more clusters than rows, or values that are not finite.
    """
    _check(features, clusters)  # in every process, so that none waits for one that failed
    labels = torch.zeros(len(features), dtype=torch.int64)
    centroids = torch.zeros(clusters, features.shape[1])
    if rank() == 0:
        labels, centroids = kmeans_alone(
            features,
            clusters,
            iterations=iterations,
            seed=seed,
            spherical=spherical,
            gpus=gpus,
        )
    if world_size() == 1:
        return Clusters(labels, centroids)
    device = features.device if device is None else device
    return Clusters(*(broadcast(x.to(device)).cpu() for x in (labels, centroids)))


def kmeans_alone(
    features: Tensor,
    clusters: int,
    *,
    iterations: int = 50,
    seed: int = 0,
    spherical: bool = False,
    gpus: bool | None = None,
) -> Clusters:
    """As `kmeans`, in this process, which tells no other."""
    _check(features, clusters)
    gpus = features.is_cuda if gpus is None else gpus
    x = features.detach().float().cpu()
    labels, centroids = _faiss(x.contiguous(), clusters, iterations, seed, spherical, gpus)
    return Clusters(*fill_empty(x, labels, centroids, seed=seed, spherical=spherical))


def _check(features: Tensor, clusters: int) -> None:
    if clusters > len(features):
        raise ValueError(f"{clusters} clusters need at least as many images, got {len(features)}")
    if not bool(features.isfinite().all()):
        raise ValueError("features to cluster hold values that are not finite")


def _faiss(
    x: Tensor, clusters: int, iterations: int, seed: int, spherical: bool, gpus: bool
) -> tuple[Tensor, Tensor]:
    import faiss  # heavy, and only these methods need it

    model = faiss.Kmeans(
        x.shape[1],
        clusters,
        niter=iterations,
        seed=seed % 2**31,
        spherical=spherical,
        min_points_per_centroid=1,
        gpu=gpus and getattr(faiss, "get_num_gpus", lambda: 0)() > 0,  # faiss-cpu has no such
    )
    model.train(x.numpy())
    _, assigned = model.index.search(x.numpy(), 1)
    centroids = torch.from_numpy(np.array(model.centroids)).view(clusters, -1)
    return torch.from_numpy(assigned[:, 0].astype(np.int64)), centroids


def fill_empty(
    x: Tensor, labels: Tensor, centroids: Tensor, *, seed: int = 0, spherical: bool = False
) -> Clusters:
    """Gives every empty cluster a share of another one's points.

    A non-empty cluster is drawn, with probability in proportion to its points beyond the first.
    Its mean, perturbed a little in a random direction and in the opposite one, makes two
    centroids; its points go to the nearer of them, and both move to the mean of their points.
    Points that all coincide cannot be shared out: with fewer distinct points than clusters, some
    stay empty.

    Args:
        x: (n, d).
        labels: (n,) int64.
        centroids: (k, d).
        seed: of the draws.
        spherical: centroids are of unit length.
    """
    labels, centroids = labels.clone(), centroids.clone()
    sizes = labels.bincount(minlength=len(centroids))
    divisible = sizes > 1
    generator = Draws(seed, "empty clusters").generator
    for empty in (sizes == 0).nonzero().flatten().tolist():
        while bool(divisible.any()):
            odds = (sizes - 1) * divisible
            donor = int(torch.multinomial(odds.double(), 1, generator=generator))
            rows = (labels == donor).nonzero().flatten()
            away = x[rows] - x[rows].mean(0)
            noise = torch.randn(x.shape[1], generator=generator).to(x.dtype)
            # Projections sum to zero, so that both sides get points unless all are zero.
            moved = rows[away @ noise > 1e-5 * away.norm(dim=1).max() * noise.norm()]
            if not 0 < len(moved) < len(rows):
                divisible[donor] = False  # its points coincide
                continue
            labels[moved] = empty
            for cluster in (empty, donor):
                centre = x[labels == cluster].mean(0)
                centroids[cluster] = F.normalize(centre, dim=0) if spherical else centre
            sizes[empty], sizes[donor] = len(moved), len(rows) - len(moved)
            divisible[empty], divisible[donor] = sizes[empty] > 1, sizes[donor] > 1
            break
    return Clusters(labels, centroids)


def uniform_order(labels: Tensor, count: int, *key: int | str) -> Tensor:
    """An order of `count` images in which every non-empty cluster has an equal expected share.

    Each cluster gives equally many images (to one): all of its own in random order, again and
    again as often as that needs. Their mix is shuffled and cut to `count`.

    Args:
        labels: (n,) int64, at least 0, on the CPU.
        count: images to draw.
        key: of the draws.
    """
    generator = Draws(*key, "uniform over clusters").generator
    order = torch.randperm(len(labels), generator=generator)
    by_cluster = order[labels[order].argsort(stable=True)]  # within a cluster in random order
    sizes = labels.bincount()
    sizes = sizes[sizes > 0]
    starts = sizes.cumsum(0) - sizes
    each = math.ceil(count / len(sizes))
    # A cluster's images in turn, from 0 to `each`, beginning anew where they run out.
    turn = torch.arange(each)[None, :] % sizes[:, None]
    drawn = by_cluster[(starts[:, None] + turn).flatten()]
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]]


def nmi(a: Tensor, b: Tensor) -> float:
    """Normalised mutual information I(A; B) / sqrt(H(A) H(B)) of two labelings (n,), 0 to 1."""
    n, k = len(a), int(b.max()) + 1
    joint = (a * k + b).unique(return_counts=True)[1].double() / n
    alone = [x.unique(return_counts=True)[1].double() / n for x in (a, b)]
    h_joint, h_a, h_b = (float(-(p * p.log()).sum()) for p in (joint, *alone))
    if h_a <= 0 or h_b <= 0:  # one cluster: it says nothing, or both say the same nothing
        return float(h_a <= 0 and h_b <= 0)
    return max(0.0, h_a + h_b - h_joint) / math.sqrt(h_a * h_b)
