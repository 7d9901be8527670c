"""k-means of rows that processes share or that lie on a disk, against plain formulas and faiss."""

import itertools
import math
import os
from functools import partial

import numpy as np
import pytest
import test_ddp
import torch
import torch.nn.functional as F
from processes import on_processes
from torch import Tensor

from unlabeled.dist import rank, world_size
from unlabeled.parts import clustering, features, lloyd
from unlabeled.parts.clustering import kmeans, nmi
from unlabeled.parts.features import principal

N, D, K = 601, 5, 7


def points(n=N, d=D, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def blobs(k=K, each=40, d=D):
    centres = 20 * points(k, d, seed=3)
    return centres.repeat_interleave(each, 0) + 0.1 * points(k * each, d), torch.arange(
        k
    ).repeat_interleave(each)


def inertia(x, found):
    return (x - found.centroids[found.labels]).square().sum().item()


def plain(x: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm in float64, without empty clusters."""
    for _ in range(iterations):
        labels = torch.cdist(x, centroids).argmin(1)
        centroids = torch.stack([x[labels == i].mean(0) for i in range(len(centroids))])
    return torch.cdist(x, centroids).argmin(1), centroids


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_it_is_lloyds_algorithm(iterations):
    x = points()
    start = lloyd.lloyd(x, K, iterations=0, seed=2).centroids
    assert all((x == c).all(1).any() for c in start)  # rows
    assert len(start.unique(dim=0)) == K
    found = lloyd.lloyd(x, K, iterations=iterations, seed=2)
    labels, centroids = plain(x.double(), start.double(), iterations)
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.centroids, centroids.float(), rtol=1e-5, atol=1e-6)


def test_it_finds_separate_clusters_and_repeats_itself():
    x, truth = blobs(3)
    best = min((lloyd.lloyd(x, 3, seed=seed) for seed in range(8)), key=lambda f: inertia(x, f))
    assert nmi(best.labels, truth) == pytest.approx(1)
    again = [lloyd.lloyd(x, K, seed=5) for _ in range(2)]
    assert torch.equal(again[0].labels, again[1].labels)
    assert torch.equal(again[0].centroids, again[1].centroids)


def test_inertia_never_rises_and_ends_near_faiss():
    x = points()
    course = [inertia(x, lloyd.lloyd(x, K, iterations=i, seed=1)) for i in range(0, 30, 3)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(course))
    best = min(inertia(x, lloyd.lloyd(x, K, seed=s)) for s in range(5))
    assert best < 1.02 * min(inertia(x, kmeans(x, K, seed=s)) for s in range(5))


def test_spherical_centroids_have_unit_length():
    x = F.normalize(points(), dim=1)
    found = lloyd.lloyd(x, K, spherical=True)
    torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(K))
    assert torch.equal(found.labels, (x @ found.centroids.T).argmax(1))


def test_no_cluster_stays_empty_unless_rows_coincide():
    x = torch.cat([torch.zeros(60, 3), points(12, 3)]) + 5
    found = lloyd.lloyd(x, 12, iterations=3)
    assert (found.labels.bincount(minlength=12) > 0).all()
    same = lloyd.lloyd(torch.ones(9, 3), 4)
    assert len(same.labels.unique()) == 1
    assert same.centroids.isfinite().all()


def test_rows_may_lie_on_a_disk_and_pass_in_pieces(tmp_path, monkeypatch):
    x = points()
    whole = lloyd.lloyd(x, K, seed=1)
    np.save(tmp_path / "rows.npy", x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="r+"))
    monkeypatch.setattr(lloyd, "NUMBERS", 40 * K)
    seen = []
    real = lloyd._pieces
    monkeypatch.setattr(
        lloyd, "_pieces", lambda r, w: [seen.append(len(p)) or p for p in real(r, w)]
    )
    found = lloyd.lloyd(mapped, K, seed=1)
    assert max(seen) <= 56
    assert torch.equal(found.labels, whole.labels)
    assert torch.equal(found.centroids, whole.centroids)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_any_scale_of_rows_gives_the_same_clusters(scale):
    x = points()
    exact = 2.0 ** round(math.log2(scale))  # so that nothing rounds
    assert torch.equal(lloyd.lloyd(x * exact, K).labels, lloyd.lloyd(x, K).labels)


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(ValueError, match="9 clusters need at least as many images, got 4"):
        lloyd.lloyd(points(4), 9)
    for bad in (torch.nan, torch.inf):
        x = points()
        x[3, 1] = bad
        with pytest.raises(ValueError, match="not finite"):
            lloyd.lloyd(x, K)
    with pytest.raises(ValueError, match="kmeans must be faiss or shared, got 'mini'"):
        lloyd.is_shared("mini")


def doubled(rows):
    """Too many clusters for the splits of few iterations: some are filled at the end."""
    return lloyd.lloyd(rows, 400, seed=1, iterations=1)


def shared(cuts, bad=False):
    """What two or three processes find of rows that they hold unequal shares of."""
    x = points()
    if bad:
        x[-1, 0] = torch.nan  # in the last process alone
        try:
            lloyd.lloyd(x.split(cuts)[rank()], K)
        except ValueError as error:
            return str(error)
        return "nothing was said"
    mine = x.split(cuts)[rank()]
    components = principal(mine, 3, whiten=True, shared=torch.device("cpu"))
    return {
        "found": tuple(lloyd.lloyd(mine, K, seed=4)),
        "spherical": tuple(lloyd.lloyd(F.normalize(mine, dim=1), 90, seed=4, spherical=True)),
        "doubled": tuple(doubled(torch.cat([x, x]).split([2 * c for c in cuts])[rank()])),
        "components": components,
    }


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("cuts", [[300, 301], [601, 0, 0], [50, 1, 550]], ids=str)
def test_processes_find_what_one_does(cuts):
    x = points()
    one = lloyd.lloyd(x, K, seed=4)
    spherical = lloyd.lloyd(F.normalize(x, dim=1), 90, seed=4, spherical=True)
    filled = doubled(torch.cat([x, x]))
    assert (filled.labels.bincount(minlength=400) > 0).all()
    every = on_processes(len(cuts), partial(shared, cuts))
    for found in every:
        for name, expected in (("found", one), ("spherical", spherical), ("doubled", filled)):
            labels, centroids = found[name]
            assert torch.equal(labels, expected.labels), name
            assert torch.equal(centroids, expected.centroids), name  # bit for bit
    components = torch.cat([found["components"] for found in every])
    torch.testing.assert_close(components.abs(), principal(x, 3, whiten=True).abs())


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_all_processes_refuse_what_one_holds():
    for said in on_processes(2, partial(shared, [300, 301], bad=True)):
        assert "not finite" in said


# Whole methods.

LINES = {
    "clusterfit": ["method.kmeans=shared", "method.pca=6"],
    "deepcluster": ["method.kmeans=shared", "method.pca=8"],
}


def clustered(source):
    if world_size() > 1:
        os.environ["LOCAL_RANK"] = str(rank())
    found = {}
    for name, lines in LINES.items():
        test_ddp.OWN[name] = lines
        found[name] = test_ddp.trained(name, source, None)
    return found


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_methods_cluster_shares_as_one_process_clusters_all(source, monkeypatch):
    monkeypatch.setattr(test_ddp, "OWN", dict(test_ddp.OWN))
    one = clustered(source)
    for found in on_processes(2, partial(clustered, source)):
        for name in LINES:
            torch.testing.assert_close(
                found[name]["losses"], one[name]["losses"], rtol=1e-6, atol=1e-6
            )
            for key, value in one[name]["state"].items():
                torch.testing.assert_close(found[name]["state"][key], value, rtol=1e-7, atol=1e-8)


@pytest.mark.gpu
def test_gpus_cluster_like_cpus():
    x, truth = blobs()
    for found in (
        kmeans(x, K, seed=1, gpus=True),
        lloyd.lloyd(x, K, seed=1, device=torch.device("cuda")),
    ):
        assert inertia(x, found) <= 1.001 * inertia(x, kmeans(x, K, seed=1)) or nmi(
            found.labels, truth
        ) == pytest.approx(1)


def test_gpus_are_asked_for_where_there_are_any(monkeypatch):
    """Without a GPU here: what faiss is told."""
    import faiss

    told = []
    real = faiss.Kmeans

    def spied(*args, **options):
        told.append(options.pop("gpu"))
        return real(*args, **options)

    monkeypatch.setattr(faiss, "Kmeans", spied)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    x = points()
    for device in ("cpu", "cuda"):
        lloyd.partition(x, K, 5, 0, whole=True, device=torch.device(device))
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    clustering.kmeans(x, K, gpus=True)
    assert told == [False, True, False]


def test_processes_talk_by_the_device_that_trains(monkeypatch):
    """Features lie on the CPU, and GPUs' processes exchange what lies on GPUs alone.

    A device without memory stands for theirs here: no number comes back from it.
    """
    heard = []

    def told(x):
        heard.append(x.device.type)
        return torch.ones(x.shape, dtype=x.dtype)

    monkeypatch.setattr(clustering, "world_size", lambda: 2, raising=False)
    monkeypatch.setattr(clustering, "broadcast", told)
    monkeypatch.setattr(features, "reduce_sum", told)
    x, away = points(), torch.device("meta")
    lloyd.partition(x, K, 1, 0, whole=True, device=away)
    assert heard == ["meta"] * 2  # labels and centroids
    principal(x, 3, whiten=True, shared=away)
    assert heard == ["meta"] * 5  # and the number of rows, their mean and their covariance
