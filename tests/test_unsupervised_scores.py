"""`clustering` and `health`: label agreement and label-free numbers of features."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evaluate import Fake, Net, given

from unlabeled.data.decode import Center, Crops
from unlabeled.draws import Draws
from unlabeled.evaluate import clustering, health
from unlabeled.evaluate.clustering import Clustering
from unlabeled.evaluate.health import Health
from unlabeled.evaluate.suite import evaluate


@pytest.mark.parametrize("k", [3, 5, 7])
def test_agreement_equals_scikit_learn(k):
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    g = torch.Generator().manual_seed(k)
    y = torch.randint(5, (300,), generator=g)
    found = torch.where(torch.rand(300, generator=g) < 0.6, y % k, torch.randint(k, (300,)))
    table = clustering.contingency(found, y, k, 5)
    assert table.sum() == 300
    assert table[2, 1] == ((found == 2) & (y == 1)).sum()
    assert clustering.nmi(table) == pytest.approx(normalized_mutual_info_score(y, found))
    assert clustering.ari(table) == pytest.approx(adjusted_rand_score(y, found))


def test_agreement_of_trivial_partitions():
    one = np.array([[7]])
    assert clustering.nmi(one) == 1
    assert clustering.ari(one) == 1
    assert clustering.nmi(np.array([[3, 3], [3, 3]])) == pytest.approx(0, abs=1e-12)
    assert clustering.nmi(np.array([[4, 0], [0, 2]])) == pytest.approx(1)


def test_the_matching_is_the_best_of_all():
    from itertools import permutations

    table = np.random.default_rng(0).integers(0, 30, (4, 4))
    best = max(sum(table[i, p[i]] for i in range(4)) for p in permutations(range(4)))
    classes = clustering.matched(table).numpy()
    assert table[np.arange(4), classes].sum() == best
    more = clustering.matched(np.array([[5, 0], [0, 5], [9, 1]]))
    assert more.tolist() == [-1, 1, 0]


def test_blobs_are_found_whatever_their_numbers():
    g = torch.Generator().manual_seed(0)
    centres = 6 * F.one_hot(torch.arange(4), 8).float()
    y = torch.arange(200) % 4
    x = centres[(y + 1) % 4] + 0.1 * torch.randn(200, 8, generator=g)
    x[0] = centres[0]  # an image of class 0 among those of class 3
    result = Clustering(starts=3)(given(x, y, x, y, 4))
    assert set(result.scores) == {"k4/nmi", "k4/ari", "k4/accuracy"}
    assert result.scores["k4/accuracy"] == pytest.approx(199 / 200)
    assert result.per_image["k4/accuracy"].sum() == 199
    low, high = result.details["k4/nmi"]["ci95"]
    assert low <= result.scores["k4/nmi"] <= high + 1e-9
    assert low > 0.9
    again = Clustering(starts=3)(given(x, y, x, y, 4))
    assert again.scores == result.scores


def test_more_clusters_than_classes_leave_images_over():
    y = torch.arange(60) % 2
    x = F.one_hot(torch.arange(60) % 4, 4).float() + 0.01 * torch.randn(60, 4)
    result = Clustering(clusters=4)(given(x, y, x, y, 2))
    assert result.scores["k4/accuracy"] == pytest.approx(0.5)  # two of the four pure clusters
    data = Fake(test=60)
    assert Clustering(clusters=61).obstacle(data) == "60 images cannot make 61 clusters"
    assert Clustering().obstacle(data) is None


def test_rankme_of_known_spectra():
    q, _ = torch.linalg.qr(torch.randn(50, 8, dtype=torch.float64))
    assert health.rankme(q) == pytest.approx(8)
    assert health.rankme(q[:, :1] @ torch.ones(1, 8, dtype=torch.float64)) == pytest.approx(
        1, abs=1e-6
    )
    s = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    z = q[:, :4] * s
    p = s / s.sum()
    assert health.rankme(z) == pytest.approx(math.exp(-(p * p.log()).sum()))
    assert health.rankme(z.T) == pytest.approx(health.rankme(z))


def test_alignment_and_uniformity_equal_loops_over_pairs():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 30, 5, dtype=torch.float64, generator=g)
    unit = [F.normalize(x, dim=1) for x in (a, b)]
    pairs = [float((u - v).square().sum()) for u, v in zip(*unit, strict=True)]
    assert health.alignment(a, b) == pytest.approx(sum(pairs) / 30)
    terms = [
        math.exp(-2 * float((unit[0][i] - unit[0][j]).square().sum()))
        for i in range(30)
        for j in range(30)
        if i != j
    ]
    assert health.uniformity(a) == pytest.approx(math.log(sum(terms) / len(terms)))
    same = torch.ones(20, 5, dtype=torch.float64)
    assert health.uniformity(same) == pytest.approx(0)
    assert health.uniformity(torch.zeros(5, 3, dtype=torch.float64)) == 0  # collapsed, not uniform
    assert health.spread(same) == pytest.approx(0, abs=1e-12)
    assert health.dead(torch.cat([a, torch.zeros(30, 3)], 1), 1e-3) == pytest.approx(3 / 8)


class Cut(Fake):
    eval_decode = Center(size=8)

    def cut(self, split, parts, decode, *key):
        for part in parts:
            rows = torch.tensor(part)
            crops = decode.batched(self.pixels[split][rows], Draws(*key, part[0], rows=len(part)))
            yield {"crops": crops, "index": rows}


def test_both_run_beside_their_baselines_and_change_nothing(tmp_path):
    torch.manual_seed(0)
    evals = {"health": Health(decode=Crops(size=8, count=2)), "clustering": Clustering()}
    scores = evaluate(
        evals,
        backbone=Net(),
        random_backbone=Net(),
        data=Cut(noise=30),
        out=tmp_path,
        seed=0,
    )
    names = {"rankme", "alignment", "uniformity", "std", "dead"}
    expected = {f"health/{n}" for n in names} | {f"clustering/k3/{n}" for n in ("nmi", "ari")}
    expected |= {"clustering/k3/accuracy"}
    for prefix in ("", "baseline/random/", "baseline/pixels/"):
        assert {prefix + name for name in expected} <= set(scores.values)
    low, high = scores.details["health/rankme"]["ci95"]
    assert low <= scores.values["health/rankme"] <= high
    assert 1 <= scores.values["health/rankme"] <= 6
    assert scores.values["health/alignment"] > 0
    better = {n: scores.details[f"health/{n}"]["better"] for n in ("rankme", "dead", "uniformity")}
    assert better == {"rankme": "higher", "dead": "lower", "uniformity": "lower"}
    baselines = scores.details["health/uniformity"]["baselines"]
    assert baselines == {
        "supervised": "not given",
        "random": scores.values["baseline/random/health/uniformity"],
        "pixels": scores.values["baseline/pixels/health/uniformity"],
    }


def test_identical_views_are_aligned(tmp_path):
    symmetric = Cut(noise=0)  # one colour an image: any crop and its mirror image are alike
    found = evaluate(
        {"health": Health(decode=Crops(size=8, count=2))},
        backbone=Net(),
        data=symmetric,
        out=tmp_path,
        seed=0,
    )
    assert found.values["health/alignment"] == pytest.approx(0, abs=1e-9)
    few = Health(decode=Crops(size=8, count=2)).obstacle(Cut(test=12))
    assert few == "it needs 20 test images, there are 12"


@pytest.mark.parametrize(
    ("make", "bad", "said"),
    [
        (Clustering, {"clusters": 0}, "clusters"),
        (Clustering, {"starts": 0}, "starts"),
        (Clustering, {"split": "val"}, "split"),
        (Health, {"limit": 5}, "limit"),
        (Health, {"tolerance": 1.0}, "tolerance"),
        (Health, {"decode": Crops(size=8, count=3)}, "count=3"),
    ],
)
def test_bad_settings_are_named(make, bad, said):
    base = {"decode": Crops(size=8, count=2)} if make is Health else {}
    with pytest.raises(ValueError, match=said):
        make(**(base | bad))
