"""Average precision, support vector machines on frozen features, and low-shot curves."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from unlabeled.draws import shuffled
from unlabeled.evaluate import svm as machines
from unlabeled.evaluate.contract import FINAL, Features, Request, Shapes
from unlabeled.evaluate.fewshot import one_class, whole
from unlabeled.evaluate.lowshot import LowShot, LowShotVOC07
from unlabeled.evaluate.pooling import pooled, said
from unlabeled.evaluate.precision import (
    DEFINITIONS,
    average_precision,
    mean_average_precision,
    resamples,
)
from unlabeled.evaluate.store import FeatureStore
from unlabeled.evaluate.suite import evaluate
from unlabeled.evaluate.svm import SVM, compact, expanded, folds_of, unit
from unlabeled.evaluate.svm_voc07 import SVMVOC07, best_costs
from unlabeled.report.plots import figure
from unlabeled.truth import Kept

STEPWISE, ELEVEN, AREA = range(3)


# Average precision.


def devkit(scores, positive, eleven):
    """VOC's evaluation, image by image."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    recall, precision, found = [], [], 0
    for seen, i in enumerate(order, 1):
        found += bool(positive[i])
        recall.append(found / sum(positive))
        precision.append(found / seen)
    if eleven:
        best = [
            max(
                (p for r, p in zip(recall, precision, strict=True) if r >= t / 10 - 1e-12),
                default=0,
            )
            for t in range(11)
        ]
        return sum(best) / 11
    r, p = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in reversed(range(len(p) - 1)):
        p[i] = max(p[i], p[i + 1])
    return sum((r[i] - r[i - 1]) * p[i] for i in range(1, len(r)))


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_is_the_devkits_and_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    scores, positive = rng.standard_normal(60), rng.random(60) < 0.2
    positive[seed] = True
    found = average_precision(scores, positive)[:, 0]
    assert found[STEPWISE] == pytest.approx(average_precision_score(positive, scores))
    assert found[ELEVEN] == pytest.approx(devkit(scores, positive, eleven=True))
    assert found[AREA] == pytest.approx(devkit(scores, positive, eleven=False))
    assert len({round(x, 6) for x in found}) > 1  # the definitions differ
    weights = rng.integers(0, 4, (2, 60))
    weights[:, seed] += 1
    several = average_precision(scores, positive, weights)
    for w, column in zip(weights, several.T, strict=True):
        twice = np.repeat(np.arange(60), w)
        expected = average_precision_score(positive, scores, sample_weight=w)
        assert column[STEPWISE] == pytest.approx(expected)
        again = average_precision(scores[twice], positive[twice])[:, 0]
        np.testing.assert_allclose(column, again)


def test_average_precision_of_a_short_ranking():
    found = average_precision(np.array([3.0, 2, 1]), np.array([True, False, True]))[:, 0]
    np.testing.assert_allclose(found, [5 / 6, (6 + 5 * 2 / 3) / 11, 5 / 6])
    # A recall of exactly 0.3: the fourth point at 0.3 still has precision 1.
    positive = np.array([True] * 3 + [False] * 3 + [True] * 7)
    ranking = average_precision(-np.arange(13.0), positive)[ELEVEN, 0]
    assert ranking == pytest.approx((4 + 7 * 10 / 13) / 11)


def test_ties_come_in_together_whatever_their_order():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 50).astype(float), rng.random(50) < 0.3
    first = average_precision(scores, positive)
    assert first[STEPWISE, 0] == pytest.approx(average_precision_score(positive, scores))
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(50)
        np.testing.assert_allclose(average_precision(scores[order], positive[order]), first)
    level = average_precision(np.zeros(50), positive)
    np.testing.assert_allclose(level, positive.mean())


def test_average_precision_without_positive_images():
    assert np.isnan(average_precision(np.arange(4.0), np.zeros(4, dtype=bool))).all()
    assert np.isnan(average_precision(np.zeros(0), np.zeros(0, dtype=bool))).all()
    with pytest.raises(ValueError, match="NaN"):
        average_precision(np.array([1.0, np.nan]), np.array([True, False]))


def test_map_leaves_out_absent_classes_and_images_that_do_not_count():
    rng = np.random.default_rng(0)
    presence = rng.choice([-1, 1], (40, 4), p=[0.7, 0.3])
    presence[:10, 0], presence[:, 2] = 0, -1
    scores = {c: rng.standard_normal(40) for c in range(3)}  # nothing was learned of class 3
    scores[0][:10] = 100  # would come first if they counted
    drawn = resamples(40, 3, "b", count=400)
    values, spread, single = mean_average_precision(scores, presence, drawn)
    assert set(single) == {0, 1}
    expected = [
        average_precision_score(presence[10:, 0] == 1, scores[0][10:]),
        average_precision_score(presence[:, 1] == 1, scores[1]),
    ]
    assert values["map_stepwise"] == pytest.approx(np.mean(expected))
    for kind in DEFINITIONS:
        low, high = spread[kind]
        assert low < values[kind] < high
        assert 0.02 < high - low < 0.5
    assert (drawn.sum(1) == 40).all()
    assert (resamples(40, 3, "b", count=400) == drawn).all()
    assert (resamples(40, 4, "b", count=400) != drawn).any()
    with pytest.raises(ValueError, match="no mAP"):
        mean_average_precision({2: scores[2]}, presence, drawn)


# Machines.


def test_compact_features_give_the_same_machine():
    rng = np.random.default_rng(1)
    x = unit(rng.standard_normal((40, 200)) + 0.5)
    y = np.where(rng.random(40) < 0.3, 1, -1)
    z, basis = compact(x)
    assert z.shape == (40, 40)
    np.testing.assert_allclose(z @ z.T, x @ x.T, atol=1e-12)
    for cost in (0.1, 10.0):
        direct, short = SVM(3).fit(x, y, cost), expanded(SVM(3).fit(z, y, cost), basis)
        np.testing.assert_allclose(short.weight, direct.weight, atol=1e-6)
        assert short.bias == pytest.approx(direct.bias, abs=1e-6)
        assert direct.converged
    assert compact(x.T)[1] is None
    with pytest.warns(ConvergenceWarning):
        assert not SVM(3, max_iter=1).fit(x, y, 10.0).converged


def test_unit_adds_a_little_to_the_length():
    rows = unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, [[3 / 5.00001, 4 / 5.00001], [0, 0]], rtol=1e-9)


def test_processes_answer_as_one_does():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((60, 30)), rng.choice([-1, 1], 60)
    rows = np.arange(50)
    jobs = [partial(machines.fit, SVM(7), x, rows, y[rows], cost) for cost in (0.1, 1.0, 10.0)]
    ticks = []
    alone = machines.run(jobs, 1, processes=1, done=lambda: ticks.append(1))
    several = machines.run(jobs, int(1e8), processes=2)
    assert len(ticks) == 3
    for one, other in zip(alone, several, strict=True):
        assert (one.weight == other.weight).all()


def test_the_cost_of_a_class_without_folds_is_the_others():
    known = np.array([[0.1, 0.3, 0.2], [np.nan] * 3, [0.5, 0.5, 0.1]])
    assert best_costs(known) == {0: 1, 1: 1, 2: 0}
    assert best_costs(known[1:2]) == {0: 1}
    assert folds_of(np.array([1, 1, -1, -1, -1]), 3) == 2


class Shown:
    """A data module of images that are their own features, with several classes each."""

    def __init__(self, train=90, test=60, classes=4, dim=12, noise=0.6, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.classes = [f"c{i}" for i in range(classes)]
        means = torch.randn(classes, dim, generator=rng)
        self.x, self.known = {}, {}
        for split, n in (("train", train), ("test", test)):
            shows = torch.rand(n, classes, generator=rng) < 0.3
            noise_of = noise * torch.randn(n, dim, generator=rng)
            self.x[split] = shows.float() @ means + noise_of
            self.known[split] = torch.where(shows, 1, -1)
            self.known[split][:7, 0] = 0

    def kinds(self, split):
        return frozenset({"presence"})

    def annotation(self, split, kind):
        return Kept(self.known[split])

    def names(self, split, kind):
        return ()

    def image(self, split, position):
        return torch.zeros(3, 2, 2, dtype=torch.uint8)


def features(data, labels=None):
    return Features(
        splits={k: {FINAL: v[:, :, None, None]} for k, v in data.x.items()},
        labels=labels or {},
        classes=len(data.classes),
        selection=(torch.arange(5), torch.arange(5, 9)),
        shapes=Shapes({}, data.x["train"].shape[1], False),
        seed=3,
        device=torch.device("cpu"),
        progress=lambda *args: None,
        data=data,
    )


@pytest.mark.parametrize("difficult", ["ignore", "negative"])
def test_the_protocol_is_scikit_learns_class_by_class(difficult):
    data = Shown()
    data.known["train"][:, 3] = -1  # never shown: cannot be learned
    data.known["train"][0, 3] = 0
    costs = [0.01, 1.0, 30.0]
    result = SVMVOC07(costs=costs, difficult=difficult, jobs=1)(features(data))
    x, test_x = (unit(data.x[split].numpy()) for split in ("train", "test"))
    expected = []
    for c in range(3):
        known, truth = (data.known[split][:, c].numpy() for split in ("train", "test"))
        rows = known != 0 if difficult == "ignore" else known < 2
        y = np.where(known == 1, 1, -1)[rows]
        settings = {"class_weight": {1: 2, -1: 1}, "max_iter": 2000, "dual": True}
        held_out = [
            cross_val_score(
                LinearSVC(C=cost, random_state=0, **settings),
                *(x[rows], y),
                cv=3,
                scoring="average_precision",
            ).mean()
            for cost in costs
        ]
        best = LinearSVC(C=costs[int(np.argmax(held_out))], random_state=0, **settings)
        counts = truth != 0
        scores = best.fit(x[rows], y).decision_function(test_x[counts])
        expected.append(devkit(scores, truth[counts] == 1, eleven=False))
        details = result.details["final/map"]
        assert details["cost"][f"c{c}"] == costs[int(np.argmax(held_out))]
        assert details["average_precision"][f"c{c}"] == pytest.approx(expected[-1], abs=1e-3)
    assert result.scores["final/map"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert details["classes_left_out"] == ["c3"]
    assert details["not_converged"] == []
    assert details["n"] == 60
    assert set(result.scores) == {f"final/{kind}" for kind in DEFINITIONS}
    assert details["ci95"][0] < result.scores["final/map"] < details["ci95"][1]


def test_difficult_images_change_what_is_learned():
    data = Shown(train=60, noise=2.0)
    data.known["train"][:25, 0] = 0
    one, other = (
        SVMVOC07(costs=[1.0], difficult=how, jobs=1)(features(data)).details["final/map"]
        for how in ("ignore", "negative")
    )
    assert one["average_precision"]["c0"] != other["average_precision"]["c0"]
    assert one["average_precision"]["c1"] == other["average_precision"]["c1"]


def test_selection_never_reads_the_test_set():
    data, wrong = Shown(noise=1.0), Shown(noise=1.0)
    wrong.known["test"] = data.known["test"][shuffled(60, "wrong")]
    known, other = (SVMVOC07(jobs=1)(features(d)) for d in (data, wrong))
    for key in ("cost", "tried", "best_stage"):
        assert known.details["final/map"][key] == other.details["final/map"][key]
    assert known.scores["final/map"] > 0.8 > 0.6 > other.scores["final/map"]


# Poolings.


def test_the_published_poolings_of_a_resnet_50():
    from unlabeled.backbones.resnet import ResNet

    with torch.device("meta"):
        maps = ResNet(depth=50).eval().stages(torch.zeros(1, 3, 224, 224))
    shapes = Shapes({k: tuple(v.shape[1:]) for k, v in maps.items()}, 2048, True)
    requests = pooled(shapes, "all", "published", 9216)
    sizes = [shapes.maps[r.stage][0] * r.grid**2 for r in requests]
    assert sizes == [9216, 9216, 8192, 9216, 8192]
    for request in requests:
        assert F.avg_pool2d(maps[request.stage], *request.window[:3]).shape[-1] == request.grid
    assert said(requests[0]).startswith("average over windows of 10, stride 10, padding 4")
    cells = pooled(shapes, "all", "adaptive", 9216)
    assert [(r.grid, r.window) for r in cells] == [(r.grid, ()) for r in requests]
    assert pooled(shapes, 2, "published", 9216) == requests[-2:]
    assert pooled(shapes, ["final", "res2"], "published", 9216) == [FINAL, requests[1]]
    assert pooled(Shapes({"pixels": (48, 1, 1)}, 48, True), ["res5"], "published", 9216) == [
        Request("pixels", 1)
    ]
    with pytest.raises(ValueError, match=r"no stages \['res9'\]"):
        pooled(shapes, ["res9"], "published", 9216)


class Net(torch.nn.Module):
    """A map of its own size, so that windows can be told from cells."""

    dim = 3

    def stages(self, x):
        return {"one": x[:, :, :7, :7]}

    def forward(self, x):
        return x[:, :, :7, :7].mean((2, 3))


class Fake(Shown):
    """Images as well."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, dim=3)
        level = {k: (60 * v + 128).clamp(0, 255).to(torch.uint8) for k, v in self.x.items()}
        self.pixels = {
            k: v[:, :, None, None].expand(-1, -1, 8, 8).clone() for k, v in level.items()
        }
        for v in self.pixels.values():
            v[:, :, 0, 0] = torch.randint(
                256, v.shape[:2], generator=torch.Generator().manual_seed(1)
            )

    def has(self, split):
        return True

    def size(self, split):
        return len(self.pixels[split])

    def labels(self, split):
        return None

    def selection(self):
        return torch.arange(5), torch.arange(5, 9)

    def split_hash(self):
        return "5b117"

    def fingerprint(self, split):
        return split

    def scan(self, split, start=0, stop=None, batch_size=256):
        rows = range(self.size(split))[start:stop]
        for i in range(0, len(rows), batch_size):
            part = list(rows[i : i + batch_size])
            yield {"crops": [self.pixels[split][part]], "index": torch.tensor(part)}


def test_the_store_pools_over_windows(tmp_path):
    data = Fake()
    wanted = [Request("one", 2, (6, 1, 0)), Request("one", 2), Request("one", 3, (5, 2, 1))]
    found = FeatureStore(tmp_path).extract(Net(), data, "test", wanted)
    from unlabeled.evaluate.store import images

    maps = Net().stages(images(data.pixels["test"], "cpu"))["one"]
    torch.testing.assert_close(found[wanted[0]], torch.nn.AvgPool2d(6, 1, 0)(maps))
    torch.testing.assert_close(found[wanted[1]], F.adaptive_avg_pool2d(maps, 2))
    torch.testing.assert_close(found[wanted[2]], torch.nn.AvgPool2d(5, 2, 1)(maps))
    assert not torch.allclose(found[wanted[0]], found[wanted[1]])


# Low-shot.


def test_a_draw_has_k_positive_images_and_k_for_every_other_class():
    data = Shown(train=300)
    data.known["train"][:20, 1] = 0
    low = LowShotVOC07(k=[2], jobs=1)
    picks = low.picks(features(data), 0, 5)
    assert len(picks) == 4
    for c, (rows, y, truth) in enumerate(picks):
        known = data.known["train"][rows, c].numpy()
        assert (known == y).all()  # never 0
        assert ((y == 1).sum(), (y == -1).sum()) == (5, 15)
        assert len(set(rows.tolist())) == 20
        assert (truth == data.known["test"][:, c].numpy()).all()
    rows = [tuple(low.picks(features(data), draw, 5)[0][0]) for draw in (0, 1, 0)]
    assert rows[0] == rows[2] != rows[1]


def test_low_shot_curves_rise_and_say_how_they_vary():
    data = Shown(train=400, test=200, noise=0.8)
    low = LowShotVOC07(k=[1, 8, 32, 1000], draws=3, costs=[0.1, 1.0], jobs=1)
    result = low(features(data))
    assert list(result.scores) == ["final/k1/map", "final/k8/map", "final/k32/map"]
    one, eight, many = result.scores.values()
    assert one < eight < many
    details = result.details["final/k8/map"]
    assert details["k_left_out"] == [1000]
    assert result.scores["final/k8/map"] == pytest.approx(np.mean(details["draws"]))
    assert details["std"] == pytest.approx(np.std(details["draws"], ddof=1))
    low_end, high_end = details["ci95"]
    assert low_end < eight < high_end
    assert sum(details["cost"].values()) == 3 * 4  # a cost for each class of each draw
    assert result.details["final/k1/map"]["cost"] == {"0.1": 0, "1": 12}  # the middle
    assert "cross-validation" in details["selection"]
    arrays = {k: np.asarray(v) for k, v in result.figures["curve"].items()}
    np.testing.assert_allclose(arrays["y"], [[one, eight, many]])
    np.testing.assert_allclose(arrays["high"] - arrays["y"], arrays["y"] - arrays["low"])
    drawn = figure("curve", arrays)
    assert drawn.names == ["final"]
    assert str(drawn.drawing).count("<circle") == 3


def test_a_cost_chosen_on_test_images_is_called_so():
    data = Shown(train=200, test=100, noise=1.5)
    settings = {"k": [4], "draws": 2, "costs": [0.001, 1.0, 100.0], "jobs": 1}
    result = LowShotVOC07(**settings, selection="test")(features(data))
    (name,) = result.scores
    assert name == "final/k4/map_cost_chosen_on_test"
    assert "TEST" in result.details[name]["selection"]
    single = {
        cost: LowShotVOC07(**{**settings, "costs": [cost]}, selection="test")(features(data))
        for cost in settings["costs"]
    }
    best = max(single, key=lambda cost: single[cost].scores[name])
    assert result.details[name]["cost"] == best
    assert result.scores[name] == pytest.approx(single[best].scores[name])


def blobs(n, classes, noise, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    means = np.random.default_rng(9).standard_normal((classes, 10))
    return torch.tensor(means[y] + noise * rng.standard_normal((n, 10))).float(), torch.tensor(y)


def single(noise=1.0, order=None):
    data = Shown()
    data.classes = ["a", "b", "c"]
    (x, y), (test_x, test_y) = blobs(150, 3, noise), blobs(90, 3, noise, seed=1)
    data.x = {"train": x, "test": test_x}
    return features(data, {"train": y, "test": test_y if order is None else test_y[order]})


def test_low_shot_of_images_with_one_class():
    low = LowShot(k=[1, 4, 16, 64], draws=3, costs=[0.1, 1.0], jobs=1)
    given = single()
    rows, y, _ = low.picks(given, 0, 16)[0]
    assert np.bincount(y).tolist() == [16, 16, 16]
    assert (given.labels["train"][rows].numpy() == y).all()
    result = low(given)
    assert list(result.scores) == [f"final/k{k}/top1" for k in (1, 4, 16)]  # no class has 64
    values = list(result.scores.values())
    assert values[0] < values[1] < values[2]
    assert values[2] > 0.8
    wrong = low(single(order=shuffled(90, "x"))).scores["final/k16/top1"]
    assert wrong == pytest.approx(1 / 3, abs=0.15)


def test_the_jobs_are_those_of_scikit_learn():
    given = single(noise=1.5)
    x, test = (unit(given.splits[s][FINAL].flatten(1).numpy()) for s in ("train", "test"))
    y, truth = (given.labels[s].numpy() for s in ("train", "test"))
    answer = whole(SVM(0), x, test, np.arange(40), y[:40], truth, [1.0], 0)
    model = LinearSVC(C=1.0, dual=True, random_state=0)
    planes = [
        model.set_params(class_weight={1: 2, -1: 1}).fit(x[:40], np.where(y[:40] == c, 1, -1))
        .decision_function(test)
        for c in range(3)
    ]  # fmt: skip
    assert answer.scores == [pytest.approx((np.argmax(planes, 0) == truth).mean(), abs=0.02)]
    marks = np.where(truth == 0, 1, -1)
    marks[:9] = 0
    sides = np.where(y[:40] == 0, 1, -1)
    answer = one_class(SVM(0), x, test, np.arange(40), sides, marks, [1.0], 0)
    expected = devkit(planes[0][9:], marks[9:] == 1, eleven=False)
    assert answer.scores == [pytest.approx(expected, abs=0.01)]
    assert answer.unconverged == 0


# All together.


def test_scores_stand_beside_their_baselines(tmp_path):
    data = Fake(noise=0.3)
    evals = {
        "svm": SVMVOC07(costs=[1.0, 10.0], jobs=1),
        "low": LowShotVOC07(k=[2, 4], draws=2, costs=[1.0], jobs=1),
        "single": LowShot(),
    }
    scores = evaluate(evals, backbone=Net(), random_backbone=Net(), data=data, out=tmp_path, seed=0)
    assert "no labels" in scores.skipped["single"]
    for name in ("svm/one/map", "low/one/k4/map"):
        details = scores.details[name]
        assert set(details["baselines"]) >= {"random", "pixels"}
        assert details["ci95"][0] <= scores.values[name] <= details["ci95"][1]
        assert details["split_hash"] == "5b117"
    assert {"baseline/pixels/svm/pixels/map", "baseline/random/low/one/k2/map"} <= set(
        scores.values
    )
    prefixes = ("", "baseline/random/", "baseline/pixels/")
    assert set(scores.figures) == {f"{prefix}low/curve" for prefix in prefixes}
    scores.write(tmp_path)


def test_data_that_do_not_say_what_images_show_are_refused():
    class Plain:
        pass

    data = Shown()
    for evaluation in (SVMVOC07(), LowShotVOC07()):
        assert evaluation.obstacle(data) is None
        assert "data=voc07" in evaluation.obstacle(Plain())
        data.kinds = lambda split: frozenset({"boxes"} if split == "test" else {"presence"})
        assert evaluation.obstacle(data).startswith("the test images")
        del data.kinds


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SVMVOC07(costs=[]), "costs"),
        (lambda: SVMVOC07(costs=[0.0]), r"\[0.0\]"),
        (lambda: SVMVOC07(folds=1), "folds must be at least 2, got 1"),
        (lambda: SVMVOC07(difficult="drop"), "'drop'"),
        (lambda: SVMVOC07(stages="res5"), "'res5'"),
        (lambda: SVMVOC07(stages=0), "got 0"),
        (lambda: SVMVOC07(stages=[]), "stages is empty"),
        (lambda: SVMVOC07(pooling="max"), "'max'"),
        (lambda: SVMVOC07(jobs=0), "jobs"),
        (lambda: LowShot(k=[0]), r"\[0\]"),
        (lambda: LowShot(draws=1), "draws must be at least 2"),
        (lambda: LowShot(selection="best"), "'best'"),
        (lambda: LowShot(max_features=0), "max_features"),
    ],
)
def test_wrong_settings_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
