"""One fact per paper that a wrong reading breaks."""

import math

import pytest
import torch

from unlabeled.draws import Draws


def batch_of(method, data, trainer, step=0):
    """The first training batch on the device, augmented, with the method set up."""
    data.trainer = None
    data.setup("fit")
    method._trainer = None
    method.seed = data.seed
    method.prepare(data.count, len(data.classes))
    loader = data.train_dataloader()
    batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    method.step = batch["step"]
    rows = len(batch["index"])
    method.log = method.note = lambda *args, **kwargs: None
    return method.augment(batch, Draws(0, "augment", step, rows=rows))


def test_rotation_target_undoes_the_rotation(tiny):
    method, *rest = tiny("rotation")
    batch = batch_of(method, *rest)
    (x,), target = batch["views"], batch["target"]
    assert target.bincount().tolist() == [16] * 4
    for i, turn in enumerate(target.tolist()):
        assert torch.equal(torch.rot90(x[i], -turn, (-2, -1)), x[i % 16])


def test_jigsaw_chance_is_log_p_and_tiles_meet_their_slots(tiny):
    method, *rest = tiny("jigsaw")
    batch = batch_of(method, *rest)
    torch.nn.init.zeros_(method.head.weight)
    torch.nn.init.zeros_(method.head.bias)
    assert method.loss(batch)["jigsaw"].item() == pytest.approx(math.log(10))
    assert batch["views"][0].shape[:2] == (16, 4)


def test_mocos_own_key_is_no_negative_and_joins_the_queue_afterwards(tiny):
    method, *rest = tiny("moco_v2")
    batch = batch_of(method, *rest)
    before = method.queue.keys.clone()
    loss = method.loss(batch)["contrast"]
    assert torch.equal(method.queue.keys[16:], before[16:])
    q = method.seen["embeddings"]
    k = method.queue.keys[:16]
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ before.T], 1) / method.temperature
    assert loss.item() == pytest.approx(-logits.log_softmax(1)[:, 0].mean().item(), rel=1e-5)


def test_shuffled_keys_come_back_in_order(tiny):
    method, *rest = tiny("moco_v2", "backbone.bn_splits=1")
    batch = batch_of(method, *rest)
    x = batch["views"][1]
    method.key_encoder.eval()  # statistics of the whole: order must not matter then
    with torch.no_grad():
        torch.testing.assert_close(method._keys(x), method.key_encoder(x))


def test_swavs_prototypes_stay_unit_and_rest_while_frozen(tiny):
    method, data, trainer = tiny("swav", "method.freeze=0.5", "trainer.max_epochs=2")
    start = method.prototypes.weight.detach().clone()
    seen = []
    method.on_train_batch_end = lambda *_: seen.append(method.prototypes.weight.detach().clone())
    trainer.fit(method, data)
    assert all(torch.allclose(w, start) for w in seen[:4])
    assert not torch.allclose(seen[-1], start)
    for w in seen:
        torch.testing.assert_close(w.norm(dim=1), torch.ones(12))


def test_clusterfit_learns_from_scratch_and_never_sees_labels(tiny):
    def labels(shuffle):
        method, data, trainer = tiny("clusterfit", "trainer.max_steps=1")
        data.setup("fit")
        if shuffle:
            data.labels("train").copy_(data.labels("train").flip(0))
        trainer.fit(method, data)
        return method.labels

    first = labels(False)
    assert torch.equal(first, labels(True))
    assert len(first) == 64
    assert first.min() >= 0
    assert first.max() < 5


def test_byols_momentum_rises_to_one(tiny):
    method, data, trainer = tiny("byol")
    seen = []
    own = method.after_step

    def spy():
        from unlabeled.optim import cosine

        seen.append(cosine(method.tau, 1.0, method.progress))
        own()

    method.after_step = spy
    trainer.fit(method, data)
    assert seen[0] == pytest.approx(0.97, abs=2e-3)
    assert seen == sorted(seen)
    assert seen[-1] > 0.998


@pytest.mark.parametrize(
    ("name", "override", "word"),
    [
        ("simclr", "method.temperature=0", "temperature"),
        ("byol", "method.tau=1.5", "tau"),
        ("barlow_twins", "method.lambd=-1", "lambd"),
        ("moco_v2", "method.momentum=2", "momentum"),
        ("swav", "method.epsilon=0", "epsilon"),
        ("supervised", "method.label_smoothing=1", "label_smoothing"),
    ],
)
def test_bad_values_are_named(tiny, name, override, word):
    from hydra.errors import InstantiationException

    with pytest.raises(InstantiationException, match=word):
        tiny(name, override)
