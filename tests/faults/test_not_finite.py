"""Losses that are not numbers: no checkpoint holds their traces, and training stops or goes on."""

import csv

import pytest
import pytorch_lightning as pl
import torch
from test_runs import TINY, unlabeled
from torch import nn
from torch.utils.data import DataLoader

from unlabeled.callbacks.checkpoint import Checkpoint
from unlabeled.callbacks.finite import Finite
from unlabeled.callbacks.metrics import MetricsCSV

BATCHES = 6


class Module(pl.LightningModule):
    """Batch norm, a memory, and a loss that is not finite at chosen batches."""

    def __init__(self, bad=(), kind="input", optimizer="adamw"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.register_buffer("memory", torch.zeros(8, 2))
        self.bad, self.kind, self.optimizer = set(bad), kind, optimizer
        self.states = []

    def training_step(self, batch, batch_idx):
        x, step = batch
        poisoned = int(step) in self.bad
        if poisoned and self.kind == "input":
            x = x / 0
        z = self.net(x)
        self.memory.copy_(z.detach())
        loss = z.square().mean()
        if poisoned and self.kind == "gradient":  # of a root at zero: infinite times zero
            loss = loss + (z - z).abs().sum().sqrt() * 0
        return loss * float("nan") if poisoned and self.kind == "loss" else loss

    def on_train_batch_end(self, *args):
        self.states.append({k: v.clone() for k, v in self.state_dict().items()})

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), 0.1)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, i):
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(i)), torch.tensor(i)


def fit(folder, module, *, resume=None, **finite):
    torch.manual_seed(0)
    for layer in (module.net[0], module.net[2]):
        layer.reset_parameters()
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=1,
        callbacks=[Checkpoint(every_n_steps=1), Finite(**finite)],
        logger=MetricsCSV(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Data(), batch_size=None), ckpt_path=resume, weights_only=True)
    return trainer


def saved(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def finite(state):
    return all(x.isfinite().all() for x in state.values())


@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
def test_it_stops_before_a_checkpoint_is_spoiled(tmp_path, kind):
    with pytest.raises(FloatingPointError, match=r"checkpoints/last\.ckpt holds the state before"):
        fit(tmp_path, Module(bad={3}, kind=kind))
    content = saved(tmp_path)
    assert content["global_step"] == 3
    assert finite(content["state_dict"])


def test_the_host_finds_out_at_the_next_look(tmp_path):
    trainer = plain(tmp_path, callbacks=[Finite(every_n_steps=4)])
    with pytest.raises(FloatingPointError, match="update 4"):
        trainer.fit(Module(bad={1}), DataLoader(Data(), batch_size=None))


def plain(folder, **settings):
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
@pytest.mark.parametrize("bad", [{0}, {2}, {2, 3}])
def test_skipping_leaves_no_trace_of_an_update(tmp_path, kind, bad, optimizer):
    module = Module(bad=bad, kind=kind, optimizer=optimizer)
    trainer = fit(tmp_path, module, policy="skip")
    assert trainer.global_step == BATCHES
    assert all(map(finite, module.states))
    for step in bad - {0}:
        before, after = module.states[step - 1], module.states[step]
        assert all(torch.equal(before[k], after[k]) for k in before)
    assert not torch.equal(module.states[-1]["net.0.weight"], module.states[0]["net.0.weight"])
    content = saved(tmp_path)
    (state,) = (s for name, s in content["callbacks"].items() if "Finite" in name)
    assert state == {"skipped": len(bad)}
    for x in torch.utils._pytree.tree_leaves(content["optimizer_states"]):
        assert not isinstance(x, torch.Tensor) or x.isfinite().all()


def test_skipping_has_an_end(tmp_path):
    with pytest.raises(FloatingPointError, match="3 updates had to be left out, more than most=2"):
        fit(tmp_path, Module(bad={1, 2, 4}), policy="skip", most=2)
    assert finite(saved(tmp_path)["state_dict"])


def test_it_changes_nothing_while_all_is_well(tmp_path):
    states = []
    for policy in ("stop", "skip"):
        module = Module()
        fit(tmp_path / policy, module, policy=policy)
        states.append(module.states[-1])
    module = Module()
    torch.manual_seed(0)
    for layer in (module.net[0], module.net[2]):
        layer.reset_parameters()
    plain(tmp_path).fit(module, DataLoader(Data(), batch_size=None))
    for state in states:
        assert all(torch.equal(state[k], x) for k, x in module.states[-1].items())


@pytest.mark.parametrize("given", [{"policy": "hope"}, {"most": 0}, {"every_n_steps": 0}])
def test_wrong_settings_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Finite(**given)


def test_a_run_that_diverges_says_so_and_can_go_on(tmp_path):
    lines = [*TINY, "evals=none", "callbacks=none", f"hydra.run.dir={tmp_path}"]
    lines += ["callbacks.checkpoint.every_n_steps=1", "method.optim.schedule=constant"]
    code, says = unlabeled(*lines, "method.optim.warmup=0", "method.optim.lr=1e38")
    assert code == 1
    assert "FloatingPointError: the loss or a weight is not finite" in says
    assert "callbacks.finite.policy=skip" in says
    path = tmp_path / "checkpoints/last.ckpt"
    assert not path.exists() or finite(saved(tmp_path)["state_dict"])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.DictReader(file))
