"""Multi-task: what a batch trains and leaves alone, whose it is, and equality with one task."""

import inspect
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import CONF, SMALL, small
from hydra._internal.utils import _locate
from hydra.utils import instantiate
from omegaconf import OmegaConf
from processes import on_processes
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_ddp import RUN, run_of
from test_methods import saved
from test_sampler import tree  # noqa: F401 (a fixture)
from torch import nn

from unlabeled import dist
from unlabeled.augment.color import Grayscale
from unlabeled.backbones.resnet import ResNet
from unlabeled.batch import denormalize, normalize
from unlabeled.callbacks.held_out import HeldOut
from unlabeled.config import mistakes
from unlabeled.data.decode import Center, Crops
from unlabeled.data.images import Images
from unlabeled.data.layouts import Folder
from unlabeled.data.tasks import Tasks, by_task
from unlabeled.draws import Draws
from unlabeled.method import Method
from unlabeled.methods.multitask import MultiTask
from unlabeled.methods.rotation import Rotation
from unlabeled.parts.by_task import ByTask, Grey, the_order
from unlabeled.parts.task_norm import TaskNorms

PLAIN = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture
def pair(compose, tmp_path):
    """A function: names of tasks, options -> (method, data, trainer) of small settings."""

    def made(*names, schedule="round_robin", optim=(), lines=(), callbacks=(), **options):
        cfgs = {name: compose(*small(name), *optim, *lines) for name in names}
        cfg = cfgs[names[0]]
        pl.seed_everything(0, workers=True, verbose=False)
        backbone = instantiate(cfg.backbone)
        tasks = {
            name: instantiate(
                {**{k: v for k, v in cfg.method.items() if k not in ("backbone", "optim")}},
                _partial_=True,
            )
            for name, cfg in cfgs.items()
        }
        method = MultiTask(backbone, instantiate(cfg.method.optim), tasks=tasks, **options)
        decodes = {name: instantiate(cfg.data.decode) for name, cfg in cfgs.items()}
        data = instantiate(cfg.data)
        data.decode = Tasks(tasks=decodes, schedule=schedule)
        data.gives |= {"task"}
        more = {"callbacks": list(callbacks)} if callbacks else {}
        more["default_root_dir"] = str(tmp_path)
        trainer = instantiate(cfg.trainer, precision="32-true", **PLAIN, **more)
        return method, data, trainer

    return made


def state(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(x, second[name]) for name, x in first.items())


# What a batch trains


class Steps(pl.Callback):
    """What every update did to heads, their optimizer's state, and the trunk."""

    def __init__(self):
        self.seen = []

    def snapshot(self, trainer, method):
        found = {"trunk": state(method.backbone)}
        for name, task in method.tasks.items():
            found[name] = state(task)
            for key, p in task.named_parameters():
                for optimizer in trainer.optimizers:
                    for what, x in optimizer.state.get(p, {}).items():
                        found[name][f"{key} {what}"] = torch.as_tensor(x).clone()
        return found

    def on_train_batch_start(self, trainer, method, batch, batch_idx):
        self.before = self.snapshot(trainer, method)

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):
        after = self.snapshot(trainer, method)
        moved = {n for n in after if after[n].keys() != self.before[n].keys()}
        moved |= {n for n in after if n not in moved and not same(after[n], self.before[n])}
        self.seen.append((batch["step"], batch.get("task"), moved))


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_an_inactive_head_and_its_optimizer_state_stay_untouched(pair, optim):
    """With decay and momentum, which would move a head whose gradients are 0 instead of None."""
    steps = Steps()
    chosen = [f"optim@method.optim={optim}", "method.optim.weight_decay=0.1"]
    chosen += ["method.optim.decay_all=true"]
    method, data, trainer = pair("rotation", "jigsaw", optim=chosen, callbacks=[steps])
    trainer.fit(method, data)
    assert steps.seen == [
        (step, name, {"trunk", name}) for step, name in enumerate(["rotation", "jigsaw"] * 4)
    ]
    if optim == "adamw":
        (optimizer,) = trainer.optimizers
        counts = [optimizer.state[t.head.weight]["step"].item() for t in method.tasks.values()]
        assert counts == [4, 4]
        assert optimizer.state[method.backbone.conv1.weight]["step"] == 8


def test_the_learning_rate_moves_by_updates_of_any_task(pair):
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fixed = ["method.optim.schedule=cosine", "method.optim.warmup=0.0"]
    method, data, trainer = pair("rotation", "jigsaw", optim=fixed, callbacks=[Rates()])
    trainer.fit(method, data)
    base = method.optim.lr * 16 / 256
    shares = [method.optim.factor((k + 1) / 8) for k in range(7)]
    assert rates[:7] == pytest.approx([base * s for s in shares])
    assert len(set(rates)) == 8


@pytest.mark.parametrize("schedule", ["round_robin", "summed"])
@pytest.mark.parametrize("norm", ["shared", "per_task"])
def test_with_one_task_the_run_is_that_of_the_single_method(tiny, pair, schedule, norm):
    alone, data, trainer = tiny("rotation")
    losses = {"alone": [], "one": []}
    alone.on_train_batch_end = lambda out, *_: losses["alone"].append(out["loss"].item())
    trainer.fit(alone, data)
    method, data, trainer = pair("rotation", schedule=schedule, norm=norm)
    method.on_train_batch_end = lambda out, *_: losses["one"].append(out["loss"].item())
    trainer.fit(method, data)
    assert losses["one"] == losses["alone"]
    assert len(losses["one"]) == 8
    assert same(state(alone.backbone), state(method.backbone))
    assert same(state(alone.head), state(method.tasks["rotation"].head))
    assert not [key for key in method.state_dict() if key.startswith("tasks.rotation.backbone")]


def gradients(method, batch):
    method.zero_grad()
    sum(method.loss(batch).values()).backward()
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def first_batch(method, data):
    """The first batch, cut and augmented, for a method without a trainer."""
    data.setup("fit")
    method.prepare(data.count, len(data.classes))
    method.note = lambda name, value: None
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    return method.augment(batch, Draws(0, "augment", 0, rows=len(batch["index"])))


def test_the_joint_gradient_is_the_weighted_sum_of_the_tasks(pair):
    weights = {"rotation": 2.0, "jigsaw": 0.25}
    method, data, _ = pair("rotation", "jigsaw", schedule="summed", weights=weights)
    batch = first_batch(method, data)
    joint = gradients(method, batch)
    each = {
        name: gradients(method, {**part, "task": name}) for name, part in batch["tasks"].items()
    }
    assert list(each) == ["rotation", "jigsaw"]
    for name, grad in joint.items():
        parts = [found[name] for found in each.values() if name in found]
        assert len(parts) == (2 if name.startswith("backbone") else 1), name
        torch.testing.assert_close(grad, sum(parts), rtol=1e-4, atol=1e-6)
    task = method.tasks["rotation"]
    task.note = lambda name, value: None
    task.zero_grad(), method.zero_grad()
    task.loss(batch["tasks"]["rotation"])["rotation"].backward()  # without a weight
    for name, p in method.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(each["rotation"][name], 2 * p.grad, rtol=1e-4, atol=1e-6)


def test_a_summed_run_trains_all_heads_at_every_step(pair):
    steps = Steps()
    method, data, trainer = pair("rotation", "jigsaw", schedule="summed", callbacks=[steps])
    trainer.fit(method, data)
    assert [moved for _, _, moved in steps.seen] == [{"trunk", "rotation", "jigsaw"}] * 8


@pytest.mark.parametrize("schedule", ["round_robin", "summed"])
def test_accumulated_batches_of_different_tasks_are_one_update(pair, schedule):
    steps = Steps()
    lines = ["trainer.accumulate_grad_batches=2"]
    method, data, trainer = pair(
        "rotation", "jigsaw", schedule=schedule, lines=lines, callbacks=[steps]
    )
    called = []
    method.tasks["jigsaw"].after_step = lambda: called.append("jigsaw")
    method.tasks["rotation"].after_step = lambda: called.append("rotation")
    trainer.fit(method, data)
    heads = [moved & {"rotation", "jigsaw"} for _, _, moved in steps.seen]
    assert heads[1::2] == [{"rotation", "jigsaw"}] * 4
    assert called == ["jigsaw", "rotation"] * 4


def test_tasks_are_told_of_updates_after_their_batches_only(pair):
    method, data, trainer = pair(
        "rotation", "jigsaw", callbacks=[HeldOut(every_n_epochs=1, limit=32)]
    )
    called = []
    for name, task in method.tasks.items():
        task.after_step = lambda name=name: called.append(name)
    trainer.fit(method, data)
    assert called == ["rotation", "jigsaw"] * 4


class Asks(Method):
    """A task that looks at everything a method may know of its run."""

    def __init__(self, backbone, augment, optim):
        super().__init__(backbone, augment, optim)
        self.head, self.told = nn.Linear(self.feature_dim, 1), []

    def prepare(self, count, classes):
        self.count = count

    def loss(self, batch):
        self.told.append((self.seed, self.step, self.progress, self.global_step))
        self.note("mean", batch["views"][0].mean())
        h = self.backbone(batch["views"][0])
        self.watch(features=h)
        return {"first": self.head(h).mean(), "second": 2 * self.head(h).mean()}


def test_tasks_know_the_run(pair, compose, tmp_path):
    method, data, trainer = pair("rotation", "jigsaw")
    augment = method.tasks["rotation"].augment.base
    rotation = partial(Rotation, augment=method.tasks["rotation"].augment)
    asks = partial(Asks, augment=augment)
    method = MultiTask(
        method.backbone, method.optim, tasks={"rotation": rotation, "jigsaw": asks},
        weights={"jigsaw": 3.0},
    )  # fmt: skip
    data.decode.tasks["jigsaw"] = data.decode.tasks["rotation"]
    logged = []
    method.log = lambda name, *args, **kwargs: logged.append(name)
    method.log_dict = lambda given, **kwargs: logged.extend(given)
    trainer.fit(method, data)
    task = method.tasks["jigsaw"]
    assert task.told == [(0, k, k / 8, k) for k in (1, 3, 5, 7)]
    assert task.count == 64
    assert {"train/jigsaw/first", "train/jigsaw/second", "train/jigsaw/mean"} <= set(logged)
    assert {"train/rotation", "train/rotation/accuracy"} <= set(logged)
    assert method.seen["features"].shape == (16, method.backbone.dim)
    batch = {"task": "jigsaw", "views": [torch.randn(4, 3, 28, 28)]}
    terms = method.loss(batch)
    ratio = terms["jigsaw/first"] / task.head(method.seen["features"]).mean()
    assert ratio.item() == pytest.approx(3.0, rel=1e-4)


# Any set of tasks

SMALL_TASKS = {  # what makes a task small, below method.tasks.NAME, and its crops
    "relative_position": (["hidden=[8]", "augment.cut.size=8"], ["size=27"]),
    "rotation": ([], []),
    "colorization": (["width=8", "grey=null"], []),
    "diverse_colorization": (
        [*("vae.size=8", "vae.dim=4", "vae.width=4", "mixture.width=8", "mixture.grid=1")],
        [],
    ),
    "inpainting": (["decoder.widths=[8]", "decoder.side=2", "decoder.up=resize"], []),
    "inpainting_adversarial": (
        [
            *("decoder.widths=[8]", "decoder.side=2", "decoder.up=resize", "decoder.units=8"),
            *("discriminator.side=14", "discriminator.width=4", "augment.overlap=1"),
        ],
        [],
    ),
    "denoising_autoencoder": (["decoder.widths=[8, 8, 8]", "decoder.side=2"], []),
    "jigsaw": (
        ["dim=8", "augment.permutations=5", "augment.tile=8"],
        ["size=27", "resize=28"],
    ),
    "cpc": (
        [*("width=8", "blocks=1", "steps=1", "skip=1"), "augment.size=8", "augment.stride=4"],
        ["size=16", "resize=18"],
    ),
    "mae": (["dim=16", "depth=1", "heads=2"], []),
}
SMALL_TASKS["cpc_v2"] = SMALL_TASKS["cpc"]
ON_RESNETS = [name for name in SMALL_TASKS if name != "mae"]
BY_THEMSELVES = ["diverse_colorization", "jigsaw", "inpainting_adversarial"]  # but jigsaw


def set_of(*names, schedule="round_robin"):
    """Overrides of a small run of these tasks."""
    lines = [x for x in SMALL if not x.startswith("data.limit")]
    lines += ["method=multitask", f"task@method.tasks=[{','.join(names)}]", "data.limit=48"]
    lines += [f"decode.schedule={schedule}", "method.optim.weight_decay=0.1"]
    lines += ["method.optim.warmup=0"]  # the first update would have no rate
    for name in names:
        method, crops = SMALL_TASKS[name]
        lines += [f"method.tasks.{name}.{line}" for line in method]
        lines += [f"decode.tasks.{name}.{line}" for line in crops]
    return lines


@pytest.fixture
def chosen(compose, tmp_path):
    """A function: names of tasks, more overrides -> (method, data, trainer)."""

    def made(*names, schedule="round_robin", more=(), callbacks=(), steps=None):
        own = any(line.startswith("backbone=") for line in more)  # and not a ResNet's width
        lines = set_of(*names, schedule=schedule)
        cfg = compose(*(x for x in lines if not (own and x.startswith("backbone"))), *more)
        pl.seed_everything(0, workers=True, verbose=False)
        method, data = instantiate(cfg.method), instantiate(cfg.data)
        length = {"max_epochs": -1, "max_steps": steps} if steps else {}
        return (
            method,
            data,
            instantiate(
                cfg.trainer,
                precision="32-true",
                callbacks=list(callbacks),
                default_root_dir=str(tmp_path),
                **PLAIN,
                **length,
            ),
        )

    return made


@pytest.mark.parametrize(
    ("names", "more"),
    [
        (ON_RESNETS, ()),
        (["mae", *ON_RESNETS], ["backbone=vit_narrow_small_image"]),
    ],
    ids=["resnet", "vit"],
)
@pytest.mark.parametrize("schedule", ["round_robin", "summed"])
def test_any_set_of_pretext_tasks_shares_a_backbone(chosen, names, more, schedule):
    """Each batch trains its tasks' heads and the trunk, and leaves other heads alone."""
    steps, losses = Steps(), []
    lines = [*more, "backbone.depth=1"] if more else []
    count = len(names) + 1 if schedule == "round_robin" else 2
    method, data, trainer = chosen(
        *names, schedule=schedule, more=lines, callbacks=[steps], steps=count
    )
    method.on_train_batch_end = lambda out, *_: losses.append(out["loss"])
    trainer.fit(method, data)
    assert trainer.global_step == len(steps.seen) == count
    assert torch.stack(losses).isfinite().all()
    turns = [[name] for name in [*names, names[0]]] if schedule == "round_robin" else [names] * 2
    assert [moved for _, _, moved in steps.seen] == [{"trunk", *turn} for turn in turns]


def test_tasks_that_step_and_begin_epochs_by_themselves_resume_exactly(chosen, tmp_path):
    """An adversary's optimizer and a VAE's axes come from the checkpoint, in mid-epoch too."""
    whole, data, first = chosen(*BY_THEMSELVES, steps=7)
    first.fit(whole, data)
    part, data, trainer = chosen(*BY_THEMSELVES, steps=7)

    def stop(out, batch, batch_idx):
        if trainer.global_step == 4:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            raise KeyboardInterrupt

    part.on_train_batch_end = stop
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(part, data)
    resumed, data, second = chosen(*BY_THEMSELVES, steps=7)
    resumed.tasks["diverse_colorization"].vae.learn_axes = None  # nor are axes found again
    second.fit(resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(state(whole), state(resumed))
    assert len(first.optimizers) == 2
    assert saved(first) == saved(second)
    assert whole.tasks["diverse_colorization"].vae.known


@pytest.mark.parametrize("norm", ["shared", "per_task"])
def test_a_task_with_an_adversary_alone_is_its_method(tiny, pair, norm):
    """Whose generator learns ten times as fast as the discriminator."""
    name, own = "inpainting_adversarial", "method.optim.lr=0.0001"
    alone, data, trainer = tiny(name, own)
    trainer.fit(alone, data)
    method, data, trainer = pair(name, optim=["method.optim.lr=0.001"], norm=norm)
    trainer.fit(method, data)
    rates = [o.param_groups[0]["initial_lr"] for o in trainer.optimizers]
    assert rates[0] == pytest.approx(10 * rates[1])
    for part in ("backbone", "decoder", "discriminator"):
        found = getattr(method if part == "backbone" else method.tasks[name], part)
        for key, value in state(getattr(alone, part)).items():
            torch.testing.assert_close(state(found)[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_two_adversaries_have_optimizers_of_their_own(chosen, compose):
    cfg = compose(*set_of("inpainting_adversarial"))
    task = instantiate(cfg.method.tasks.inpainting_adversarial)
    other = instantiate(cfg.method.tasks.inpainting_adversarial)
    backbone, optim = instantiate(cfg.backbone), instantiate(cfg.method.optim)
    method = MultiTask(backbone, optim, tasks={"a": task, "b": other})
    made = method.optim(method, batch_size=8, steps=4, steps_per_epoch=2)
    held = [{p for g in m["optimizer"].param_groups for p in g["params"]} for m in made]
    assert held[1:] == [set(t.discriminator.parameters()) for t in method.tasks.values()]
    assert held[0] == set(method.parameters()) - held[1] - held[2]
    assert [t.turn for t in method.tasks.values()] == [1, 2]
    assert all(p.requires_grad for p in method.parameters())


def test_what_an_adversary_cannot_do_is_refused(chosen):
    name = "inpainting_adversarial"
    with pytest.raises(Exception, match="clips nothing, got clip_each=3"):
        chosen(name, more=["method.optim.clip_each=3.0"])
    method, data, trainer = chosen(name, more=["trainer.accumulate_grad_batches=2"])
    with pytest.raises(MisconfigurationException, match="not supported for manual optimization"):
        trainer.fit(method, data)
    with pytest.raises(Exception, match="ResNet is no vision transformer of timm"):
        chosen("mae", "rotation")


def test_one_task_may_choose_the_order_of_images():
    order = torch.arange(4)
    assert the_order({"a": None, "b": None}) is None
    assert the_order({"a": None, "b": order}) is order
    with pytest.raises(ValueError, match="a and c choose the order of images each: leave one"):
        the_order({"a": order, "b": None, "c": order})


def test_an_epoch_begins_for_every_task_with_its_norms(pair):
    method, _, _ = pair("rotation", "jigsaw", norm="per_task")
    seen = {}
    for name, task in method.tasks.items():
        task.begin_epoch = lambda epoch, name=name: seen.update({name: method.norms.own()[0]})
    assert method.begin_epoch(3) is None
    assert seen == {
        "rotation": method.norms.own()[0],
        "jigsaw": method.norms.others["jigsaw"][0],
    }


def test_tasks_have_the_settings_of_their_methods(compose):
    """But for those that their own files name."""
    names = [*ON_RESNETS, "mae"]
    tasks = compose("method=multitask", f"task@method.tasks=[{','.join(names)}]").method.tasks
    differs = {"relative_position": {"hidden", "affine", "reduction"}}
    for name, task in tasks.items():
        method = OmegaConf.load(CONF / f"method/{name}.yaml")
        given = set(task) - {"augment", "_partial_"} - differs.get(name, set())
        assert {key: task[key] for key in given} == {key: method[key] for key in given}, name
        defaults = inspect.signature(_locate(task._target_)).parameters
        for key in set(method) - set(task) - {"backbone", "optim", "defaults"}:
            assert method[key] == defaults[key].default, f"{name}: {key}"


# Norms and colours


def test_tasks_may_have_norms_of_their_own():
    torch.manual_seed(0)
    net = ResNet(depth=18, width=16, stem="small")
    norms = TaskNorms(net, ["a", "b", "c"])
    before = state(net)
    assert len(norms.others["b"]) == len(norms.own()) == 20
    x = torch.randn(4, 3, 16, 16)
    with norms.of("b"):
        assert norms.own() == list(norms.others["b"])
        net(x).sum().backward()
    assert same(before, state(net))  # the first task's statistics have not moved
    assert all(m.weight.grad is None for m in norms.own())
    assert all(m.weight.grad is not None for m in norms.others["b"])
    assert all(m.num_batches_tracked == 1 for m in norms.others["b"])
    assert all(m.num_batches_tracked == 0 for m in norms.others["c"])
    with pytest.raises(KeyError), norms.of("b"):
        raise KeyError
    assert norms.own() == [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with norms.of("a"):
        net(x)
    assert all(m.num_batches_tracked == 1 for m in norms.own())
    assert len(norms.all_parameters()) == 3 * 40
    assert not TaskNorms(net, ["a"]).all_parameters()


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Linear(3, 4), "Linear has no batch norm"),
        (ResNet(depth=18, width=16, checkpoint_activations=True), "ResNet recomputes activations"),
    ],
)
def test_networks_without_norms_to_swap_are_refused(net, said):
    with pytest.raises(ValueError, match=said):
        TaskNorms(net, ["a", "b"])


def test_a_run_with_norms_of_each_task_saves_the_backbone_as_any_other(pair):
    method, data, trainer = pair("rotation", "jigsaw", norm="per_task")
    names = list(state(method.backbone))
    trainer.fit(method, data)
    assert names == list(ResNet(depth=18, width=16, stem="small").state_dict())
    first = method.norms.own()[0]
    second = method.norms.others["jigsaw"][0]
    assert first.num_batches_tracked == second.num_batches_tracked == 4
    assert not torch.equal(first.running_mean, second.running_mean)
    assert not torch.equal(first.weight, second.weight)


def test_grey_views_have_one_channel_thrice():
    x = torch.rand(3, 3, 8, 8)
    views = normalize(x).contiguous(memory_format=torch.channels_last)
    grey = denormalize(Grey()(views))
    expected = Grayscale(p=1.0)(x.clone(), Draws(0, rows=3))
    torch.testing.assert_close(grey, expected, rtol=1e-3, atol=1e-3)
    assert Grey()(views).is_contiguous(memory_format=torch.channels_last)
    tiles = normalize(torch.rand(2, 9, 3, 4, 4))
    assert (Grey()(tiles).mul(1).shape) == tiles.shape


def test_harmonised_tasks_see_no_colours(pair):
    method, data, _ = pair("rotation", "jigsaw", schedule="summed", grey=True)
    data.on_after_batch_transfer = lambda batch, _: colourful(data, batch)
    batch = first_batch(method, data)
    for part in [batch, *batch["tasks"].values()]:
        pixels = denormalize(part["views"][0])
        torch.testing.assert_close(pixels[..., 0, :, :], pixels[..., 2, :, :])
        assert pixels.std() > 0.01


def colourful(data, batch):
    (images,) = batch["crops"]
    generator = torch.Generator().manual_seed(0)
    given = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    return Images.on_after_batch_transfer(data, {**batch, "crops": [given]}, 0)


# Whose batch it is


def test_turns_are_a_function_of_the_step():
    tasks = Tasks(tasks={"a": Crops(size=4), "b": Crops(size=6, count=2), "c": Crops(size=8)})
    assert [list(by_task(tasks, k)) for k in range(5)] == [["a"], ["b"], ["c"], ["a"], ["b"]]
    assert list(by_task(tasks)) == ["a", "b", "c"]
    together = Tasks(tasks=tasks.tasks, schedule="summed")
    assert list(by_task(together, 7)) == ["a", "b", "c"]
    plain = Crops(size=4)
    assert by_task(plain, 3) == {"": plain}
    images = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    sizes = [x.shape[-1] for x in tasks.batched(images, Draws(0, rows=2))]
    assert sizes == [4, 6, 6, 8]
    assert "b" in repr(tasks)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": {"a": None}, "schedule": "random"}, "round_robin or summed, got 'random'"),
    ],
)
def test_wrong_turns_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        Tasks(**options)


def images(root, schedule="round_robin", **changes):
    decodes = {"a": Crops(size=12, count=2), "b": Crops(size=8), "c": Crops(size=12, count=2)}
    given = {"batch_size": 4, "workers": 0, "tier": "folder", "size": 20, **changes}
    return Images(
        root=str(root),
        layout=Folder(test_share=0.2),
        decode=decodes if schedule == "round_robin" else Tasks(tasks=decodes, schedule=schedule),
        eval_decode=Center(size=12),
        **given,
    )


def read(data, position=0):
    data.setup("fit")
    data._position = lambda: position
    return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def shapes(batch):
    return [tuple(crop.shape) for crop in batch["crops"]]


BIG, LITTLE = [(4, 3, 12, 12)] * 2, [(4, 3, 8, 8)]


@pytest.mark.parametrize(("tier", "workers"), [("memory", 0), ("folder", 0), ("folder", 2)])
def test_batches_take_turns_in_both_tiers_and_after_a_stop(tree, tier, workers):  # noqa: F811
    whole = read(images(tree, tier=tier, workers=workers))
    assert [b["task"] for b in whole] == ["a", "b", "c", "a"]
    assert [shapes(b) for b in whole] == [BIG, LITTLE, BIG, BIG]
    rest = read(images(tree, tier=tier, workers=0), position=2)
    assert [(b["task"], b["step"]) for b in rest] == [("c", 2), ("a", 3), ("b", 4), ("c", 5)]
    for first, second in zip(whole[2:], rest, strict=False):
        assert first["index"].equal(second["index"])
        assert all(torch.equal(x, y) for x, y in zip(first["crops"], second["crops"], strict=True))
    single = images(tree, tier=tier)
    single.decode = Crops(size=12, count=2)
    for batch, other in zip(whole, read(single), strict=True):  # the single task's crops
        if batch["task"] != "b":
            assert all(map(torch.equal, batch["crops"], other["crops"]))


@pytest.mark.parametrize(("tier", "workers"), [("memory", 0), ("folder", 2)])
def test_a_summed_batch_has_every_tasks_crops(tree, tier, workers):  # noqa: F811
    turns = read(images(tree, tier=tier))
    together = read(images(tree, "summed", tier=tier, workers=workers))
    for turn, batch in zip(turns, together, strict=True):
        assert "task" not in batch
        assert [shapes(part) for part in batch["tasks"].values()] == [BIG, LITTLE, BIG]
        own = batch["tasks"][turn["task"]]["crops"]
        assert all(torch.equal(x, y) for x, y in zip(turn["crops"], own, strict=True))


def test_data_without_tasks_and_other_names_are_refused(pair, tiny):
    method, *_ = pair("rotation")
    _, data, trainer = tiny("rotation")
    with pytest.raises(ValueError, match=r"MultiTask needs \['task'\] in every batch"):
        trainer.fit(method, data)
    method, data, trainer = pair("rotation", "jigsaw")
    del data.decode.tasks["jigsaw"]
    with pytest.raises(ValueError, match=r"decode.tasks=\['rotation'\] and method.tasks=\['rot"):
        trainer.fit(method, data)


# Held-out images


def test_every_task_is_measured_and_shown(pair, tmp_path):
    method, data, trainer = pair("rotation", "jigsaw", callbacks=[HeldOut(limit=32, pictures=2)])
    for name, task in method.tasks.items():
        task.pictures = lambda batch, name=name: {name: batch["views"][0][:2, :3].flatten(0, -4)}
    plain = pair("rotation", "jigsaw")
    plain[2].fit(*plain[:2])
    held = list(data.unseen(32))
    assert [b["task"] for b in held] == ["rotation", "jigsaw"] * 2
    assert held[0]["index"].equal(held[1]["index"])
    from unlabeled.callbacks import held_out

    found, own = {}, held_out.record
    held_out.record = lambda trainer, values: found.update(values)
    try:
        trainer.fit(method, data)
    finally:
        held_out.record = own
    assert {f"held_out/{x}" for x in ("rotation", "jigsaw", "rotation/accuracy")} <= set(found)
    assert "held_out/jigsaw/accuracy" in found
    with np.load(tmp_path / "figures/samples.npz", allow_pickle=False) as file:
        assert file["titles"].tolist() == ["rotation: rotation", "jigsaw: jigsaw"]
    assert same(state(plain[0]), state(method))  # and nothing was learned from it


# What is refused


class Clusters(Rotation):
    pretext = False

    def begin_epoch(self, epoch):
        return torch.arange(4)


class Manual(Rotation):
    def __init__(self, backbone, augment, optim):
        super().__init__(backbone, augment, optim)
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": {"c": 1.0}}, r"weights=\{'c': 1.0\} must be positive, for some of tasks=\['a"),
        ({"weights": {"a": 0.0}}, "must be positive"),
        ({"tasks": {}}, r"for some of tasks=\[\]"),
        ({"norm": "each"}, "norm must be shared or per_task, got 'each'"),
        ({"tasks": {"a": partial(Manual, augment=None)}}, "a steps by itself, and a task may"),
        ({"tasks": {"b": partial(Clusters, augment=None)}}, "b has phases and is no pretext task"),
    ],
)
def test_bad_values_are_named(options, said):
    given = {"tasks": {"a": partial(Rotation, augment=None)}, **options}
    with pytest.raises(ValueError, match=said):
        MultiTask(ResNet(depth=18, width=16), None, **given)


def test_mistakes_in_nested_tasks_are_found(compose):
    cfg = compose("method=multitask")
    assert mistakes(cfg) == []
    cfg.method.tasks.colorization.width = "wide"
    cfg.method.tasks.relative_position._target_ = "unlabeled.methods.rotatio.Rotation"
    OmegaConf.update(cfg, "decode.tasks.colorization.sice", 3, force_add=True)
    found = " ".join(mistakes(cfg))
    assert "`method.tasks.colorization.width=wide`: expected an integer" in found
    assert "did you mean unlabeled.methods.rotation" in found
    assert "did you mean `decode.tasks.colorization.size`" in found


# Processes


class Half(nn.Module):
    """Gives this process's rows of every global batch of 8."""

    def forward(self, batch, draws):
        generator = torch.Generator().manual_seed(draws.key[-1])
        x = torch.randn(8, 3, 8, 8, generator=generator)
        y = torch.randint(4, (8,), generator=generator)
        return {**batch, "views": [dist.mine(x)], "target": dist.mine(y)}


class Map(Rotation):
    """Rotation with a convolution, whose gradient lies in memory as the views do."""

    def __init__(self, backbone, augment, optim):
        super().__init__(backbone, augment, optim)
        self.conv = nn.Conv2d(self.feature_dim, 4, 3, padding=1)

    def loss(self, batch):
        h = list(self.backbone.stages(batch["views"][0]).values())[-1]
        self.watch(features=h.mean((2, 3)))
        return {"map": nn.functional.cross_entropy(self.conv(h).mean((2, 3)), batch["target"])}


def trained(norm="per_task"):
    """Weights after some updates of two tasks, by torch's DDP where there are processes."""
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    # Statistics of the global batch, so that two processes can equal one.
    backbone = ResNet(depth=18, width=16, stem="small", norm="sync").double()
    tasks = {"a": partial(Rotation, augment=Half()), "b": partial(Map, augment=Half())}
    method = MultiTask(backbone, None, tasks=tasks, norm=norm).double()
    method.note = lambda name, value: None

    class Data:
        gives, seed, count, classes = method.needs, 0, 8, ()
        decode = Tasks(tasks=dict.fromkeys("ab", Crops(size=8)))

    class Trainer:
        datamodule = Data

    method._trainer = Trainer
    method.setup("fit")
    method._total_steps = 6

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.method = method

        def forward(self, task, step):
            method.step = step
            batch = method.augment({"task": task, "index": torch.arange(4)}, Draws(0, step))
            batch["views"] = [x.double() for x in batch["views"]]
            return sum(method.loss(batch).values())

    net = Step()
    if dist.world_size() > 1:
        ignored = [f"method.{name}" for name in method._ddp_params_and_buffers_to_ignore]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ignored)
        net = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(6):
        optimizer.zero_grad()
        net("ab"[step % 2], step).backward()
        grads = [p for task in method.tasks.values() for p in task.parameters()]
        method.on_before_optimizer_step(optimizer)
        assert sum(p.grad is None for p in grads) == 4
        optimizer.step()
        method.after_step()
    return {k: v for k, v in method.state_dict().items() if "num_batches" not in k}


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_two_processes_train_as_one_does():
    alone = trained()
    for found in on_processes(2, trained):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, msg=name)


def trained_tasks():
    """A run by Lightning, in double precision, of tasks that step and begin by themselves."""
    names = ["diverse_colorization", "inpainting_adversarial", "inpainting"]
    lines = [*set_of(*names), "method.optim.weight_decay=0", *RUN, "data.batch_size=6"]
    norms = ["method.tasks.inpainting.decoder.norm=sync"]
    norms += ["method.tasks.inpainting_adversarial.decoder.norm=sync"]
    return run_of([*lines, *norms, "trainer.max_epochs=2"])


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_two_processes_train_tasks_that_step_and_begin_by_themselves_as_one_does():
    alone = trained_tasks()
    assert len(alone["losses"]) == 8
    assert not alone["still"]
    for found in on_processes(2, trained_tasks):
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
        for name, value in alone["state"].items():
            close = dict(rtol=1e-7, atol=1e-8, msg=lambda said, name=name: f"{name}: {said}")
            torch.testing.assert_close(found["state"][name], value, **close)


def test_augmentations_of_tasks_do_not_disturb_one_another():
    class Noise(nn.Module):
        def forward(self, batch, draws):
            return {**batch, "views": [draws.normal(2)], "target": draws.integers(9)}

    module = ByTask({"a": Noise(), "b": Noise()}, nn.Identity())
    assert not list(module.parameters())
    batch = {
        "index": torch.arange(3),
        "crops": [],
        "tasks": {"a": {"crops": []}, "b": {"crops": []}},
    }
    found = module(batch, Draws(0, rows=3))
    alone = module({"index": torch.arange(3), "task": "b"}, Draws(0, rows=3))
    assert torch.equal(found["tasks"]["b"]["target"], alone["target"])
    assert torch.equal(found["tasks"]["b"]["views"][0], alone["views"][0])
    assert found["views"] is found["tasks"]["a"]["views"]
