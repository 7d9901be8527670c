"""Evaluations on data whose answers are known."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unlabeled.batch import denormalize, normalize
from unlabeled.data.decode import Crops
from unlabeled.draws import shuffled
from unlabeled.evaluate.accuracy import label_rank
from unlabeled.evaluate.augmented import LinearAugmented
from unlabeled.evaluate.contract import FINAL, Features, Request, Result, Shapes
from unlabeled.evaluate.figures import embedding, final, neighbours
from unlabeled.evaluate.frozen import checksum, frozen
from unlabeled.evaluate.heads import Recipe, Setting, norm_of, side_by_side, train
from unlabeled.evaluate.intervals import bootstrap, over_seeds
from unlabeled.evaluate.knn import KNN, _keys, _unkey, search
from unlabeled.evaluate.lasso import Lasso
from unlabeled.evaluate.linear import Linear
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.scores import Scores
from unlabeled.evaluate.store import FeatureStore, shapes_of
from unlabeled.evaluate.suite import evaluate, in_turn
from unlabeled.report import html


@pytest.fixture(autouse=True)
def one_thread():
    """Such small products only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Fake:
    """Images whose mean colour is their class, in memory."""

    def __init__(self, train=120, test=60, classes=3, side=8, noise=10, seed=0, labelled=True):
        g = torch.Generator().manual_seed(seed)
        self.classes = [f"c{i}" for i in range(classes)]
        self.seed, self.labelled, self.scanned = seed, labelled, 0
        self.pixels, self.y = {}, {}
        colours = torch.randint(40, 215, (classes, 3), generator=g)
        for split, n in (("train", train), ("test", test)):
            if n:
                y = torch.arange(n) % classes
                x = colours[y][:, :, None, None] + noise * torch.randn(
                    n, 3, side, side, generator=g
                )
                self.pixels[split], self.y[split] = x.clamp(0, 255).to(torch.uint8), y
        self.name = str(seed)

    def has(self, split):
        return split in self.pixels

    def size(self, split):
        return len(self.pixels[split])

    def labels(self, split):
        return self.y[split] if self.labelled else None

    def selection(self):
        order = shuffled(self.size("train"), self.seed, "selection")
        cut = self.size("train") // 5
        return order[cut:].sort().values, order[:cut].sort().values

    def split_hash(self):
        return "5b117"

    def fingerprint(self, split):
        return f"{self.name} {split}"

    def thumbnail(self, split, position):
        return self.pixels[split][position]

    def scan(self, split, start=0, stop=None, batch_size=256):
        stop = self.size(split) if stop is None else stop
        for first in range(start, stop, batch_size):
            part = slice(first, min(first + batch_size, stop))
            self.scanned += part.stop - part.start
            yield {
                "crops": [self.pixels[split][part]],
                "index": torch.arange(part.start, part.stop),
                "label": self.y[split][part],
            }


class Net(nn.Module):
    """Two stages; forward is the average of the last, or has an end of its own."""

    def __init__(self, end=False, drift=False):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())
        self.end = nn.Linear(6, 5) if end else nn.Identity()
        self.dim, self.drift, self.images = 5 if end else 6, drift, 0

    def stages(self, x):
        self.images += len(x)
        if self.drift:
            self.one[1].running_mean += 1e-3
        one = self.one(x)
        return {"one": one, "two": self.two(one)}

    def forward(self, x):
        return self.end(self.stages(x)["two"].mean((2, 3)))


def given(train_x, train_y, test_x, test_y, classes, selection=None, request=FINAL):
    """Features as if a backbone had made them."""
    n = len(train_x)
    order = shuffled(n, "selection")
    x = {"train": train_x, "test": test_x}
    return Features(
        splits={k: {request: v.view(len(v), -1, 1, 1)} for k, v in x.items()},
        labels={"train": train_y, "test": test_y},
        classes=classes,
        selection=selection or (order[n // 5 :], order[: n // 5]),
        shapes=Shapes(maps={}, dim=train_x.shape[1], pooled=False),
        seed=0,
        device=torch.device("cpu"),
        progress=lambda *_: None,
    )


def blobs(n, classes, dim, spread, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + spread * torch.randn(n, dim, generator=g), y


# The feature store.


def test_store_gives_what_the_backbone_gives(tmp_path):
    torch.manual_seed(0)
    net, data = Net(end=True).train(), Fake()
    wanted = {Request("one", 4), Request("two", 1), FINAL}
    ticks = []
    found = FeatureStore(tmp_path, batch_size=50).extract(
        net, data, "train", wanted, progress=lambda *args: ticks.append(args)
    )
    assert [t[1:] for t in ticks] == [(50, 120), (100, 120), (120, 120)]
    assert all(m.training for m in net.modules())
    x = normalize(data.pixels["train"])
    with torch.no_grad():
        maps, final = net.eval().stages(x), net(x)
    torch.testing.assert_close(
        found[Request("one", 4)], F.adaptive_avg_pool2d(maps["one"], 4), atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(found[Request("two")][:, :, 0, 0], maps["two"].mean((2, 3)))
    torch.testing.assert_close(found[FINAL][:, :, 0, 0], final)


def test_training_flags_come_back_one_by_one(tmp_path):
    net = Net().train()
    net.one.eval()
    with frozen(net):
        assert not any(m.training for m in net.modules())
        assert not torch.is_grad_enabled()
    assert net.training
    assert net.two.training
    assert not net.one[1].training


def test_one_pass_extracts_everything_and_is_reused(tmp_path):
    net, data = Net(), Fake()
    shapes = shapes_of(net, data, "cpu")
    assert shapes == Shapes({"one": (4, 8, 8), "two": (6, 3, 3)}, dim=6, pooled=True)
    store, net.images = FeatureStore(tmp_path), 0
    store.extract(net, data, "test", {Request("one"), Request("two", 3), FINAL}, shapes=shapes)
    assert net.images == 60  # "final" is the pooled last stage: no second forward
    first = store.extract(net, data, "test", {FINAL, Request("two")}, shapes=shapes)
    assert net.images == 60
    assert torch.equal(first[FINAL], first[Request("two")])
    store.extract(net, data, "test", {FINAL, Request("one", 2)}, shapes=shapes)
    assert net.images == 120
    store.extract(net, data, "train", {FINAL}, shapes=shapes)
    assert net.images == 240
    net.one[1].running_mean += 1  # a buffer alone makes another backbone
    store.extract(net, data, "test", {FINAL}, shapes=shapes)
    assert net.images == 300
    data.name = "other"
    store.extract(net, data, "test", {FINAL}, shapes=shapes)
    assert net.images == 360
    half = FeatureStore(tmp_path, dtype="float16")
    assert half.extract(net, data, "test", {FINAL}, shapes=shapes)[FINAL].dtype == torch.float16
    assert net.images == 420


def test_a_half_written_store_is_not_taken_for_whole(tmp_path):
    net, data = Net(), Fake()
    store, scan = FeatureStore(tmp_path, batch_size=20), data.scan

    def killed(split, *args, **kwargs):
        for i, batch in enumerate(scan(split, *args, **kwargs)):
            if i == 3:
                raise KeyboardInterrupt
            yield batch

    data.scan = killed
    with pytest.raises(KeyboardInterrupt):
        store.extract(net, data, "train", {FINAL})
    assert net.training
    assert not list(tmp_path.rglob("*.npy*"))
    data.scan = scan
    features = store.extract(net, data, "train", {FINAL})[FINAL]
    with torch.no_grad():
        torch.testing.assert_close(
            features[:, :, 0, 0], net.eval()(normalize(data.pixels["train"]))
        )
    assert not list(tmp_path.rglob("*.partial"))


def test_a_scan_that_ends_early_is_an_error(tmp_path):
    data = Fake()
    data.size = lambda split: 121
    with pytest.raises(RuntimeError, match="0 to 121 of train were due, got 120"):
        FeatureStore(tmp_path).extract(Net(), data, "train", {FINAL})
    assert not list(tmp_path.rglob("*.npy"))


def test_a_backbone_that_changes_is_an_error(tmp_path):
    shapes = shapes_of(Net(), Fake(), "cpu")
    with pytest.raises(RuntimeError, match="changed while it was evaluated"):
        FeatureStore(tmp_path).extract(Net(drift=True), Fake(), "train", {FINAL}, shapes=shapes)
    assert not list(tmp_path.rglob("*.npy"))


def test_checksum_sees_every_tensor():
    net = Net()
    before = checksum(net)
    assert checksum(net.eval()) == before
    for x in [*net.parameters(), *net.buffers()]:
        with torch.no_grad():
            x.view(-1)[0] += 1
            assert checksum(net) != before
            x.view(-1)[0] -= 1
    assert checksum(Pixels(side=4)) != checksum(Pixels(side=5))


def test_features_that_are_not_finite_are_refused(tmp_path):
    net = Net()
    shapes = shapes_of(net, Fake(), "cpu")
    nn.init.constant_(net.two[0].bias, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        FeatureStore(tmp_path).extract(net, Fake(), "train", {FINAL}, shapes=shapes)
    with pytest.raises(ValueError, match="3 x 3"):
        FeatureStore(tmp_path).extract(Net(), Fake(), "train", {Request("two", 4)})


def test_pixels():
    x = torch.rand(2, 3, 8, 8)
    pixels = Pixels()
    torch.testing.assert_close(pixels(normalize(x)), x.flatten(1))
    assert pixels.dim == 192
    assert pixels(torch.rand(2, 3, 64, 48)).shape == (2, 3 * 32 * 32)
    half = Pixels(side=4)
    assert half.dim == half(x).shape[1] == 48
    means = denormalize(x).mean((2, 3))
    small = half(x).view(2, 3, 4, 4)
    torch.testing.assert_close(small.mean((2, 3)), means, atol=0.1, rtol=0)
    assert list(half.stages(x)) == ["pixels"]


# kNN.


@pytest.mark.parametrize(("k", "t"), [(1, 0.07), (5, 0.07), (20, 1.0)])
def test_knn_equals_scikit_learn(k, t):
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (test_x, test_y) = blobs(300, 7, 10, 1.2), blobs(150, 7, 10, 1.2, seed=1)
    reference = KNeighborsClassifier(
        k, metric="cosine", weights=lambda d: np.exp((1 - d) / t), algorithm="brute"
    ).fit(x.numpy(), y.numpy())
    chances = torch.from_numpy(reference.predict_proba(test_x.numpy()))
    result = KNN(k=[k, 3], temperature=[t])(given(x, y, test_x, test_y, 7))
    right = result.per_image[f"k{k}_t{t:g}/top1"]
    assert torch.equal(right.bool(), chances.argmax(1) == test_y)
    assert 0.3 < right.mean() < 1
    own = chances.gather(1, test_y[:, None])
    top5 = ((chances > own).sum(1) < 5) & (own[:, 0] > 0)
    assert result.scores[f"k{k}_t{t:g}/top5"] == pytest.approx(top5.float().mean().item(), abs=0.01)
    assert set(result.scores) == {f"k{j}_t{t:g}/top{i}" for j in (k, 3) for i in (1, 5)}


def test_knn_search_does_not_depend_on_chunks(monkeypatch):
    from unlabeled.evaluate import knn

    (q, _), (bank, _) = blobs(70, 5, 6, 2), blobs(230, 5, 6, 2, seed=1)
    whole = search(q, bank, 9)
    monkeypatch.setattr(knn, "QUERIES", 32)
    monkeypatch.setattr(knn, "BANK", 7)
    parts = search(q, bank, 9)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])
    exact = (F.normalize(q) @ F.normalize(bank).T).topk(9)
    torch.testing.assert_close(whole[0], exact.values)
    assert torch.equal(whole[1], exact.indices)


def test_knn_ties_go_to_the_earlier_image():
    bank = torch.eye(2).repeat(40, 1)  # rows 0, 2, 4, ... are equal, and 1, 3, 5, ...
    similarity, near = search(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), bank, 5)
    assert near.tolist() == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert (similarity == 1).all()
    # Two votes of equal weight: the lower class, wherever its image is.
    ranks = label_rank(torch.tensor([[0.5, 0.5, 0.0]] * 2), torch.tensor([0, 1]))
    assert ranks.tolist() == [0, 1]


def test_sort_keys_are_exact():
    s = torch.tensor([[0.3, -0.3, 0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30]])
    back, place = _unkey(_keys(s, 5))
    assert torch.equal(back, s)
    assert place.tolist() == [list(range(5, 13))]
    assert torch.equal(_keys(s, 0).argsort(descending=True)[0], s[0].argsort(descending=True))


def test_knn_leaves_the_query_out():
    x, y = blobs(100, 4, 8, 2.0)
    result = KNN(k=[1], leave_one_out=True)(given(x, y, x, y, 4))
    z = F.normalize(x)
    s = (z @ z.T).fill_diagonal_(-2)
    assert result.scores["k1_t0.07/top1"] == pytest.approx(
        (y[s.argmax(1)] == y).float().mean().item()
    )
    assert KNN(k=[1])(given(x, y, x, y, 4)).scores["k1_t0.07/top1"] == 1
    assert KNN(leave_one_out=True).splits == {"train"}
    with pytest.raises(ValueError, match=r"k = 100 .* only 99"):
        KNN(k=[1, 100], leave_one_out=True)(given(x, y, x, y, 4))


def test_small_temperatures_do_not_overflow():
    (x, y), (test_x, test_y) = blobs(200, 4, 8, 1.0), blobs(100, 4, 8, 1.0, seed=1)
    scores = KNN(k=[1, 10], temperature=[1e-4])(given(x, y, test_x, test_y, 4)).scores
    assert scores["k10_t0.0001/top1"] == scores["k1_t0.0001/top1"]  # the nearest decides


# Linear.


def test_grids_are_the_papers():
    linear = Linear()
    maps = {
        "conv1": (64, 112, 112),
        "res2": (256, 56, 56),
        "res3": (512, 28, 28),
        "res4": (1024, 14, 14),
        "res5": (2048, 7, 7),
    }
    shapes = Shapes(maps, dim=2048, pooled=True)
    grids = {r.stage: r.grid for r in linear._requests(shapes)}
    assert grids == {"conv1": 12, "res2": 6, "res3": 4, "res4": 3, "res5": 2, "final": 1}
    windows = [r.window for r in Linear(pooling="published")._requests(shapes)]
    assert windows == [(10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0), ()]
    assert Linear(max_features=2048)._requests(shapes)[-1] == Request("res5", 1)  # final is this
    assert Linear(stages=["res4"]).requests(shapes) == {Request("res4", 3)}
    assert linear.requests(Shapes({}, dim=7, pooled=False)) == {FINAL}
    with pytest.raises(ValueError, match=r"no stages \['res6'\]; it has .*'res5', 'final'"):
        Linear(stages=["res6"]).requests(shapes)


def test_heads_equal_torch_trained_alone():
    x, y = blobs(210, 4, 12, 1.5)
    x = x.view(210, 3, 2, 2) * 3 + 5
    rows = shuffled(210, "rows")[:150]
    settings = [Setting(0.05, 0.0), Setting(0.5, 1e-2), Setting(2.0, 0.0)]
    recipe = Recipe(3, 32, 0.9, Linear().factor)
    together = train(x, y, rows, settings, recipe, classes=4, key=(0, "t"))
    bn = nn.BatchNorm2d(3, affine=False, momentum=None).train()
    bn(x[rows])
    for i, setting in enumerate(settings):
        alone = train(x, y, rows, [setting], recipe, classes=4, key=(0, "t"))
        torch.testing.assert_close(
            together.weight.view(12, 3, 4)[:, i], alone.weight, atol=1e-5, rtol=1e-4
        )
        head = nn.Linear(12, 4)
        start = train(
            x, y, rows, [setting], Recipe(0, 32, 0.9, recipe.factor), classes=4, key=(0, "t")
        )
        head.weight.data.copy_(start.weight.T)
        head.bias.data.zero_()
        sgd = torch.optim.SGD(
            head.parameters(), setting.lr, 0.9, nesterov=True, weight_decay=setting.weight_decay
        )
        z = (
            (x - x[rows].mean((0, 2, 3), keepdim=True))
            / (x[rows].var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
        ).flatten(1)
        step = 0
        for epoch in range(3):
            for batch in rows[shuffled(150, 0, "t", "order", epoch)].split(32):
                sgd.param_groups[0]["lr"] = setting.lr * recipe.factor(step / 15)
                sgd.zero_grad()
                F.cross_entropy(head(z[batch]), y[batch]).backward()
                sgd.step()
                step += 1
        torch.testing.assert_close(alone.weight.T, head.weight.data, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(alone.bias, head.bias.data, atol=1e-4, rtol=1e-3)
    assert start.weight.std().item() == pytest.approx(0.01, rel=0.3)


def test_lars_heads_equal_the_optimizer_on_each_alone():
    from unlabeled.lars import LARS

    x, y = blobs(96, 4, 12, 1.5)
    rows, settings = torch.arange(96), [Setting(20.0, 0.0), Setting(80.0, 1e-2)]
    recipe = Recipe(3, 32, 0.9, lambda share: 1 - share / 2, False, 0.001, standardized=False)
    x = x.view(96, 12, 1, 1)
    together = train(x, y, rows, settings, recipe, classes=4, key=(0, "t"))
    start = train(x, y, rows, settings, replace(recipe, epochs=0), classes=4, key=(0, "t"))
    for i, setting in enumerate(settings):
        head = nn.Linear(12, 4)
        head.weight.data.copy_(start.weight.view(12, 2, 4)[:, i].T)
        head.bias.data.zero_()
        group = {"params": head.parameters(), "adapt": True}
        lars = LARS([group], setting.lr, momentum=0.9, weight_decay=setting.weight_decay, eta=0.001)
        for step in range(9):
            batch = rows[shuffled(96, 0, "t", "order", step // 3)].split(32)[step % 3]
            lars.param_groups[0]["lr"] = setting.lr * (1 - step / 18)
            lars.zero_grad()
            F.cross_entropy(head(x[batch].flatten(1)), y[batch]).backward()
            lars.step()
        own = together.weight.view(12, 2, 4)[:, i].T
        torch.testing.assert_close(own, head.weight.data, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            together.bias.view(2, 4)[i], head.bias.data, atol=1e-5, rtol=1e-4
        )


def test_norm_keeps_digits_far_from_zero():
    x = torch.randn(500, 2, 3, 3) * 0.1 + 1000
    z = norm_of(x, torch.arange(400), "cpu")(x[:400]).view(400, 2, 9)
    torch.testing.assert_close(z.mean((0, 2)), torch.zeros(2), atol=2e-3, rtol=0)
    torch.testing.assert_close(z.std((0, 2)), torch.ones(2), atol=2e-2, rtol=0)


def test_linear_is_close_to_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    (x, y), (test_x, test_y) = blobs(1000, 6, 10, 1.2), blobs(1000, 6, 10, 1.2, seed=1)
    exact = LogisticRegression(max_iter=2000).fit(x.numpy(), y.numpy())
    reference = exact.score(test_x.numpy(), test_y.numpy())
    result = Linear(lrs=[0.001, 0.1], epochs=20)(given(x, y, test_x, test_y, 6))
    assert 0.6 < reference < 0.95
    assert result.scores["final/top1"] == pytest.approx(reference, abs=0.015)
    assert result.scores["final/top5"] > 0.99
    assert result.details["final/top1"]["hyperparameters"]["lr"] == 0.1
    again = Linear(lrs=[0.001, 0.1], epochs=20)(given(x, y, test_x, test_y, 6))
    assert again.scores == result.scores


def test_selection_never_reads_the_test_set():
    (x, y), (test_x, test_y) = blobs(400, 4, 8, 1.0), blobs(200, 4, 8, 1.0, seed=1)
    linear = Linear(lrs=[1e-5, 1e-3, 0.1, 10.0], epochs=5)
    known = linear(given(x, y, test_x, test_y, 4))
    wrong = linear(given(x, y, test_x, test_y[shuffled(200, "wrong")], 4))
    chosen, other = (r.details["final/top1"] for r in (known, wrong))
    assert chosen == other
    assert known.scores["final/top1"] > 0.8
    assert wrong.scores["final/top1"] < 0.4
    # ... and it does follow the held-out labels.
    tried = {t["lr"]: t["held_out_top1"] for t in chosen["tried"]}
    assert chosen["hyperparameters"]["lr"] == max(tried, key=tried.get)
    assert tried[1e-5] < max(tried.values())


def test_stages_train_side_by_side(tmp_path):
    linear = {"linear": Linear(lrs=[0.01, 0.1], epochs=3)}
    ticks = []
    one = run(tmp_path, Fake(noise=60), linear)
    torch.set_num_threads(2)
    two = run(tmp_path, Fake(noise=60), linear, progress=lambda *args: ticks.append(args))
    assert torch.get_num_threads() == 2
    assert one.values == two.values
    stages = 3 + 3 + 1  # of the backbone, of the random one, of pixels
    assert len([t for t in ticks if t[0].startswith("linear heads of ")]) == stages * 2 * 3
    with pytest.raises(ZeroDivisionError):
        side_by_side([lambda: 1, lambda: 1 // 0, lambda: 2], "cpu")
    assert torch.get_num_threads() == 2


def test_a_head_that_diverges_is_never_chosen():
    x, y = blobs(300, 3, 6, 0.5)
    x = x * 100
    result = Linear(lrs=[1e38, 0.1], epochs=3)(given(x, y, x, y, 3))
    details = result.details["final/top1"]
    assert details["tried"][0]["held_out_top1"] == 0
    assert details["hyperparameters"]["lr"] == 0.1
    assert result.scores["final/top1"] > 0.95
    ranks = label_rank(torch.tensor([[1.0, math.nan], [math.nan, 0.0]]), torch.tensor([0, 0]))
    assert ranks.tolist() == [2, 2]


# Intervals.


def test_bootstrap_is_close_to_the_normal_interval():
    g = torch.Generator().manual_seed(0)
    values = torch.stack([(torch.rand(2000, generator=g) < p).float() for p in (0.3, 0.8)], 1)
    for (low, high), column in zip(bootstrap(values, 0, "b"), values.unbind(1), strict=True):
        mean, half = column.mean().item(), 1.96 * column.std().item() / 2000**0.5
        assert low == pytest.approx(mean - half, abs=0.15 * half)
        assert high == pytest.approx(mean + half, abs=0.15 * half)
    assert bootstrap(values, 0, "b") == bootstrap(values, 0, "b")
    assert bootstrap(values, 0, "b") != bootstrap(values, 1, "b")
    assert bootstrap(torch.ones(7, 1), 0) == [(1, 1)]


def test_over_seeds():
    mean, (low, high) = over_seeds([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6)
    assert high - mean == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)  # t table, 2 degrees
    assert mean - low == pytest.approx(high - mean)
    with pytest.raises(ValueError, match="at least 2"):
        over_seeds([0.5])


# All together.


def run(tmp_path, data, evals=None, **kwargs):
    torch.manual_seed(0)
    backbone, random = Net(), Net()
    kwargs = {"random_backbone": random, "seed": 3, "epoch": 7, "out": tmp_path} | kwargs
    evals = evals or {"knn": KNN(k=[1, 5]), "linear": Linear(lrs=[0.1], epochs=20)}
    return evaluate(evals, data=data, **{"backbone": backbone} | kwargs)


def test_separable_images_score_everything_right(tmp_path):
    scores = run(tmp_path, Fake())
    names = {"knn/k1_t0.07/top1", "knn/k5_t0.07/top1", "linear/one/top1", "linear/two/top1"}
    names |= {"linear/final/top1"}
    expected = names | {f"baseline/random/{name}" for name in names}
    expected |= {f"baseline/pixels/knn/k{k}_t0.07/top1" for k in (1, 5)}
    expected |= {"baseline/pixels/linear/pixels/top1"}
    assert set(scores.values) == set(scores.details) == expected
    assert scores.values["linear/one/top1"] == 1
    assert scores.values["baseline/pixels/linear/pixels/top1"] == 1
    details = scores.details["linear/two/top1"]
    assert details["stage"] == "two"
    assert details["best_stage"] in ("one", "two", "final")
    assert (details["seed"], details["epoch"], details["n"]) == (3, 7, 60)
    assert details["split_hash"] == "5b117"
    assert details["hyperparameters"]["lr"] == 0.1
    assert "held-out" in details["selection"]
    assert details["baselines"] == {
        "supervised": "not given",
        "random": scores.values["baseline/random/linear/two/top1"],
        "pixels": scores.values["baseline/pixels/linear/pixels/top1"],
    }
    low, high = scores.details["knn/k1_t0.07/top1"]["ci95"]
    assert low <= scores.values["knn/k1_t0.07/top1"] <= high


def test_shuffled_labels_score_chance(tmp_path):
    data = Fake(train=600, test=600)
    for split in ("train", "test"):
        data.y[split] = data.y[split][shuffled(600, split)]
    values = run(tmp_path, data, pixels=False, random_backbone=None).values
    assert set(values) == {
        "knn/k1_t0.07/top1",
        "knn/k5_t0.07/top1",
        *(f"linear/{stage}/top1" for stage in ("one", "two", "final")),
    }
    for value in values.values():
        assert value == pytest.approx(1 / 3, abs=0.08)  # 4 standard deviations


def test_each_trunk_sees_each_image_once(tmp_path):
    data = Fake()
    evals = {"knn": KNN(k=[1]), "linear": Linear(lrs=[0.1], epochs=1)}
    run(tmp_path, data, evals)
    trunks, probes = 3, 3
    assert data.scanned == trunks * 180 + probes
    first = data.scanned
    run(tmp_path, data, evals)  # the same weights: the store has everything
    assert data.scanned == first + probes


def test_scores_do_not_depend_on_company(tmp_path):
    both = run(tmp_path / "a", Fake(noise=60)).values
    knn = run(tmp_path / "b", Fake(noise=60), {"knn": KNN(k=[5])}, pixels=False).values
    assert knn == {name: both[name] for name in knn}
    assert len(knn) == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [(Fake(labelled=False), "no labels"), (Fake(test=0), "no test split")],
)
def test_an_evaluation_without_its_data_is_skipped_or_refused(tmp_path, data, reason):
    scores = run(tmp_path, data)
    assert scores.values == {}
    assert set(scores.skipped) == {"knn", "linear"}
    assert all(reason in text for text in scores.skipped.values())
    assert data.scanned == 0 or reason == "no test split"
    with pytest.raises(ValueError, match=rf"'knn' cannot run: .*{reason}"):
        run(tmp_path, data, explicit=True)


def test_too_few_images_are_known_before_any_is_looked_at(tmp_path):
    class Single(Fake):
        def selection(self):  # of a class of one image none is set aside
            return torch.arange(self.size("train")), torch.arange(0)

    data = Single(train=3, test=3)
    several, one = (
        LinearAugmented(decode=Crops(size=8, count=1), lrs=lrs) for lrs in ([0.1, 1.0], [0.1])
    )
    evals = {"knn": KNN(k=[1, 4]), "linear": Linear(), "lasso": Lasso(), "augmented": several}
    skipped = run(tmp_path, data, evals).skipped
    assert skipped.pop("knn") == "k = 4 neighbours are more than the 3 training images"
    assert [*skipped] == ["linear", "lasso", "augmented"]
    assert all("none is left to choose settings on" in reason for reason in skipped.values())
    assert data.scanned == 0
    assert KNN(k=[3]).obstacle(data) is one.obstacle(data) is Linear().obstacle(Fake()) is None
    assert KNN(k=[3], leave_one_out=True).obstacle(data)


def test_leave_one_out_needs_no_test_split(tmp_path):
    evals = {"loo": KNN(k=[1], leave_one_out=True), "linear": Linear()}
    scores = run(tmp_path, Fake(test=0), evals)
    assert scores.details["loo/k1_t0.07/top1"]["n"] == 120
    assert list(scores.skipped) == ["linear"]


def test_an_evaluation_may_bring_its_own_data(tmp_path):
    class Other(Fake):
        def setup(self, stage):
            if not self.pixels:
                raise FileNotFoundError("no folder here")

    other = Other(classes=4, train=80, test=40, seed=1)
    evals = {"knn": KNN(k=[1]), "far": KNN(k=[1], data=other)}
    scores = run(tmp_path, Fake(), evals)
    assert scores.details["knn/k1_t0.07/top1"]["n"] == 60
    assert scores.details["far/k1_t0.07/top1"]["n"] == 40
    missing = {"far": KNN(k=[1], data=Other(train=0, test=0))}
    assert "no folder here" in run(tmp_path, Fake(), missing).skipped["far"]


def test_a_score_needs_its_details(tmp_path):
    scores = Scores()
    with pytest.raises(ValueError, match=r"x/top1 needs \['protocol'"):
        scores.add("x/top1", 0.5, {})
    whole = run(tmp_path, Fake(), {"knn": KNN(k=[1])})
    details = whole.details["knn/k1_t0.07/top1"]
    with pytest.raises(ValueError, match="no number"):
        scores.add("x/top1", math.nan, details)
    with pytest.raises(ValueError, match="ci95"):
        scores.add("x/top1", 0.5, {k: v for k, v in details.items() if k != "ci95"})
    for key in ("protocol", "stage", "selection", "split_hash", "seed", "n"):
        for empty in (None, ""):
            with pytest.raises(ValueError, match=rf"x/top1 says nothing under \['{key}'\]"):
                scores.add("x/top1", 0.5, {**details, key: empty})
    for bounds in (None, [], [0.1], [0.2, 0.1], [math.nan, 0.1], [None, None], ["a", "b"], 0.1):
        with pytest.raises(ValueError, match="x/top1 has ci95"):
            scores.add("x/top1", 0.5, {**details, "ci95": bounds})
    with pytest.raises(AttributeError):
        scores.values = {"x": 1.0}
    scores.values["x"] = 1.0
    assert scores.values == {}


def test_scores_are_written_beside_older_ones(tmp_path):
    run(tmp_path, Fake(), {"knn": KNN(k=[1]), "far": KNN(k=[1])}).write(tmp_path)
    run(tmp_path, Fake(), {"knn": KNN(k=[3])}).write(tmp_path)
    written = json.loads((tmp_path / "scores.json").read_text())
    details = json.loads((tmp_path / "scores_details.json").read_text())
    kinds = ("", "baseline/random/", "baseline/pixels/")
    assert set(written) == {
        f"{kind}{name}/top1" for kind in kinds for name in ("knn/k3_t0.07", "far/k1_t0.07")
    }
    assert set(details) == set(written)
    assert all(isinstance(value, float) for value in written.values())
    assert not list(Path(tmp_path).glob("*.partial"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KNN(k=[0]), "0"),
        (lambda: KNN(temperature=[0.0]), "positive"),
        (lambda: Linear(lrs=[]), "lrs"),
        (lambda: Linear(lrs=[0.1, -1]), "-1"),
        (lambda: Linear(stages="res5"), "'res5'"),
        (lambda: Linear(schedule="line"), "'line'"),
        (lambda: Linear(pooling="max"), "'max'"),
        (lambda: FeatureStore(Path(), dtype="float64"), "float64"),
        (lambda: KNN(stage="res9").requests(Shapes({}, 3, False)), "res9"),
    ],
)
def test_wrong_settings_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# Figures.


def test_neighbours_leave_out_the_query_and_its_duplicates():
    data = Fake(test=60, classes=3, noise=20)
    data.pixels["test"][33] = data.pixels["test"][0]  # both of class 0
    z = data.pixels["test"].float().flatten(1) - 128
    arrays = neighbours(z, data, queries=60, k=8, seed=0)
    again = neighbours(z, data, queries=6, k=8, seed=0)
    assert again["queries"].shape == (6, 8, 8, 3)
    assert again["neighbours"].shape == (6, 8, 8, 8, 3)
    assert again["queries"].dtype == again["neighbours"].dtype == np.uint8
    assert np.bincount(again["query_labels"]).tolist() == [2, 2, 2]
    assert list(again["classes"]) == ["c0", "c1", "c2"]
    assert (np.diff(arrays["similarity"], axis=1) <= 0).all()
    same = (arrays["neighbours"] == arrays["queries"][:, None]).all((2, 3, 4))
    assert not same.any()
    s = F.normalize(z) @ F.normalize(z).T
    s[:, :].fill_diagonal_(-2)
    s[0, 33] = s[33, 0] = -2
    np.testing.assert_allclose(arrays["similarity"], s.topk(8).values, atol=1e-5)
    assert np.array_equal(arrays["neighbour_labels"], data.y["test"][s.topk(8).indices])


def test_figures_find_the_features_of_an_evaluation(tmp_path):
    data = Fake()
    run(tmp_path, data, {"knn": KNN(k=[1])})
    torch.manual_seed(0)
    net = Net()  # the one that was evaluated
    store = FeatureStore(tmp_path / "features")
    features, seen = final(store, net, data), data.scanned
    with torch.no_grad():
        expected = net.eval()(normalize(data.pixels["test"]))
    torch.testing.assert_close(features.flatten(1), expected)
    Net()  # the random baseline's weights: kept as well
    assert final(store, Net(), data) is None
    assert final(store, net, Fake(test=0)) is None
    assert data.scanned == seen + 1  # one image for the shapes of the other


def test_embedding_keeps_classes_together():
    x, y = blobs(300, 3, 20, 0.1)
    arrays = embedding(x, y, classes=["a", "b", "c"], limit=90, seed=1)
    assert arrays["xy"].shape == (90, 2)
    assert arrays["xy"].dtype == np.float32
    assert np.bincount(arrays["label"]).tolist() == [30, 30, 30]
    xy = torch.from_numpy(arrays["xy"])
    near = torch.cdist(xy, xy).fill_diagonal_(torch.inf).argmin(1)
    assert (arrays["label"][near] == arrays["label"]).all()
    assert str(arrays["method"]) == "t-SNE"
    again = embedding(x, y, classes=["a", "b", "c"], limit=90, seed=1)
    assert np.array_equal(again["xy"], arrays["xy"])
    assert (embedding(x[:5], None)["label"] == -1).all()


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_collapsed_backbone_has_a_map_of_one_point(tmp_path, value):
    arrays = embedding(torch.full((40, 7), value), None)  # t-SNE itself dies of zeros
    assert (arrays["xy"] == 0).all()
    (tmp_path / "figures").mkdir()
    np.savez(tmp_path / "figures/embedding.npz", **arrays)
    assert "nan" not in html.write(tmp_path).read_text().lower()


class Tunes:
    """Trains its copy of the backbone to nothing, and reads no labels."""

    data = None
    splits = frozenset({"test"})
    needs_labels = False

    def __init__(self):
        self.seen = []

    def tune(self, subject):
        before = [p.detach().clone() for p in subject.backbone.parameters()]
        with torch.no_grad():
            for p in subject.backbone.parameters():
                p.zero_()
        subject.progress("tuning", 1, 1)
        self.seen.append(before)
        value = float(before[0].abs().sum())
        own = {"protocol": "test", "stage": "final", "hyperparameters": {}, "selection": "none"}
        return Result({"size": value}, {"size": own | {"n": 1, "ci95": [value] * 2}}, {})


def test_an_evaluation_that_trains_gets_a_copy_and_its_baseline(tmp_path):
    torch.manual_seed(0)
    backbone, random = Net(), Net()
    weights = [p.detach().clone() for p in backbone.parameters()]
    data, tunes = Fake(), Tunes()
    data.y = dict.fromkeys(data.y)  # no labels
    evals = {"tunes": tunes, "knn": KNN(k=[1])}
    scores = run(tmp_path, data, evals, backbone=backbone, random_backbone=random)
    assert set(scores.values) == {"tunes/size", "baseline/random/tunes/size"}
    assert set(scores.skipped) == {"knn"}
    assert scores.finished == ["tunes"]
    assert all(map(torch.equal, weights, backbone.parameters()))
    assert all(map(torch.equal, tunes.seen[0], weights))
    assert all(map(torch.equal, tunes.seen[1], random.parameters()))
    details = scores.details["tunes/size"]
    assert details["baselines"] == {
        "supervised": "not given",
        "random": scores.values["baseline/random/tunes/size"],
    }
    assert data.scanned == 0  # nothing frozen was asked for


def test_turns_begin_with_what_is_quick_unless_others_would_wait(monkeypatch):
    class Long(Tunes):
        trains = True

    class Unable(Long):
        def obstacle(self, data):
            return "no boxes"

    evals = {"a": Long(), "knn": KNN(k=[1]), "unable": Unable(), "b": Long(), "quick": Tunes()}
    turns = [["knn", "unable", "quick"], ["a"], ["b"]]
    assert [list(some) for some in in_turn(evals, Fake())] == turns
    monkeypatch.setattr("unlabeled.dist.world_size", lambda: 2)
    assert [list(some) for some in in_turn(evals, Fake())] == turns[::-1]
    assert in_turn({}, Fake()) == []
    assert [list(some) for some in in_turn({"a": evals["a"]}, Fake())] == [["a"]]
