"""ClusterFit: what its clusters depend on, any source, and the noisy labels of its control."""

import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes
from torch import nn

from unlabeled.backbones.resnet import ResNet
from unlabeled.dist import mine
from unlabeled.methods.clusterfit import ClusterFit
from unlabeled.parts.clustering import kmeans
from unlabeled.parts.features import principal
from unlabeled.parts.frozen import Frozen
from unlabeled.parts.labels import LabelNoise
from unlabeled.train import run


def points(n, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def fitted(tiny, *more):
    method, data, trainer = tiny("clusterfit", "trainer.max_steps=1", *more)
    trainer.fit(method, data)
    return method


# clusters


def test_as_many_clusters_as_points_leave_no_inertia():
    x = points(30)
    found = kmeans(x, 30, iterations=10)
    assert len(found.labels.unique()) == 30
    torch.testing.assert_close(found.centroids[found.labels], x)
    twice = torch.cat([x[:12], x[:12]])  # 12 distinct points
    found = kmeans(twice, 12, iterations=10, seed=1)
    assert (
        float((twice - found.centroids[found.labels]).square().sum()) < 1e-4
    )  # faiss moves copies a little


def test_a_further_step_changes_nothing_at_convergence():
    x = points(120)
    found = kmeans(x, 6, iterations=100)
    means = torch.stack([x[found.labels == k].mean(0) for k in range(6)])
    torch.testing.assert_close(means, found.centroids, atol=1e-5, rtol=1e-4)
    assert torch.equal(torch.cdist(x, means).argmin(1), found.labels)


def test_numbers_of_clusters_permute_the_last_layer_only(tiny):
    method = fitted(tiny)
    order = torch.tensor([3, 0, 4, 1, 2])
    h, target = points(16, method.feature_dim), method.labels[:16]
    loss = F.cross_entropy(method.head(h), target)
    other = nn.Linear(method.feature_dim, 5)
    with torch.no_grad():
        other.weight[order], other.bias[order] = method.head.weight, method.head.bias
    torch.testing.assert_close(F.cross_entropy(other(h), order[target]), loss)


def test_clusters_do_not_depend_on_labels_or_on_anything_random(tiny):
    def labels(order):
        method, data, trainer = tiny("clusterfit", "trainer.max_steps=1", "seed=3")
        data.setup("fit")
        y = data.labels("train")
        y.copy_(y[order])
        trainer.fit(method, data)
        return method.labels

    first = labels(torch.arange(64))
    assert torch.equal(first, labels(torch.randperm(64)))
    assert first.unique().tolist() == list(range(5))


def test_clusters_are_those_of_the_sources_features(tiny):
    method = fitted(tiny)
    source, data = method.source.network, method.trainer.datamodule
    from unlabeled.batch import normalize

    crops = torch.cat([batch["crops"][0] for batch in data.scan("train")])
    assert not source.training
    with torch.no_grad():
        f = source(normalize(crops))
    means = torch.stack([f[method.labels == k].mean(0) for k in range(5)])
    assert torch.equal(torch.cdist(f, means).argmin(1), method.labels)


def test_features_may_be_reduced_and_normalised(tiny):
    plain = fitted(tiny).labels
    for change in ("method.pca=2", "method.normalize=true"):
        changed = fitted(tiny, change).labels
        assert changed.unique().tolist() == list(range(5))
        assert not torch.equal(changed, plain)
    x = points(60)
    whole = kmeans(principal(x, 5), 4, iterations=100, seed=1).labels
    assert torch.equal(whole, kmeans(x, 4, iterations=100, seed=1).labels)  # a rotation


# the second network


def test_it_starts_from_scratch(tiny):
    method, *_ = tiny("clusterfit", "backbone.width=4", "backbone.stem_stride=1")
    source = method.source.network.state_dict()
    own = method.backbone.state_dict()
    assert own.keys() == source.keys()
    for name, x in own.items():
        if x.ndim > 1:
            assert x.shape == source[name].shape
            assert not torch.equal(x, source[name]), name


def test_the_source_rests_and_only_its_record_is_saved(tiny, tmp_path):
    method, data, trainer = tiny("clusterfit")
    network = method.source.network
    before = {k: v.clone() for k, v in network.state_dict().items()}
    trainer.fit(method, data)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(p.requires_grad for p in network.parameters())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert not [key for key in saved["state_dict"] if "source" in key]
    assert saved["source"]["path"].endswith("last.ckpt")
    assert saved["source"]["checksum"] == Frozen(network).record()["checksum"]
    with torch.no_grad():
        network.bn1.running_mean[0] += 1e-6
    assert saved["source"]["checksum"] != Frozen(network).record()["checksum"]


def test_a_resumed_run_does_not_cluster_again(tiny, tmp_path, monkeypatch):
    from unlabeled.methods import clusterfit

    method = fitted(tiny)
    method.trainer.save_checkpoint(tmp_path / "x.ckpt")
    monkeypatch.setattr(clusterfit, "partition", None)
    again, data, trainer = tiny("clusterfit")
    trainer.fit(again, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(again.labels, method.labels)


# sources


SMALL = ["backbone.width=16", "trainer=cpu", "trainer.precision=32-true", "callbacks=none"]
SMALL += ["evals=none", "baselines=false", "data.batch_size=8", "trainer.max_steps=2"]


def test_a_run_on_noisy_labels_of_other_data_is_a_source(compose, tmp_path):
    """N_pre: grey garments with wrong labels; N_cf: another network on small coloured folders."""
    from PIL import Image

    first = ["data=fashion_mnist_mini", "data.limit=64", "method.label_noise=0.5"]
    run(compose("method=supervised", *first, *SMALL), tmp_path / "pre")
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            colour = (200 + i, 9 * i, 0) if name == "red" else (0, 9 * i, 200 + i)
            Image.new("RGB", (40, 40), colour).save(tmp_path / "photos" / name / f"{i}.png")
    second = ["data=folder", f"data.root={tmp_path / 'photos'}", "data.layout.test_share=0"]
    second += ["data.eval_decode.size=32", "data.eval_decode.resize=32", "data.workers=0"]
    second += [f"method.source.path={tmp_path / 'pre'}", "method.clusters=3"]
    second += [*SMALL, "backbone.depth=34"]
    run(compose("method=clusterfit", *second), tmp_path / "fit")
    saved = torch.load(tmp_path / "fit/checkpoints/last.ckpt", weights_only=True)
    labels = saved["state_dict"]["labels"]
    assert len(labels) == 16
    assert labels.unique().tolist() == [0, 1, 2]
    assert saved["source"]["path"] == str(tmp_path / "pre/checkpoints/last.ckpt")
    assert saved["backbone_config"]["depth"] == 34


@pytest.mark.parametrize(
    ("library", "name"), [("torchvision", "resnet18"), ("timm", "test_resnet")]
)
def test_a_librarys_model_is_a_source(compose, library, name):
    from hydra.utils import instantiate

    cfg = compose(
        *("method=clusterfit", f"backbone@method.source={library}", f"method.source.name={name}"),
        *("method.clusters=5", "data.limit=32", *SMALL),
    )
    import pytorch_lightning as pl

    pl.seed_everything(0, workers=True, verbose=False)
    method, data = instantiate(cfg.method), instantiate(cfg.data)
    instantiate(cfg.trainer, logger=False, enable_checkpointing=False).fit(method, data)
    assert method.labels.unique().tolist() == list(range(5))
    assert method.source.record()["path"] is None


# noisy labels


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("include_true", "classes"), [(True, 4), (True, 10), (False, 4)])
def test_as_many_labels_change_as_expected(p, include_true, classes):
    n = 40_000
    label, index = torch.arange(n) % classes, torch.arange(n)
    noise = LabelNoise(n, classes, p, include_true=include_true, seed=0)
    noisy = noise(label, index)
    flipped = float((noisy != label).float().mean())
    expected = p * (classes - 1) / classes if include_true else p
    assert flipped == pytest.approx(expected, abs=0.01)
    if p in (0.0, 1.0) and not include_true:
        assert flipped == p
    if p == 0:
        assert torch.equal(noisy, label)
    assert 0 <= int(noisy.min()) <= int(noisy.max()) < classes
    if p:  # a new label is uniform over those it may be
        changed = noise.replaced & (label == 1)
        shares = noisy[changed].bincount(minlength=classes) / changed.sum()
        for k in range(classes):
            want = 1 / classes if include_true else (k != 1) / (classes - 1)
            assert shares[k] == pytest.approx(want, abs=0.03)


def test_noise_is_a_function_of_seed_and_index():
    label = torch.arange(5000) % 10
    whole = LabelNoise(5000, 10, 0.5, include_true=True, seed=0)(label, torch.arange(5000))
    few = LabelNoise(70, 10, 0.5, include_true=True, seed=0)
    index = torch.tensor([41, 3, 69, 3])
    assert torch.equal(few(label[index], index), whole[index])  # in any order, of any number
    other = LabelNoise(5000, 10, 0.5, include_true=True, seed=1)(label, torch.arange(5000))
    assert not torch.equal(other, whole)


def test_supervised_learns_the_noisy_labels(tiny):
    clean, data, trainer = tiny("supervised", "trainer.max_steps=1")
    trainer.fit(clean, data)
    assert clean.noise is None
    method, data, trainer = tiny(
        *("supervised", "method.label_noise=1", "method.noise_includes_true=false"),
        "trainer.max_steps=1",
    )
    seen = []
    own = F.cross_entropy

    def spy(logits, target, **more):
        seen.append(target)
        return own(logits, target, **more)

    batches = []
    method.on_train_batch_start = lambda batch, i: batches.append(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", spy)
        trainer.fit(method, data)
    assert torch.equal(seen[0], method.noise(batches[0]["label"], batches[0]["index"]))
    assert (seen[0] != batches[0]["label"]).all()
    assert not [key for key in method.state_dict() if "noise" in key]


@pytest.mark.parametrize(
    ("name", "override", "word"),
    [
        ("supervised", "method.label_noise=1.5", "label_noise must lie in .* got 1.5"),
        ("clusterfit", "method.clusters=1", "clusters must be at least 2, got 1"),
        ("clusterfit", "method.pca=0", "pca must be at least 1, got 0"),
        ("clusterfit", "method.iterations=0", "iterations must be at least 1, got 0"),
    ],
)
def test_bad_values_are_named(tiny, name, override, word):
    from hydra.errors import InstantiationException

    with pytest.raises(InstantiationException, match=word):
        tiny(name, override)


def test_the_checksum_is_of_every_weight():
    torch.manual_seed(0)
    one, other = ResNet(depth=18, width=4), ResNet(depth=18, width=4)
    assert Frozen(one).record() != Frozen(other).record()
    other.load_state_dict(one.state_dict())
    assert Frozen(one).record() == Frozen(other).record()


# several processes


class Network(nn.Module):
    dim = 6

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 6)

    def forward(self, x):
        return torch.tanh(self.layer(x.mean(1).flatten(1).to(self.layer.weight.dtype)))


class Data:
    """23 images: a process has fewer than the others."""

    def size(self, split):
        return 23

    def scan(self, split, start=0, stop=None):
        yield {"crops": [points(23, 15).view(23, 3, 1, 5)[start:stop]]}


class Trainer:
    datamodule = Data()


def shared():
    """Labels, loss and gradient, with each process seeing its share of a batch."""
    found = []
    for options in ({}, {"pca": 3}, {"normalize": True}):
        torch.manual_seed(0)
        given = {"source": Network(), "clusters": 4, **options}
        method = ClusterFit(Network(), nn.Identity(), None, **given).double()
        method.trainer, method.log = Trainer(), lambda *_: None
        method.prepare(23, 0)
        method.on_fit_start()
        index = mine(torch.arange(12) * 5 % 23)
        view = points(23, 15, seed=1).view(23, 3, 1, 5).double()[index]
        loss = method.loss({"index": index, "views": [view]})["clusters"]
        loss.backward()
        grad = torch.cat([p.grad.flatten() for p in method.parameters()])
        found.append({"labels": method.labels, "loss": mean(loss), "grad": mean(grad)})
    return found


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_cluster_and_learn_as_one_does(world):
    alone = shared()
    assert all(one["labels"].unique().tolist() == [0, 1, 2, 3] for one in alone)
    for found in on_processes(world, shared):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-7)
