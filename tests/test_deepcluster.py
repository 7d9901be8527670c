"""DeepCluster: its clusters, its sampling, its forgetful head, and runs that stop and go on."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes
from sklearn.metrics import normalized_mutual_info_score
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.backbones.resnet import ResNet
from unlabeled.backbones.sobel import Sobel
from unlabeled.batch import normalize
from unlabeled.dist import mine
from unlabeled.draws import Draws
from unlabeled.parts.clustering import fill_empty, kmeans, nmi, uniform_order
from unlabeled.parts.features import evaluating, extract, principal
from unlabeled.parts.labels import PseudoLabels
from unlabeled.parts.mlp import Hidden


def points(n=200, d=6, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inertia(x, clusters):
    return float((x - clusters.centroids[clusters.labels]).square().sum())


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=0, msg=key)


# k-means and what surrounds it


def test_more_iterations_never_raise_the_inertia():
    x = points()
    found = [inertia(x, kmeans(x, 9, iterations=i, seed=1)) for i in (1, 2, 3, 5, 8, 13, 40)]
    assert all(a >= b * (1 - 1e-5) for a, b in itertools.pairwise(found))
    assert found[0] > found[-1]


def test_every_row_belongs_to_its_nearest_centroid():
    x = points()
    found = kmeans(x, 9, iterations=5, seed=1)
    assert torch.equal(torch.cdist(x, found.centroids).argmin(1), found.labels)


def test_an_empty_cluster_takes_a_share_of_another_and_both_move_to_their_means():
    x = torch.cat([points(30) + 50, points(10, seed=1)])
    labels = torch.tensor([0] * 30 + [2] * 10)
    centroids = torch.zeros(4, 6)
    for cluster in (0, 2):
        centroids[cluster] = x[labels == cluster].mean(0)
    filled = fill_empty(x, labels, centroids, seed=3)
    sizes = filled.labels.bincount(minlength=4)
    assert (sizes > 0).all()
    assert sizes.sum() == 40
    for cluster in range(4):
        mean = x[filled.labels == cluster].mean(0)
        torch.testing.assert_close(filled.centroids[cluster], mean)
        # nobody changed sides: the two clouds of points are never mixed
        assert len(set((filled.labels == cluster).nonzero().flatten().ge(30).tolist())) == 1
    assert inertia(x, filled) < float((x - centroids[labels]).square().sum())
    again = fill_empty(x, labels, centroids, seed=3)
    assert torch.equal(filled.labels, again.labels)
    assert not torch.equal(filled.labels, fill_empty(x, labels, centroids, seed=4).labels)
    assert torch.equal(labels.bincount(minlength=4), torch.tensor([30, 0, 10, 0]))  # left alone


def test_the_shares_are_those_of_the_nearer_centroid():
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0], [11.0]])
    filled = fill_empty(x, torch.zeros(5, dtype=torch.int64), x.mean(0).expand(2, 1))
    groups = [x[filled.labels == k].flatten().tolist() for k in (0, 1)]
    assert sorted(groups) == [[0.0, 1.0, 2.0], [9.0, 11.0]]


def test_points_that_coincide_cannot_be_shared_out():
    x = torch.ones(8, 3)
    x[6:] = 2.0
    labels = torch.tensor([0] * 6 + [1, 1])
    filled = fill_empty(x, labels, torch.tensor([[1.0] * 3, [2.0] * 3, [7.0] * 3]))
    assert torch.equal(filled.labels, labels)  # and it ends
    mixed = fill_empty(x, torch.zeros(8, dtype=torch.int64), torch.ones(4, 3))
    assert len(mixed.labels.unique()) == 2  # as many as there are distinct points


def test_the_final_assignment_leaves_no_cluster_empty(monkeypatch):
    from unlabeled.parts import clustering

    x = points(50)

    def faiss(*_):  # a training that ends with all but one centroid far from everything
        centroids = torch.full((7, 6), 1e3)
        centroids[2] = 0
        return torch.full((50,), 2), centroids

    monkeypatch.setattr(clustering, "_faiss", faiss)
    assert (kmeans(x, 7).labels.bincount(minlength=7) > 0).all()


def test_whitened_components_have_unit_variance_and_are_uncorrelated():
    x = points(500, 8, dtype=torch.float64) @ points(8, 8, seed=1, dtype=torch.float64) + 3
    z = principal(x, 5, whiten=True)
    torch.testing.assert_close(z.T @ z / 500, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(z.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)


def test_principal_components_keep_distances_where_none_is_left_out():
    x = points(40, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.cdist(principal(x, 6), principal(x, 9)), torch.cdist(x, x))
    one = principal(x, 1)
    largest = torch.linalg.svdvals(x - x.mean(0))[0]
    torch.testing.assert_close(one.square().sum(), largest.square())


def test_features_are_reduced_in_chunks(monkeypatch):
    from unlabeled.parts import features

    x = points(50, 6, dtype=torch.float64)
    whole = principal(x, 4, whiten=True)
    monkeypatch.setattr(features, "CHUNK", 7)
    torch.testing.assert_close(principal(x, 4, whiten=True).abs(), whole.abs())  # axes have no sign


def test_directions_without_variance_are_left_out_of_whitening():
    x = points(100, 3, dtype=torch.float64)
    dead = torch.cat([x, x[:, :1] * 2, torch.full((100, 2), 5.0)], 1)
    assert principal(dead, 6, whiten=True).shape == (100, 3)
    assert principal(torch.ones(4, 3), 3, whiten=True).isfinite().all()


def test_nmi_is_sklearns_and_ignores_the_numbers_of_clusters():
    draws = torch.Generator().manual_seed(0)
    a = torch.randint(0, 7, (400,), generator=draws)
    b = torch.where(torch.rand(400, generator=draws) < 0.6, a, a.flip(0) % 4)
    expected = normalized_mutual_info_score(a, b, average_method="geometric")
    assert nmi(a, b) == pytest.approx(expected, rel=1e-9)
    order = torch.randperm(7, generator=draws)
    assert nmi(order[a], b) == pytest.approx(expected, rel=1e-9)
    assert nmi(b, a) == pytest.approx(expected, rel=1e-9)
    assert nmi(a, order[a]) == pytest.approx(1)
    assert nmi(a, torch.zeros(400, dtype=torch.int64)) == 0
    assert 0 <= nmi(torch.arange(6) % 2, torch.arange(6) // 3) < 0.1


# sampling


def test_clusters_have_equal_shares_under_uniform_sampling():
    labels = torch.tensor([0] * 90 + [1] * 7 + [3] * 2 + [5])  # 2 and 4 are empty
    counts = torch.zeros(6)
    for epoch in range(300):
        order = uniform_order(labels, 100, 0, epoch)
        assert len(order) == 100
        drawn = labels[order].bincount(minlength=6)
        counts += drawn
        assert drawn.max() <= 25  # ceil(100 / 4 clusters)
    share = counts / counts.sum()
    torch.testing.assert_close(share, torch.tensor([1, 1, 0, 1, 0, 1]) / 4, atol=0.005, rtol=0)


def test_images_of_a_cluster_take_turns():
    labels = torch.tensor([0] * 60 + [1] * 3)
    order = uniform_order(labels, 63, 0, "x")
    counts = order.bincount(minlength=63)
    assert counts[:60].max() == 1  # more than enough of them
    assert counts[60:].max() - counts[60:].min() <= 1 + (64 - 63)
    assert torch.equal(order, uniform_order(labels, 63, 0, "x"))
    assert not torch.equal(order, uniform_order(labels, 63, 1, "x"))


# the method


def begun(tiny, *more):
    """A method that is in its first epoch, its batches, and the trainer."""
    method, data, trainer = tiny("deepcluster", *more)
    caught = []

    def stop(batch, batch_idx):
        caught.append(batch)
        raise KeyboardInterrupt

    method.on_train_batch_start = stop
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(method, data)
    del method.on_train_batch_start
    return method, caught[0]


def test_labels_are_those_of_fixed_crops_in_evaluation_mode(tiny):
    method, _ = begun(tiny)
    data = method.trainer.datamodule
    crops = torch.cat([batch["crops"][0] for batch in data.scan("train")])
    network = method.backbone.eval()
    with torch.no_grad():
        features = network(normalize(crops))
    f = F.normalize(principal(features, 64, whiten=True), dim=1)
    torch.testing.assert_close(f.norm(dim=1), torch.ones(64))
    means = torch.stack([f[method.labels.of == k].mean(0) for k in range(5)])
    nearest = torch.cdist(f, means).argmin(1)
    assert (nearest == method.labels.of).float().mean() > 0.9  # after 20 iterations
    assert method.labels.of.unique().tolist() == list(range(5))


def test_extraction_leaves_modes_and_statistics_alone(tiny):
    method, data, _ = tiny("deepcluster")
    data.setup("fit")
    method.backbone.train()
    method.backbone.bn1.eval()
    before = state(method.backbone)
    with evaluating(method.backbone):
        assert not any(m.training for m in method.backbone.modules())
        extract(method.backbone, method.backbone.dim, data, torch.device("cpu"))
    assert_same(before, state(method.backbone))
    assert method.backbone.training
    assert not method.backbone.bn1.training


def test_chance_is_log_k(tiny):
    method, batch = begun(tiny)
    nn.init.zeros_(method.head.weight)
    batch = method.augment(batch, Draws(0, rows=16))
    method.log = method.log_dict = lambda *_: None
    assert method.loss(batch)["clusters"].item() == pytest.approx(math.log(5), rel=1e-6)


def test_labels_go_by_the_index_in_the_data_set(tiny):
    method, batch = begun(tiny)
    assert not torch.equal(batch["index"], torch.arange(16))
    batch = method.augment(batch, Draws(0, rows=16))
    method.log = method.log_dict = lambda *_: None
    method.eval()
    loss = method.loss(batch)["clusters"]
    logits = method.head(method.backbone(batch["views"][0]))
    total = 0.0
    for row, i in zip(logits.double(), batch["index"].tolist(), strict=True):
        y = method.labels.of[i]
        total -= row[y] - row.exp().sum().log()
    assert loss.item() == pytest.approx(total.item() / 16, rel=1e-5)


def test_the_head_is_drawn_anew_and_its_momentum_forgotten_at_every_clustering(tiny):
    method, data, trainer = tiny("deepcluster", "trainer.max_epochs=4", "method.every_n_epochs=2")
    seen = {}
    own = method.begin_epoch

    def begin_epoch(epoch):
        before = method.head.weight.detach().clone()
        momentum = trainer.optimizers[0].state.get(method.head.weight, {}).get("momentum_buffer")
        order = own(epoch)
        kept = trainer.optimizers[0].state.get(method.head.weight)
        body = trainer.optimizers[0].state.get(method.backbone.conv1.weight, {})
        changed = not torch.equal(before, method.head.weight)
        seen[epoch] = (changed, momentum is not None, kept, "momentum_buffer" in body)
        if changed:
            assert method.head.weight.std().item() == pytest.approx(0.01, rel=0.2)
            assert not method.head.bias.any()
        seen[f"labels{epoch}"] = method.labels.of.clone()
        return order

    method.begin_epoch = begin_epoch
    trainer.fit(method, data)
    assert [seen[e][0] for e in range(4)] == [True, False, True, False]
    assert seen[1][2] is not None
    assert seen[2][1:] == (True, None, True)  # only the head's momentum goes
    assert torch.equal(seen["labels0"], seen["labels1"])
    assert not torch.equal(seen["labels1"], seen["labels2"])
    assert 0 < method.labels.nmi < 1
    assert method.labels.nmi == pytest.approx(nmi(seen["labels0"], seen["labels2"]))
    assert method.labels.largest == seen["labels2"].bincount().max() / 64
    assert int(method.labels.epoch) == 2


def test_the_head_may_have_no_momentum(tiny):
    def run(*more):
        method, data, trainer = tiny("deepcluster", "trainer.max_steps=2", *more)
        trainer.fit(method, data)
        return method, trainer.optimizers[0].state

    _, state = run()
    method, none = run("method.head_momentum=false")
    assert method.head.weight not in none
    assert method.backbone.conv1.weight in none
    assert len(none) == len(state) - 2


@pytest.mark.parametrize("sampling", ["clusters", "images"])
def test_sampling_is_over_clusters_or_images(tiny, sampling):
    method, data, trainer = tiny("deepcluster", f"method.sampling={sampling}")
    seen = []
    method.on_train_batch_start = lambda batch, i: seen.append(
        (batch["index"], method.labels.of.clone())
    )
    trainer.fit(method, data)
    index = torch.cat([s[0] for s in seen[:4]])
    if sampling == "images":
        assert len(index.unique()) == 64
    else:
        shares = seen[0][1][index].bincount(minlength=5)
        assert shares.max() <= 13  # ceil(64 / 5)
        assert torch.equal(index, uniform_order(seen[0][1], 64, 0, "order", 0))


STEP_BY_STEP = [(2, "batch"), (4, "batch"), (5, "batch"), (4, "epoch"), (8, "epoch")]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("length", [("trainer.max_epochs=3",), ("trainer.max_steps=12",)])
def test_a_run_stopped_anywhere_goes_on_exactly(tiny, tmp_path, workers, length):
    """In the middle of an epoch, and at its end by both of Lightning's hooks there.

    With workers, batches are read ahead: those of an epoch whose clusters do not exist yet must
    not be among them.
    """
    changes = (*length, f"data.workers={workers}", "method.hidden=[12]")
    if "max_steps" in length[0]:
        changes += ("trainer.max_epochs=-1",)
    whole, data, trainer = tiny("deepcluster", *changes)
    drawn, saved = [], {}

    def keep(where):
        step = trainer.global_step
        if (step, where) in STEP_BY_STEP:
            saved[step, where] = tmp_path / f"{step}{where}"
            trainer.save_checkpoint(saved[step, where])

    whole.on_train_batch_start = lambda batch, i: drawn.append(batch["index"])
    whole.on_train_batch_end = lambda *_: keep("batch")
    whole.on_train_epoch_end = lambda: keep("epoch")
    trainer.fit(whole, data)
    assert set(saved) == set(STEP_BY_STEP)
    for (step, where), path in saved.items() if workers == 0 else [*saved.items()][2:4]:
        resumed, data, trainer = tiny("deepcluster", *changes)
        rest = []
        resumed.on_train_batch_start = lambda batch, i, rest=rest: rest.append(batch["index"])
        trainer.fit(resumed, data, ckpt_path=path, weights_only=True)
        assert len(rest) == 12 - step, (step, where)
        assert all(map(torch.equal, rest, drawn[step:])), (step, where)
        assert_same(state(whole), state(resumed))


@pytest.mark.filterwarnings("ignore")
def test_workers_change_nothing(tiny):
    def run(workers):
        method, data, trainer = tiny("deepcluster", "data.tier=folder", f"data.workers={workers}")
        trainer.fit(method, data)
        return state(method)

    assert_same(run(0), run(2))


def test_dropout_is_a_function_of_step_and_image():
    torch.manual_seed(0)
    g, h = Hidden(40, 30, 20, dropout=0.5), torch.randn(8, 40)
    first = g(h, Draws(0, "dropout", 3, rows=8))
    assert torch.equal(first, g(h, Draws(0, "dropout", 3, rows=8)))
    assert not torch.equal(first, g(h, Draws(0, "dropout", 4, rows=8)))
    halves = [g(h[r * 4 :][:4], Draws(0, "dropout", 3, rows=4, rank=r, world=2)) for r in (0, 1)]
    torch.testing.assert_close(torch.cat(halves), first)
    plain = g.layers[1](F.relu(g.layers[0](h)))
    assert torch.equal(g(h), plain)
    one = Hidden(40, 30, dropout=0.25)
    draws = [one(h, Draws(i, rows=8)) for i in range(3000)]
    torch.testing.assert_close(torch.stack(draws).mean(0), one(h), atol=0.06, rtol=0)
    assert Hidden(40).dim == 40
    assert torch.equal(Hidden(40)(h), h)


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith(("_local_scalar", "nonzero", "masked_select", "_unique")):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("deepcluster", ["method.hidden=[12]", "method.head_momentum=false"]),
        ("deepcluster_v2", []),
        ("clusterfit", []),
        ("distillation", ["method.alpha=0.5"]),
        ("supervised", ["method.label_noise=0.5"]),
    ],
)
def test_a_step_does_not_wait_for_the_device(tiny, name, more):
    method, data, trainer = tiny(name, "trainer.max_steps=2", *more)
    own, waits = method.loss, []

    def loss(batch):
        with Waits() as mode:
            terms = own(batch)
        waits.extend(mode.found)
        return terms

    method.loss = loss
    trainer.fit(method, data)
    assert not waits
    with Waits() as mode:
        torch.ones(2).nonzero()
    assert mode.found


# several processes


class Scanned:
    def __init__(self):
        self.x = torch.randint(0, 256, (23, 3, 16, 16), generator=torch.Generator().manual_seed(0))

    def size(self, split):
        return 23

    def scan(self, split, start=0, stop=None):
        for i in range(start, stop, 5):
            yield {"crops": [self.x[i : min(i + 5, stop)].to(torch.uint8)]}


def clustered():
    """Features, labels, order and the gradient of the loss, as this process sees them."""
    torch.manual_seed(0)
    net = ResNet(depth=18, width=4, stem="small").double()
    net.forward = lambda x, own=net.forward: own(x.double())
    with evaluating(net):
        f = extract(net, net.dim, Scanned(), torch.device("cpu"))
    found = kmeans(F.normalize(principal(f, 8, whiten=True), dim=1), 4, iterations=20, seed=1)
    labels = PseudoLabels(23)
    labels.update(found.labels, 0)
    index = uniform_order(labels.of, 12, 0, 0)
    w = torch.linspace(-1, 1, f.shape[1] * 4).view(4, -1).requires_grad_()
    rows = mine(index)
    loss = F.cross_entropy(f[rows] @ w.T, labels[rows])
    loss.backward()
    return {
        "f": f,
        "labels": found.labels,
        "c": found.centroids,
        "i": index,
        "loss": mean(loss),
        "grad": mean(w.grad),
    }


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_cluster_as_one_does(world):
    alone = clustered()
    for found in on_processes(world, clustered):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_labels_are_left_out_of_ddps_broadcast(tiny):
    method, data, trainer = tiny("deepcluster", "trainer.max_steps=1")
    trainer.fit(method, data)
    assert "labels.of" in method._ddp_params_and_buffers_to_ignore


# gradients as inputs


def test_sobel_is_a_two_channel_network_on_gradients():
    torch.manual_seed(0)
    net = ResNet(depth=18, width=4, stem="small").eval()
    sobel = Sobel(net)
    x = torch.randn(2, 3, 16, 16)
    grey = x.mean(1, keepdim=True)
    kx = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    edges = torch.cat([F.conv2d(grey, k.view(1, 1, 3, 3), padding=1) for k in (kx, kx.T)], 1)
    torch.testing.assert_close(sobel.seen(x)[:, :2], edges, atol=1e-5, rtol=1e-5)
    assert not sobel.seen(x)[:, 2].any()
    first = F.conv2d(edges, net.conv1.weight[:, :2], stride=net.conv1.stride, padding=1)
    torch.testing.assert_close(net.conv1(sobel.seen(x)), first, atol=1e-4, rtol=1e-4)
    assert sobel.dim == net.dim
    torch.testing.assert_close(sobel.stages(x)["res5"].mean((2, 3)), sobel(x))
    flat = torch.full((1, 3, 9, 9), 0.7)
    assert sobel.seen(flat)[..., 1:-1, 1:-1].abs().max() < 1e-6  # colour alone is invisible
    shift = torch.tensor([0.5, -0.2, -0.3]).view(3, 1, 1)
    torch.testing.assert_close(sobel(x + shift), sobel(x), atol=1e-4, rtol=1e-4)


def test_a_sobel_backbone_comes_back_from_its_checkpoint(tmp_path):
    from unlabeled.backbones.load import checkpoint, fresh

    torch.manual_seed(1)
    sobel = Sobel(ResNet(depth=18, width=4, stem="small")).eval()
    saved = {f"backbone.{k}": v for k, v in sobel.state_dict().items()}
    torch.save({"state_dict": saved, "backbone_config": sobel.config}, tmp_path / "x.ckpt")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(checkpoint(str(tmp_path / "x.ckpt")).eval()(x), sobel(x))
    assert not torch.equal(fresh(sobel.config).eval()(x), sobel(x))


def test_architectures_of_library_models_download_nothing(monkeypatch):
    from unlabeled.backbones import load

    asked = []
    monkeypatch.setattr(load, "build", asked.append)
    inner = {"_target_": "unlabeled.backbones.library.torchvision", "weights": "DEFAULT"}
    load.fresh({"_target_": "unlabeled.backbones.sobel.Sobel", "model": inner})
    assert asked[0]["model"] == {**inner, "weights": None}


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("method.clusters=1", "clusters must be at least 2, got 1"),
        ("method.pca=0", "pca must be at least 1, got 0"),
        ("method.every_n_epochs=0", "every_n_epochs must be at least 1, got 0"),
        ("method.iterations=0", "iterations must be at least 1, got 0"),
        ("method.sampling=labels", "sampling must be clusters or images, got 'labels'"),
        ("method.dropout=1", "dropout must lie in"),
    ],
)
def test_bad_values_are_named(tiny, override, word):
    from hydra.errors import InstantiationException

    with pytest.raises(InstantiationException, match=word):
        tiny("deepcluster", override)


def test_more_clusters_than_images_are_refused(tiny):
    method, data, trainer = tiny("deepcluster", "method.clusters=65")
    with pytest.raises(ValueError, match="clusters=65 needs at least as many images, got 64"):
        trainer.fit(method, data)
