"""Whole runs in two and three processes against one."""

import csv
import json
import os
import subprocess
import sys
from functools import cache, partial

import pytest
import pytorch_lightning as pl
import torch
from conftest import CONF, METHODS, small
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from processes import mean, on_processes
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from unlabeled.callbacks.chunks import Chunks
from unlabeled.dist import SyncBatchNorm, rank, world_size
from unlabeled.parts.color_vae import ColorVAE
from unlabeled.parts.frozen import Frozen
from unlabeled.parts.map_head import MapHead
from unlabeled.parts.mixture import MixtureHead

pytestmark = [pytest.mark.ddp, pytest.mark.xdist_group("ddp")]

# Methods whose processes share something, in double precision: rounding grows tenfold with every
# update, and an error in a gradient must not hide behind it. No batch norm but over all processes.

RUN = [
    "backbone.norm=group",
    *("data.limit=24", "data.batch_size=12"),  # 2 epochs of 2 steps
    *("optim@method.optim=sgd", "method.optim.lr=0.02", "method.optim.scaling=none"),
    "method.optim.warmup=0",
]
BOTH = [
    f"backbone.{part}norm={norm}"
    for part, norm in (("video.", "group"), ("sound.network.", "group"), ("", "sync"))
]
OWN = {
    "avc": ["method.sound.norm=group"],
    **dict.fromkeys(("avid", "avid_cma"), BOTH),
    "denoising_autoencoder": ["method.decoder.norm=sync"],
    "inpainting": ["method.decoder.norm=sync"],
    "inpainting_adversarial": ["method.decoder.norm=sync"],
    "dino": ["method.norm=sync"],
    "jigsaw": ["method.norm=sync"],
    "multitask": ["method.tasks.relative_position.norm=sync"],
    "relative_position": ["method.norm=sync"],
    "deepcluster": ["method.pca=8"],  # of 24 images: whitening makes much of what is hardly there
    "moco": ["backbone.bn_splits=1"],
    "moco_v2": ["backbone.bn_splits=1"],
    "npid": ["method.norm=sync"],
    "pirl": ["method.norm=sync"],
    "pirl_jigsaw_rotation": ["method.norm=sync"],
    "pirl_mlp": ["method.norm=sync"],
    "pirl_rotation": ["method.norm=sync"],
}
STILL = {"mae": ["model.pos_embed"]}  # of its backbone: fixed sines
OWN_FILES = (  # one of each file in methods/
    *("avc", "avid", "avid_cma", "barlow_twins", "byol", "clusterfit", "cpc", "cpc_video"),
    *("deepcluster", "deepcluster_v2", "dino"),
    *("denoising_autoencoder", "distillation", "inpainting", "inpainting_adversarial"),
    *("moco", "npid", "odd_one_out", "pirl", "shuffle_and_learn", "simclr", "simsiam", "swav"),
    *("tracking", "vicreg", "videomae"),
    "moco in chunks",  # against one process that has none
)
ACROSS = ("clusterfit", "deepcluster_v2", "moco", "npid", "simclr")  # by what they exchange
OTHERS = (
    "cpc_v2",
    "demo",
    "moco_v2",
    "pirl_jigsaw_rotation",
    "pirl_mlp",
    "pirl_rotation",
    "seer",
    "supervised",
)
ALONE = (  # processes share their gradients only
    *("byol", "colorization", "diverse_colorization", "jigsaw", "mae", "multitask"),
    *("relative_position", "rotation"),
)


class Losses(pl.Callback):
    """The loss of every step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):
        self.found.append(outputs["loss"].detach().clone())


def in_double(module, given):
    return tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given
    )


def synced(method):
    """A method whose heads of colours, which have batch norm in any case, have that of all."""
    for head in method.modules():
        if isinstance(head, MapHead | ColorVAE | MixtureHead):
            for part in list(head.modules()):
                for name, norm in part.named_children():
                    if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                        setattr(part, name, SyncBatchNorm(norm.num_features))
    return method


def trained(name, source, teacher):
    """Losses of a run of this process and those beside it, and what it ends with."""
    name, _, divided = name.partition(" ")
    chunks = [Chunks(rows=5)] if divided and world_size() > 1 else []
    needs = {
        "clusterfit": [f"method.source.path={source}"],
        "distillation": [f"method.teacher.path={teacher}"],
    }
    other = name in ("mae", "videomae") or OWN.get(name) is BOTH  # a backbone without this choice
    run = [x for x in RUN if not (other and x.startswith("backbone.norm"))]
    lines = [*small(name), *needs.get(name, []), *run, *OWN.get(name, [])]
    found = run_of(lines, chunks)
    still = found.pop("still")
    assert still == STILL.get(name, []), f"{name}: {still}"
    return found


def run_of(lines, callbacks=()):
    """Losses of a small run with these overrides, weights at its end, and what did not move."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=lines)
    if world_size() > 1:
        os.environ["LOCAL_RANK"] = str(rank())  # so that Lightning starts no processes of its own
    shared = {"strategy": "ddp", "devices": world_size()} if world_size() > 1 else {}
    pl.seed_everything(cfg.seed, verbose=False)
    method, data, losses = synced(instantiate(cfg.method)), instantiate(cfg.data), Losses()
    trainer = instantiate(
        cfg.trainer,
        precision="64-true",
        callbacks=[losses, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **shared,
    )
    for part in vars(method).values():
        if isinstance(part, Frozen):
            part.network.double()
    first = {k: v.clone() for k, v in method.backbone.state_dict().items()}
    hook = register_module_forward_pre_hook(in_double)
    try:
        trainer.fit(method, data)
    finally:
        hook.remove()
    still = [k for k, v in method.backbone.state_dict().items() if torch.equal(v, first[k])]
    found = {"losses": mean(torch.stack(losses.found)), "state": dict(method.state_dict())}
    return {**found, "still": still}


def all_trained(names, source, teacher):
    return {name: trained(name, source, teacher) for name in names}


@pytest.fixture(scope="module")
def alone(source, teacher):
    return cache(lambda name: trained(name, source, teacher))


def test_no_method_is_forgotten():
    assert {name.partition(" ")[0] for name in (*OWN_FILES, *OTHERS, *ALONE)} == set(METHODS)


@pytest.mark.parametrize(
    ("world", "names"),
    [
        (2, OWN_FILES),
        (3, ACROSS),
        pytest.param(2, (*OTHERS, *ALONE), marks=pytest.mark.slow),
        pytest.param(
            3, tuple(sorted({*OWN_FILES, *OTHERS, *ALONE} - {*ACROSS})), marks=pytest.mark.slow
        ),
    ],
    ids=["2", "3", "2-others", "3-others"],
)
def test_every_method_learns_as_in_one_process(world, names, source, teacher, alone):
    """Step by step the same loss, in the end the same weights and memories."""
    everywhere = on_processes(world, partial(all_trained, names, source, teacher))
    for name in names:
        expected = alone(name)
        for found in everywhere:
            torch.testing.assert_close(  # losses are reported in single precision
                found[name]["losses"], expected["losses"], rtol=1e-6, atol=1e-6, msg=name
            )
            assert len(expected["losses"]) == 4
            for key, value in expected["state"].items():
                torch.testing.assert_close(
                    found[name]["state"][key],
                    value,
                    rtol=1e-7,
                    atol=1e-8,
                    msg=lambda said, place=f"{name}, {key}": f"{place}: {said}",
                )


# By the command line, which starts the other process itself, and evaluates.

COMMAND = [
    *("backbone.width=16", "backbone.norm=sync", "data.batch_size=16", "data.limit=64"),
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"),
    *(
        "trainer.max_epochs=1",
        "trainer.log_every_n_steps=1",
        "callbacks=none",
        "evals=knn",
        "optim@method.optim=sgd",
    ),
    "method.optim.lr=0.01",  # small: rounding must not grow over the four updates
]


def test_a_command_in_two_processes_does_what_it_does_in_one(tmp_path):
    states, losses, scores = [], [], []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        lines = ["method=simclr", "method.hidden=32", f"trainer.devices={devices}", *COMMAND]
        command = [sys.executable, "-m", "unlabeled.train", *lines, f"hydra.run.dir={out}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        checkpoint = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 4
        states.append(checkpoint["state_dict"])
        scores.append(json.loads((out / "scores.json").read_text()))
        with (out / "metrics.csv").open() as file:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(file)])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    first, second = states
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=1e-2, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
        )
    assert scores[0].keys() == scores[1].keys()
