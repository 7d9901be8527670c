"""Weights in shards over processes, against one process that holds them whole."""

import os
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from conftest import CONF, small
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from processes import mean, on_processes
from pytorch_lightning.plugins.precision import DoublePrecision
from test_ddp import Losses, in_double
from torch.nn.modules.module import register_module_forward_pre_hook

from unlabeled.backbones import load
from unlabeled.callbacks.checkpoint import Checkpoint
from unlabeled.callbacks.chunks import Chunks
from unlabeled.dist import local, rank, world_size

pytestmark = [pytest.mark.ddp, pytest.mark.xdist_group("ddp")]

RUN = [
    *("backbone=regnet_y_tiny", "backbone.depth=4", "backbone.w_0=16", "backbone.group_width=8"),
    *("backbone.norm=group", "backbone.checkpoint_activations=true"),
    *("data.limit=24", "data.batch_size=12", "optim@method.optim=lars", "method.optim.lr=0.1"),
    *("method.optim.scaling=none", "method.optim.warmup=0", "trainer.gradient_clip_val=1.0"),
]


def composed(name, *more):
    lines = [x for x in small(name) if not x.startswith("backbone")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*lines, *RUN, *more])


def trained(folder, name, *more, resume=None, chunks=()):
    """Losses of a run of this process and those beside it, its weights, and what lies in memory."""
    sharded = world_size() > 1
    if sharded:
        os.environ["LOCAL_RANK"] = str(rank())  # so that Lightning starts no processes of its own
    cfg = composed(name, *(["trainer=fsdp", "trainer.accelerator=cpu"] if sharded else []), *more)
    pl.seed_everything(cfg.seed, verbose=False)
    method, data, losses = instantiate(cfg.method), instantiate(cfg.data), Losses()
    method.backbone_config = method.backbone.config
    trainer = instantiate(
        cfg.trainer,
        devices=world_size(),
        precision=None,
        plugins=[DoublePrecision()],  # no rounding for an error to hide behind
        max_epochs=2,
        limit_train_batches=2,
        callbacks=[losses, Checkpoint(folder=str(folder)), *chunks],
        logger=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
    )
    hook = register_module_forward_pre_hook(in_double)
    try:
        trainer.fit(method, data, ckpt_path=resume, weights_only=True)
    finally:
        hook.remove()
    held = sum(local(p).numel() for p in method.parameters())
    return {"losses": mean(torch.stack(losses.found)), "held": held}


def saved(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def same(found, expected, **tolerance):
    """Two checkpoints of the same update."""
    parts = [(found["state_dict"], expected["state_dict"])]
    for a, b in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
        assert a["param_groups"] == b["param_groups"]
        assert a["state"].keys() == b["state"].keys()
        parts += [(a["state"][i], b["state"][i]) for i in b["state"]]
    for a, b in parts:
        assert a.keys() == b.keys()
        for key, value in b.items():
            torch.testing.assert_close(a[key], value, msg=lambda s, k=key: f"{k}: {s}", **tolerance)
    assert found["global_step"] == expected["global_step"]


CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def a_life(folder):
    """Two epochs at once; and the second by who resumes from a checkpoint of either kind.

    One of them computes in chunks, too.
    """
    found = trained(folder / "two", "seer")
    trained(folder / "resumed", "seer", resume=folder / "two/last-1.ckpt")
    whole = folder / "one/last-1.ckpt"
    trained(folder / "taken_over", "seer", resume=whole, chunks=[Chunks(rows=5)])
    return found


def test_shards_learn_as_one_process_does_and_go_on_from_each_others_checkpoints(tmp_path):
    whole = trained(tmp_path / "one", "seer")
    for found in on_processes(2, partial(a_life, tmp_path)):
        torch.testing.assert_close(found["losses"], whole["losses"], rtol=1e-6, atol=1e-6)
        assert found["held"] < 0.55 * whole["held"]
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert one["global_step"] == 4
    same(two, one, **CLOSE)
    same(saved(tmp_path / "resumed"), two, rtol=0, atol=0)
    same(saved(tmp_path / "taken_over"), one, **CLOSE)
    trained(tmp_path / "back", "seer", resume=tmp_path / "two/last-1.ckpt")
    same(saved(tmp_path / "back"), one, **CLOSE)
    plain = load.checkpoint(str(tmp_path / "two/last.ckpt"))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, two["state_dict"][f"backbone.{key}"].to(value.dtype))


@pytest.mark.parametrize("name", ["deepcluster", "inpainting_adversarial", "multitask"])
def test_methods_that_need_whole_weights_refuse_shards(name, tiny):
    method, *_ = tiny(name)
    method._device_mesh = {"data_parallel": None}  # as the strategy sets it
    with pytest.raises(ValueError, match=f"{type(method).__name__}, unlike what trainer=fsdp"):
        method.configure_model()


def test_probes_of_whole_weights_refuse_shards(tiny):
    from unlabeled.callbacks.online import OnlineKNN
    from unlabeled.fsdp import FullyShard

    method, data, trainer = tiny("simclr", callbacks=[OnlineKNN()], strategy=FullyShard())
    data.setup("fit")
    with pytest.raises(ValueError, match="online_knn needs whole weights"):
        trainer.callbacks[0].setup(trainer, method, "fit")
