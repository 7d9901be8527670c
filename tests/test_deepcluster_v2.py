"""DeepCluster-v2: spherical clusters of remembered embeddings, and its loss."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes, value_and_gradient

from unlabeled.dist import mine
from unlabeled.methods.deepcluster_v2 import DeepClusterV2
from unlabeled.parts import first_pass
from unlabeled.parts.clustering import fill_empty, kmeans
from unlabeled.parts.lloyd import lloyd
from unlabeled.parts.prototypes import IGNORED, prototype_loss


def units(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def labels(heads=2, rows=6, k=5, seed=0):
    y = torch.randint(0, k, (heads, rows), generator=torch.Generator().manual_seed(seed))
    y[0, 1] = y[1, 4] = y[1, 5] = IGNORED
    return y


# the loss


def test_the_loss_is_its_formula():
    z, c, y, t = [units(6, 4, seed=s) for s in range(3)], units(2, 5, 4, seed=9), labels(), 0.1
    total, count = 0.0, 0
    for h in range(2):
        for crop in z:
            for i in range(6):
                if y[h, i] == IGNORED:
                    continue
                scores = [float(crop[i] @ c[h, k]) / t for k in range(5)]
                total -= scores[y[h, i]] - math.log(sum(math.exp(s) for s in scores))
                count += 1
    assert count == 27
    assert prototype_loss(z, c, y, t).item() == pytest.approx(total / count, rel=1e-12)


def test_equal_centroids_give_log_k():
    c = units(4).expand(2, 5, 4)
    assert prototype_loss([units(6, 4)], c, labels(), 0.1).item() == pytest.approx(math.log(5))
    many = units(8).expand(3, 3000, 8)
    loss = prototype_loss([units(4, 8)] * 8, many, torch.zeros(3, 4, dtype=torch.int64), 0.1)
    assert loss.item() == pytest.approx(8.006367567650246)


def test_images_without_a_label_have_no_gradient():
    z, y = units(6, 4).requires_grad_(), labels()
    y[:, 3] = IGNORED
    prototype_loss([z], units(2, 5, 4, seed=1), y, 0.1).backward()
    assert not z.grad[3].any()
    assert z.grad[[0, 1, 2, 4, 5]].any(1).all()
    nobody = prototype_loss([z], units(2, 5, 4), torch.full((2, 6), IGNORED), 0.1)
    assert nobody.item() == 0


def test_half_precision_is_raised():
    z, c, y = [units(6, 4).bfloat16()], units(2, 5, 4, seed=1).bfloat16(), labels()
    assert prototype_loss(z, c, y, 0.1).dtype == torch.float32
    whole = prototype_loss([z[0].float()], c.float(), y, 0.1)
    torch.testing.assert_close(prototype_loss(z, c, y, 0.1), whole)


# spherical k-means


def test_centroids_have_unit_norm_and_rows_their_nearest():
    x = units(200, 6, dtype=torch.float32)
    found = kmeans(x, 9, iterations=10, seed=1, spherical=True)
    torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(9))
    assert torch.equal((x @ found.centroids.T).argmax(1), found.labels)
    closeness = [
        float((x * c.centroids[c.labels]).sum())
        for c in (kmeans(x, 9, iterations=i, seed=1, spherical=True) for i in (1, 3, 10, 40))
    ]
    assert all(a <= b + 1e-4 for a, b in itertools.pairwise(closeness))


def test_with_as_many_clusters_as_points_each_is_its_own_centroid():
    x = units(20, 6, dtype=torch.float32)
    found = kmeans(x, 20, iterations=10, spherical=True)
    torch.testing.assert_close(found.centroids[found.labels], x)
    assert len(found.labels.unique()) == 20


def test_an_empty_cluster_gets_a_centroid_of_unit_norm():
    x, y = units(30, 5), torch.zeros(30, dtype=torch.int64)
    centroids = F.normalize(torch.ones(4, 5, dtype=torch.float64), dim=1)
    filled = fill_empty(x, y, centroids, spherical=True)
    assert (filled.labels.bincount(minlength=4) > 0).all()
    torch.testing.assert_close(filled.centroids.norm(dim=1), torch.ones(4, dtype=torch.float64))
    for k in range(4):
        mean = F.normalize(x[filled.labels == k].mean(0), dim=0)
        torch.testing.assert_close(filled.centroids[k], mean)


# the method


def watched(tiny, *more):
    """A run, and what it held after every step."""
    method, data, trainer = tiny("deepcluster_v2", "data.limit=70", *more)
    seen = []

    def keep(out, batch, i):
        held = {name: buffer.clone() for name, buffer in method.named_buffers() if "." not in name}
        seen.append({**held, "index": batch["index"], "z": method.seen["embeddings"].clone()})

    method.on_train_batch_end = keep
    trainer.fit(method, data)
    return method, seen


def test_labels_and_prototypes_rest_within_an_epoch(tiny):
    _, seen = watched(tiny)
    for epoch in (seen[:4], seen[4:]):
        for name in ("labels", "prototypes", "epoch"):
            assert all(torch.equal(step[name], epoch[0][name]) for step in epoch)
        torch.testing.assert_close(epoch[0]["prototypes"].norm(dim=2), torch.ones(3, 12))
    assert not torch.equal(seen[3]["labels"], seen[4]["labels"])
    assert not torch.equal(seen[3]["prototypes"], seen[4]["prototypes"])
    assert [int(step["epoch"]) for step in seen] == [0] * 4 + [1] * 4


def test_the_memory_holds_the_last_embeddings_of_the_images_met(tiny):
    _, seen = watched(tiny)
    for before, after in itertools.pairwise(seen):
        index = after["index"]
        torch.testing.assert_close(after["memory"][0, index], after["z"])
        torch.testing.assert_close(after["memory"][:, index].norm(dim=2), torch.ones(2, 16))
        assert not torch.equal(after["memory"][0, index], after["memory"][1, index])
        rest = [i for i in range(70) if i not in index.tolist()]
        assert torch.equal(after["memory"][:, rest], before["memory"][:, rest])


def test_images_that_were_not_met_have_no_label(tiny):
    """Batches of 16 leave out 6 of 70 images in every epoch."""
    _, seen = watched(tiny)
    assert (seen[0]["labels"] != IGNORED).all()  # the first pass met them all
    met = torch.zeros(70, dtype=torch.bool)
    met[torch.cat([step["index"] for step in seen[:4]])] = True
    assert met.sum() == 64
    assert torch.equal(seen[3]["met"], met)
    for head in seen[4]["labels"]:
        assert torch.equal(head != IGNORED, met)
        assert head[met].unique().tolist() == list(range(12))


def test_clusters_are_those_of_the_memory_a_crop_for_each_head(tiny):
    _, seen = watched(tiny)
    before, after = seen[3], seen[4]
    rows = before["met"].nonzero().flatten()
    for h in range(3):
        z, c = before["memory"][h % 2, rows], after["prototypes"][h]
        nearest = (z @ c.T).argmax(1)
        share = (nearest == after["labels"][h, rows]).float().mean()
        assert share > 0.8  # clusters that were filled may be nearer than they look


def test_one_pass_fills_the_memory_and_no_other_is_made(tiny, monkeypatch):
    calls, own = [], first_pass.extract

    def extract(*arguments):
        calls.append(1)
        return own(*arguments)

    monkeypatch.setattr(first_pass, "extract", extract)
    _, seen = watched(tiny, "trainer.max_epochs=3")
    assert len(seen) == 12
    assert len(calls) == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [(3, "batch"), (4, "batch"), (4, "epoch")])
def test_a_run_stopped_anywhere_goes_on_exactly(tiny, tmp_path, workers, at):
    lines = ("deepcluster_v2", "data.limit=70", f"data.workers={workers}")
    whole, data, trainer = tiny(*lines)

    def keep(where):
        if (trainer.global_step, where) == at:
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    whole.on_train_batch_end = lambda *_: keep("batch")
    whole.on_train_epoch_end = lambda: keep("epoch")
    trainer.fit(whole, data)
    resumed, data, trainer = tiny(*lines)
    trainer.fit(resumed, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_prototypes_are_not_trained(tiny):
    method, _, _ = tiny("deepcluster_v2")
    assert "prototypes" not in dict(method.named_parameters())
    method.prepare(64, 10)
    assert {"prototypes", "memory", "met", "labels", "epoch"} <= method.state_dict().keys()


def test_memories_are_left_out_of_ddps_broadcast(tiny):
    method, data, trainer = tiny("deepcluster_v2", "trainer.max_steps=1")
    trainer.fit(method, data)
    ignored = set(method._ddp_params_and_buffers_to_ignore)
    assert {"memory", "met", "labels", "prototypes"} <= ignored
    assert not [name for name in ignored if name.startswith("backbone")]


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("method.temperature=0", "temperature must be positive, got 0"),
        ("method.heads=0", "heads=0"),
        ("method.prototypes=1", "prototypes=1"),
        ("method.iterations=0", "iterations=0"),
    ],
)
def test_bad_values_are_named(tiny, override, word):
    from hydra.errors import InstantiationException

    with pytest.raises(InstantiationException, match=word):
        tiny("deepcluster_v2", override)


def test_more_prototypes_than_images_are_refused(tiny):
    method, data, trainer = tiny("deepcluster_v2", "method.prototypes=65")
    with pytest.raises(ValueError, match=r"prototypes=65 needs as many images, .* has 64"):
        trainer.fit(method, data)


def first_memory(tiny, *more):
    """What the memory holds before the first update."""
    method, data, trainer = tiny("deepcluster_v2", "data.limit=70", "trainer.max_steps=1", *more)
    kept, begin = [], method.begin_epoch

    def keep(epoch):
        begin(epoch)
        kept.append(method.memory.clone())

    method.begin_epoch = keep
    trainer.fit(method, data)
    return kept[0]


def test_the_first_pass_may_be_of_two_augmented_crops(tiny):
    fixed, own = first_memory(tiny), first_memory(tiny, "method.augmented_first_pass=true")
    assert torch.equal(fixed[0], fixed[1])
    assert (own.norm(dim=2) - 1).abs().max() < 1e-5  # 70 of 70: the last batch is filled up
    assert not torch.allclose(own[0], own[1], atol=0.01)
    assert not torch.allclose(own[0], fixed[0], atol=0.01)
    again = first_memory(tiny, "method.augmented_first_pass=true")
    assert torch.equal(own, again)


def test_an_empty_cluster_may_keep_its_centroid():
    far = -torch.eye(4)[:1].repeat(12, 1)  # rows that coincide: where two begin, one stays empty
    x, empties = torch.cat([far, units(30, 4, dtype=torch.float32).abs()]), 0
    for seed in range(6):
        found = lloyd(x, 9, iterations=10, seed=seed, spherical=True, keep_empty=True)
        c = lloyd(x, 9, iterations=0, seed=seed, spherical=True, keep_empty=True).centroids
        for _ in range(10):
            y = (x @ c.T).argmax(1)
            for k in range(9):
                if (y == k).any():
                    c[k] = F.normalize(x[y == k].mean(0), dim=0)
        assert torch.equal(found.labels, (x @ c.T).argmax(1))
        torch.testing.assert_close(found.centroids, c, atol=1e-5, rtol=0)
        empties += int((found.labels.bincount(minlength=9) == 0).sum())
    assert empties > 2


def test_a_run_may_keep_empty_clusters(tiny):
    _, seen = watched(tiny, "method.keep_empty=true", "trainer.max_epochs=1")
    z, c = seen[0]["memory"], seen[0]["prototypes"]
    rows = torch.arange(70)[~torch.isin(torch.arange(70), seen[0]["index"])]  # not written since
    assert torch.equal((z[0, rows] @ c[0].T).argmax(1), seen[0]["labels"][0, rows])


# several processes


class Network(torch.nn.Module):
    dim = 10

    def forward(self, x):
        return x.mean(1).flatten(1)


class Data:
    def size(self, split):
        return 26

    batch_size, decode = 12, None

    def pixels(self):
        return torch.randn(26, 3, 2, 5, generator=torch.Generator().manual_seed(1))

    def scan(self, split, start=0, stop=None):
        yield {"crops": [self.pixels()[start:stop]]}

    def cut(self, split, parts, decode, *key):
        for part in parts:
            yield {"crops": [self.pixels()[part]] * 2, "index": torch.tensor(part)}


class Noisy(torch.nn.Module):
    def forward(self, batch, draws):
        views = [x + draws.fork(i).normal(3, 2, 5) for i, x in enumerate(batch["crops"])]
        return {**batch, "views": views}


class Trainer:
    datamodule = Data()


def shared(official=False):
    """Two epochs of two steps: the memory, the clusters, and the last loss and gradient."""
    torch.manual_seed(0)
    sizes = {"hidden": 8, "dim": 6, "prototypes": 4}
    method = DeepClusterV2(
        Network(),
        Noisy(),
        None,  # type: ignore[arg-type]
        **sizes,
        augmented_first_pass=official,
        keep_empty=official,
    )
    method.trainer = Trainer()
    method.log = lambda *_: None
    method.prepare(26, 0)
    views = [units(26, 3, 2, 5, seed=s, dtype=torch.float32) for s in range(3)]
    found = {}
    for epoch in (0, 1):
        method.begin_epoch(epoch)
        order = torch.randperm(26, generator=torch.Generator().manual_seed(epoch))
        for step in range(2):  # 2 of 26 images are left out
            index = mine(order[step * 12 : step * 12 + 12])
            batch = {"index": index, "views": [v[index] for v in views]}
            method.zero_grad()
            loss = method.loss(batch)["clusters"]
            loss.backward()
            found = {"loss": mean(loss), "grad": mean(method.projector[0].weight.grad)}
    assert (method.labels == IGNORED).sum() == 2 * 3
    return {**found, **{k: v for k, v in method.named_buffers() if "." not in k}}


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("official", [False, True])
def test_processes_cluster_and_learn_as_one_does(world, official):
    alone = shared(official)
    assert alone["grad"].abs().max() > 1e-3
    for found in on_processes(world, partial(shared, official)):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)


def unequal():
    """The first rows have no label, so that processes ignore unequally many."""
    y = torch.arange(24).view(2, 12) % 5
    y[:, :5] = IGNORED
    x, c = units(12, 8), units(2, 5, 4, seed=1)

    def loss(w):
        z = F.normalize(mine(x) @ w, dim=1)
        return prototype_loss([z, z.flip(1)], c, torch.stack([mine(head) for head in y]), 0.5)

    return value_and_gradient(loss, units(8, 4, seed=2))


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_ignored_images_weigh_the_same_wherever_they_are(world):
    alone = unequal()
    for found in on_processes(world, unequal):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, msg=name)


def test_an_epoch_that_met_fewer_images_than_prototypes_is_no_end(tiny):
    method, data, trainer = tiny("deepcluster_v2", "data.limit=70", "method.prototypes=66")
    trainer.fit(method, data)  # 64 of 70 images make whole batches
    assert int(method.epoch) == 1
    assert (method.labels >= 0).all()
