"""k-means of rows that no process holds together, or that lie on a disk: Lloyd's algorithm.

Unlike faiss, which trains on a sample, every iteration passes over all rows. Rows are added up as
integers, so that centroids are the same bit for bit for any number of processes.
"""

import math
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.dist import all_rows, gather, rank, reduce_sum, world_size
from unlabeled.draws import Draws, seed_of
from unlabeled.parts.clustering import Clusters, kmeans

NUMBERS = 1 << 24  # that are worked on at once: products of rows with centroids, or rows
APART = 1 / 1024  # how far the halves of a cluster are moved apart, as a share
EXTRA = 10  # iterations more where clusters are empty


def lloyd(
    rows: Tensor,
    clusters: int,
    *,
    iterations: int = 50,
    seed: int = 0,
    spherical: bool = False,
    keep_empty: bool = False,
    device: torch.device | None = None,
) -> Clusters:
    """k-means, Euclidean, of the rows of all processes; the same partition in every one.

    It starts from distinct rows drawn at random, and ends early where nothing moves. An empty
    cluster takes half of another, drawn in proportion to its rows beyond the first, and in the
    end, when that did not help, the row farthest from its centroid; with fewer distinct rows than
    clusters some stay empty.

    Args:
        rows: (n, d) of this process, which may be mapped from a file. The first process's come
            first in the order of all.
        clusters: k, at most the rows of all.
        iterations: of Lloyd's algorithm, each one pass over the rows.
        seed: of the first centroids, and of what fills empty clusters.
        spherical: rows and centroids are of unit length, and the nearest is that of the largest
            product.
        keep_empty: an empty cluster keeps its centroid instead.
        device: where distances are computed; none: where rows are.

    Raises:
        ValueError: in every process: more clusters than rows, or values that are not finite.
    """
    device = rows.device if device is None else device
    shares = all_rows(torch.empty(len(rows), device=device))
    total = sum(shares)
    if clusters > total:
        raise ValueError(f"{clusters} clusters need at least as many images, got {total}")
    scale = _scale(rows, total, device)
    first = sum(shares[: rank()])
    generator = np.random.default_rng(seed_of(seed, "centroids"))
    drawn = torch.from_numpy(generator.choice(total, clusters, replace=False))
    centroids = _rows_of_all(rows, first, drawn, device)
    for iteration in count():
        labels, sums, sizes = _pass(rows, centroids, scale, spherical=spherical)
        empty = (sizes == 0).nonzero().flatten().tolist()
        if iteration >= iterations + (EXTRA if empty and not keep_empty else 0):
            break
        means = (sums.double() / scale / sizes.clamp(min=1)[:, None]).float()
        if keep_empty:
            means[empty] = centroids[empty]
        elif iteration >= iterations:
            means[empty] = _farthest(rows, first, labels, centroids, len(empty))
        else:
            _split(means, sizes, empty, Draws(seed, "empty", iteration).generator)
        means = F.normalize(means, dim=1) if spherical else means
        if (keep_empty or not empty) and torch.equal(means, centroids):
            break
        centroids = means
    return Clusters(gather(labels.to(device), shares).cpu(), centroids.cpu())


def spherical(
    x: Tensor, clusters: int, iterations: int, seed: int, *, keep_empty: bool
) -> Clusters:
    """Spherical k-means of unit rows (n, d) that every process has.

    By faiss, whose empty clusters share others' points; `keep_empty`: by `lloyd`, each process a
    part of the rows, and an empty cluster keeps its centroid.
    """
    if not keep_empty:
        return kmeans(x, clusters, iterations=iterations, seed=seed, spherical=True)
    own = x.tensor_split(world_size())[rank()]
    return lloyd(own, clusters, iterations=iterations, seed=seed, spherical=True, keep_empty=True)


def is_shared(kmeans: str) -> bool:
    """Whether k-means is `lloyd`'s of shares, "shared", and not "faiss"."""
    if kmeans not in ("faiss", "shared"):
        raise ValueError(f"kmeans must be faiss or shared, got {kmeans!r}")
    return kmeans == "shared"


def partition(
    features: Tensor,
    clusters: int,
    iterations: int,
    seed: int,
    *,
    whole: bool,
    device: torch.device,
) -> Tensor:
    """Labels (n,) of all images, by `kmeans` if every process has all features, else by `lloyd`.

    On a GPU distances are computed there.
    """
    if not whole:
        return lloyd(features, clusters, iterations=iterations, seed=seed, device=device).labels
    gpus = device.type == "cuda"
    found = kmeans(features, clusters, iterations=iterations, seed=seed, gpus=gpus, device=device)
    return found.labels


def _scale(rows: Tensor, total: int, device: torch.device) -> float:
    """The largest power of two by which rows are multiplied so that sums of all fit 62 bits."""
    peak = torch.zeros(1, device=device, dtype=torch.float64)
    for x in _pieces(rows, rows.shape[1]):
        peak = torch.maximum(peak, x.abs().max().to(device, torch.float64))
    largest = float(gather(peak).max())  # nan, if there is any
    if not math.isfinite(largest):
        raise ValueError("features to cluster hold values that are not finite")
    bits = min(52, 61 - math.ceil(math.log2(total + 1)))  # float64 holds integers of 53
    return math.ldexp(1.0, bits - math.frexp(largest)[1])


def _rows_of_all(rows: Tensor, first: int, places: Tensor, device: torch.device) -> Tensor:
    """Rows (m, d) of all processes at some places, the rows here beginning at `first`."""
    places = places - first
    here = ((places >= 0) & (places < len(rows))).nonzero().flatten()
    found = torch.zeros(len(places), rows.shape[1])
    found[here] = rows[places[here].to(rows.device)].float().cpu()
    return reduce_sum(found.to(device))


def _pass(
    rows: Tensor, centroids: Tensor, scale: float, *, spherical: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest centroids of the rows here (n,), and of all rows sums (k, d) and sizes (k,)."""
    k, device = len(centroids), centroids.device
    half = torch.zeros(k, device=device) if spherical else centroids.square().sum(1) / 2
    sums = torch.zeros(centroids.shape, dtype=torch.int64, device=device)
    labels = []
    for piece in _pieces(rows, max(centroids.shape)):
        x = piece.to(device).float()
        nearest = torch.addmm(-half, x, centroids.T).argmax(1)
        sums.index_add_(0, nearest, (x.double() * scale).round().long())
        labels.append(nearest.cpu())
    found = torch.cat([*labels, torch.empty(0, dtype=torch.int64)])
    sizes = found.bincount(minlength=k).to(device)
    return found, reduce_sum(sums), reduce_sum(sizes)


def _pieces(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, NUMBERS // width)) if len(rows) else ()


def _split(centroids: Tensor, sizes: Tensor, empty: list[int], generator: torch.Generator) -> None:
    """Puts empty clusters' centroids beside those of large ones, in place."""
    left = sizes.cpu().clone()
    sign = 1 - 2 * (torch.arange(centroids.shape[1], device=centroids.device) % 2)
    for cluster in empty:
        odds = (left - 1).clamp(min=0).double()
        if not bool(odds.any()):
            return
        donor = int(torch.multinomial(odds, 1, generator=generator))
        centroids[cluster] = centroids[donor] * (1 + APART * sign)
        centroids[donor] *= 1 - APART * sign
        left[cluster] = left[donor] // 2
        left[donor] -= left[cluster]


def _farthest(rows: Tensor, first: int, labels: Tensor, centroids: Tensor, number: int) -> Tensor:
    """Of the rows of all, the farthest (number, d) from the centroids of their clusters."""
    device = centroids.device
    best = torch.full((number,), -1.0, device=device)
    place = torch.zeros(number, dtype=torch.int64, device=device)
    at = 0
    for piece in _pieces(rows, rows.shape[1]):
        own = centroids[labels[at : at + len(piece)].to(device)]
        best = torch.cat([best, (piece.to(device).float() - own).square().sum(1)])
        place = torch.cat([place, torch.arange(at, at + len(piece), device=device) + first])
        best, order = best.sort(descending=True, stable=True)
        best, place = best[:number], place[order[:number]]
        at += len(piece)
    order = gather(best).sort(descending=True, stable=True).indices[:number]
    return _rows_of_all(rows, first, gather(place)[order].cpu(), device)
