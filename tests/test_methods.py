"""Generic over every conf/method/*.yaml: it trains, it resumes, it counts its updates."""

import hashlib
import sys

import pytest
import pytorch_lightning as pl
import torch
from conftest import MANUAL, METHODS, PRETEXT
from torch.utils._pytree import tree_map

from unlabeled.parts import ema

each = pytest.mark.parametrize("name", METHODS)


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=0, equal_nan=True, msg=key)


@each
def test_training_reaches_every_parameter(tiny, name):
    method, data, trainer = tiny(name)
    before = {n: p.clone() for n, p in method.backbone.named_parameters()}
    losses, got = [], set()

    def after_backward():
        got.update(n for n, p in method.named_parameters() if p.grad is not None)

    method.on_after_backward = after_backward
    method.on_train_batch_end = lambda out, *_: losses.append(out["loss"].item())
    trainer.fit(method, data)
    assert len(losses) == 8
    assert all(torch.tensor(losses).isfinite())
    moved = [n for n, p in method.backbone.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)
    missed = {n for n, p in method.named_parameters() if p.requires_grad} - got
    assert not missed
    finite = {n: p for n, p in method.state_dict().items() if n != "log_z"}  # not fixed yet: nan
    assert all(p.isfinite().all() for p in finite.values())
    assert method.seen["features"].shape == (16, method.backbone.dim)
    assert ("embeddings" in method.seen) == (name not in PRETEXT)


@pytest.mark.parametrize(
    ("name", "crops", "says"),
    [
        ("simclr", "one", r"number of views than the method takes .*2, got 1.*: choose method.aug"),
        ("npid", "two", r"number of views than the method takes .*expected 1.*: choose .*decode"),
        ("rotation", "one", r"does not give the 'target' that the method needs: choose method"),
    ],
)
def test_the_augmentation_of_another_method_is_named(tiny, name, crops, says):
    augment = {"one": "mild_single", "two": "mild"}[crops]
    method, data, trainer = tiny(name, f"decode={crops}", f"augment@method.augment={augment}")
    with pytest.raises(ValueError, match=says):
        trainer.fit(method, data)


def digest(tensors):
    """A number that changes with any bit of a list of tensors, or with their order."""
    told = hashlib.blake2b()
    for x in tensors:
        told.update(x.contiguous().numpy().tobytes())
    return told.hexdigest()


class Trace(pl.Callback):
    """What a run does at every step: images, views, loss, and the numbers of its update."""

    def __init__(self, monkeypatch, *, stop_at=None, path=None):
        self.steps, self.stop_at, self.path = [], stop_at, path
        own = ema.update

        def update(target, online, momentum):
            self.steps[-1]["momentum"] = momentum
            own(target, online, momentum)

        monkeypatch.setattr(ema, "update", update)

    def on_train_start(self, trainer, method):
        def after_update(optimizer, args, kwargs):
            groups = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
            self.steps[-1].setdefault("lr, weight decay", []).extend(groups)

        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(after_update)
        method.augment.register_forward_hook(
            lambda module, given, batch: self.steps[-1].update(views=digest(batch["views"]))
        )

    def on_train_batch_start(self, trainer, method, batch, batch_idx):
        self.steps.append({"step": batch["step"], "index": batch["index"].tolist()})

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):
        self.steps[-1]["loss"] = outputs["loss"].item()
        if trainer.global_step == self.stop_at:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@each
def test_a_run_that_stops_and_goes_on_is_the_run_that_never_stopped(
    tiny, name, tmp_path, monkeypatch
):
    path = tmp_path / "half.ckpt"
    clip = f"trainer.gradient_clip_val={'null' if name in MANUAL else 1.0}"
    with monkeypatch.context() as patch:
        never = Trace(patch)
        whole, data, first = tiny(name, clip, callbacks=[never])
        first.fit(whole, data)
    with monkeypatch.context() as patch:  # stops in the middle of the second epoch
        before = Trace(patch, stop_at=6, path=path)
        part, data, trainer = tiny(name, clip, callbacks=[before])
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(part, data)
    with monkeypatch.context() as patch:
        after = Trace(patch)
        resumed, data, second = tiny(name, clip, "seed=0", callbacks=[after])
        torch.manual_seed(99)  # whatever else the other process has drawn
        second.fit(resumed, data, ckpt_path=path, weights_only=True)

    assert [step["step"] for step in after.steps] == [6, 7]
    assert before.steps + after.steps == never.steps
    assert all({"index", "views", "loss", "lr, weight decay"} <= s.keys() for s in never.steps)
    assert len({s["views"] for s in never.steps}) == 8
    averages = hasattr(sys.modules[type(whole).__module__], "ema")
    assert ["momentum" in s for s in never.steps] == [averages] * 8
    assert_same(state(whole), state(resumed))
    assert saved(first) == saved(second)
    assert resumed.progress == 1.0


def saved(trainer):
    """State of every optimizer and its schedule, with digests in place of tensors."""
    assert len(trainer.optimizers) == len(trainer.lr_scheduler_configs)
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    given = {"optimizers": optimizers, "schedules": schedules}
    assert all(optimizer["state"] for optimizer in optimizers)
    return tree_map(lambda x: digest([x]) if isinstance(x, torch.Tensor) else x, given)


@pytest.mark.parametrize("name", ["dino", "barlow_twins", "moco"])
def test_the_numbers_of_an_update_move(tiny, name, monkeypatch):
    """Without which the test above would compare constants."""
    trace = Trace(monkeypatch)
    method, data, trainer = tiny(name, callbacks=[trace])
    trainer.fit(method, data)
    lrs, decays = ([[g[i] for g in s["lr, weight decay"]] for s in trace.steps] for i in (0, 1))
    assert len({tuple(lr) for lr in lrs}) > 1
    assert (len({tuple(decay) for decay in decays}) > 1) == (name == "dino")
    momenta = [s.get("momentum") for s in trace.steps]
    assert len(set(momenta)) == {"dino": 8, "moco": 1, "barlow_twins": 1}[name]


@pytest.mark.parametrize("name", ["byol", "moco_v2", "swav"])
def test_after_step_runs_once_per_update(tiny, name):
    method, data, trainer = tiny(name, "trainer.accumulate_grad_batches=2", "trainer.max_epochs=1")
    calls, own = [], method.after_step

    def after_step():
        calls.append(1)
        own()

    method.after_step = after_step
    trainer.fit(method, data)
    assert len(calls) == 2  # 4 batches


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tiny):
    runs = []
    for seed in (0, 0, 1):
        method, data, trainer = tiny("simclr", f"seed={seed}")
        trainer.fit(method, data)
        runs.append(state(method))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["backbone.conv1.weight"], runs[2]["backbone.conv1.weight"])


def test_what_the_data_cannot_give_is_named(tiny):
    method, data, trainer = tiny("supervised")
    data.setup("fit")
    data.gives = data.gives - {"label"}
    with pytest.raises(ValueError, match=r"Supervised needs \['label'\]"):
        trainer.fit(method, data)


def test_a_checkpoint_of_other_data_is_refused(tiny, tmp_path):
    method, data, trainer = tiny("pirl")
    trainer.fit(method, data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    method, data, trainer = tiny("pirl", "data.limit=48")
    with pytest.raises(ValueError, match=r"memory.bank: \(64, 128\) in the checkpoint, \(48, 128"):
        trainer.fit(method, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)


@pytest.mark.parametrize("name", ["byol", "moco_v2"])
def test_the_target_gets_no_gradient_and_moves_by_its_momentum(tiny, name):
    method, data, trainer = tiny(name, "trainer.max_steps=1")
    target = method.target if name == "byol" else method.key_encoder
    before = [p.clone() for p in target.parameters()]
    trainer.fit(method, data)
    share = 1 - (method.tau if name == "byol" else method.momentum)
    online = [*method.backbone.parameters()]
    online += list((method.projector if name == "byol" else method.head).parameters())
    for p, old, theta in zip(target.parameters(), before, online, strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, old + share * (theta - old))


def test_a_length_may_be_given_in_updates_alone(tiny):
    method, data, trainer = tiny("simclr", "trainer.max_epochs=-1", "trainer.max_steps=5")
    trainer.fit(method, data)
    assert trainer.global_step == 5
