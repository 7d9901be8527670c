import csv
import math
import os
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, Sampler

from unlabeled.callbacks import wandb_run
from unlabeled.callbacks.checkpoint import Checkpoint
from unlabeled.callbacks.health import Health, health
from unlabeled.callbacks.loggers import Guarded, tensorboard, wandb_logger
from unlabeled.callbacks.metrics import LearningRate, MetricsCSV, record
from unlabeled.callbacks.norm_groups import NormGroups
from unlabeled.callbacks.progress import Progress
from unlabeled.callbacks.stages import stages
from unlabeled.callbacks.throughput import Throughput, Totals
from unlabeled.dist import SyncBatchNorm
from unlabeled.shown import About

PER_EPOCH = 4


class Steps(Sampler):
    """Batches of a run in order, going on where a checkpoint stopped."""

    def __init__(self):
        self.trainer = None

    def __len__(self):
        return PER_EPOCH

    def __iter__(self):
        first = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        done = first % PER_EPOCH
        return iter([[first + i] for i in range(PER_EPOCH - done)])


class Module(pl.LightningModule):
    def __init__(self, embeds=True):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.embeds, self.seen, self.batches = embeds, {}, []
        self.backbone_config = {"_target_": "a.b", "width": 3}

    def training_step(self, batch, batch_idx):
        self.batches.append(batch["step"])
        z = self.layer(batch["x"])
        if self.embeds:
            self.seen = {"embeddings": z.detach()}
        loss = z.square().mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Data(torch.utils.data.Dataset):
    def __init__(self, wait=0.0):
        self.wait = wait

    def __getitem__(self, steps):
        time.sleep(self.wait)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(steps[0]))
        return {"x": x, "index": torch.arange(8), "step": steps[0]}


def fit(folder, callbacks=(), *, module=None, wait=0.0, resume=None, logger=None, **settings):
    torch.manual_seed(0)
    settings = {"max_epochs": 3, "log_every_n_steps": 1} | settings
    module = module or Module()
    sampler = Steps()
    sampler.trainer = trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=logger or MetricsCSV(folder),
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, Progress) for c in callbacks),
        enable_model_summary=False,
        **settings,
    )
    loader = DataLoader(Data(wait), sampler=sampler, batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return trainer, module


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Health.


def test_health_of_isotropic_rows():
    d = 16
    z = torch.cat([torch.eye(d), -torch.eye(d)]) * torch.rand(2 * d, 1).add(0.1)
    values = health(z)  # lengths do not count
    assert values["std"] == pytest.approx(1, abs=1e-5)
    assert values["effective_rank"] == pytest.approx(d, abs=1e-3)
    assert values["mean_cosine"] == pytest.approx(-1 / (2 * d - 1), abs=1e-6)


@pytest.mark.parametrize("shape", [(64, 512), (512, 32)])
def test_health_of_collapsed_rows(shape):
    z = torch.randn(1, shape[1]).expand(shape) * torch.rand(shape[0], 1).add(0.5)
    values = health(z)
    assert values["std"] == pytest.approx(0, abs=1e-4)
    assert values["effective_rank"] == pytest.approx(1, abs=0.01)
    assert values["mean_cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_health_of_rows_in_k_directions(k):
    d = 32
    z = torch.cat([torch.eye(d)[:k], -torch.eye(d)[:k]]).repeat(5, 1)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))[0]
    assert health(z)["std"] == pytest.approx(math.sqrt(k / d), abs=1e-5)
    for x in (z, z @ rotation):
        assert health(x)["effective_rank"] == pytest.approx(k, abs=0.01)


def test_effective_rank_is_that_of_singular_values():
    z = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)) @ torch.diag(
        torch.logspace(0, -2, 12)
    )
    s = torch.linalg.svdvals(nn.functional.normalize(z, dim=1).double())
    p = s / s.sum()
    assert health(z)["effective_rank"] == pytest.approx(
        (-(p * p.log()).sum()).exp().item(), rel=1e-4
    )


def test_health_takes_bfloat16_and_reports_nan():
    assert health(torch.randn(8, 4).bfloat16())["std"] > 0.5
    values = health(torch.tensor([[1.0, math.nan], [1.0, 0.0]]))
    assert all(math.isnan(v) for v in values.values())


def test_health_logs_every_n_updates_and_is_silent_without_embeddings(tmp_path):
    fit(tmp_path / "a", [Health(every_n_steps=3)], log_every_n_steps=5)
    rows = [row for row in table(tmp_path / "a") if row["health/std"]]
    assert [int(row["step"]) for row in rows] == [2, 5, 8, 11]
    assert 0 < float(rows[0]["health/std"]) <= 1.0
    fit(tmp_path / "b", [Health(every_n_steps=3)], module=Module(embeds=False))
    assert "health/std" not in table(tmp_path / "b")[0]
    fit(tmp_path / "c", [Health(every_n_steps=2)], accumulate_grad_batches=2)
    rows = [row for row in table(tmp_path / "c") if row["health/std"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5]  # once per update, not per batch


# metrics.csv.


def test_csv_joins_rows_of_a_step_and_adds_columns(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"epoch": 0, "a": 1.0}, 0)
    log.log_metrics({"epoch": 0, "a": 0.1}, 1)
    log.log_metrics({"b": 3.0}, 1)
    log.log_metrics({"epoch": 1, "b": float("nan")}, 2)
    text = (tmp_path / "metrics.csv").read_text().splitlines()  # on disk without any flush
    assert text == ["step,epoch,a,b", "0,0,1,", "1,0,0.1,3", "2,1,,nan"]


def test_csv_tells_float32_apart(tmp_path):
    a = torch.tensor(0.1)
    b = torch.nextafter(a, torch.tensor(1.0))
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": a.item(), "b": b.item()}, 0)
    (row,) = table(tmp_path)
    assert torch.tensor(float(row["a"])) == a
    assert torch.tensor(float(row["b"])) == b


def test_csv_rewinds_to_a_step(tmp_path):
    log = MetricsCSV(tmp_path)
    for step in range(4):
        log.log_metrics({"epoch": 0, "a": step}, step)
    log.log_metrics({"epoch": 0, "late": 1.0}, 4)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5,0")  # cut short by a kill
    again = MetricsCSV(tmp_path)
    again.rewind(3)
    assert [row["step"] for row in table(tmp_path)] == ["0", "1", "2"]
    assert list(table(tmp_path)[0]) == ["step", "epoch", "a"]
    again.log_metrics({"epoch": 1, "b": 7.0}, 3)
    assert table(tmp_path)[3] == {"step": "3", "epoch": "1", "a": "", "b": "7"}
    assert table(tmp_path)[2]["b"] == ""


def test_csv_goes_on_without_a_rewind(tmp_path):
    MetricsCSV(tmp_path).log_metrics({"epoch": 0, "a": 1.0}, 0)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1,0,")
        file.write("2\n3")
    MetricsCSV(tmp_path).log_metrics({"epoch": 0, "a": 4.0}, 4)
    assert [row["step"] for row in table(tmp_path)] == ["0", "1", "4"]


class Killed(pl.Callback):
    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.after:
            raise RuntimeError("killed")


def parts(**checkpoint):
    intervals = {"every_n_epochs": None, "every_n_minutes": None} | checkpoint
    return [Health(every_n_steps=2), LearningRate(every_n_steps=1), Checkpoint(**intervals)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("intervals", "kill"),
    [
        ({"every_n_steps": 3}, 5),  # within an epoch
        ({"every_n_steps": 2}, 5),  # on an epoch's last step
        ({"every_n_epochs": 1}, 5),
        ({"every_n_minutes": 1e-9}, 5),
    ],
)
def test_a_killed_run_goes_on_as_if_it_had_not_stopped(tmp_path, intervals, kill, accumulate):
    settings = {"max_epochs": 2 * accumulate, "accumulate_grad_batches": accumulate}
    _, whole = fit(tmp_path / "whole", parts(**intervals), **settings)
    folder = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="killed"):
        fit(folder, [*parts(**intervals), Killed(kill)], **settings)
    path = folder / "checkpoints/last.ckpt"
    saved = torch.load(path, weights_only=True)["global_step"]
    assert 0 < saved <= kill
    _, again = fit(folder, parts(**intervals), resume=path, **settings)
    assert again.batches == whole.batches[saved * accumulate :]
    assert torch.equal(again.layer.weight, whole.layer.weight)
    assert table(folder) == table(tmp_path / "whole")


def test_a_run_cut_by_max_steps_within_an_epoch_goes_on_there(tmp_path):
    _, whole = fit(tmp_path / "whole", parts(every_n_epochs=1), max_steps=10, max_epochs=-1)
    fit(tmp_path / "cut", parts(every_n_epochs=1), max_steps=6, max_epochs=-1)
    path = tmp_path / "cut/checkpoints/last.ckpt"
    _, again = fit(
        tmp_path / "cut", parts(every_n_epochs=1), max_steps=10, max_epochs=-1, resume=path
    )
    assert again.batches == whole.batches[6:]
    assert torch.equal(again.layer.weight, whole.layer.weight)


def test_a_fresh_run_in_an_old_folder_forgets_the_old_curve(tmp_path):
    fit(tmp_path, parts(), max_epochs=3)
    fit(tmp_path, parts(), max_epochs=1)
    assert [int(row["step"]) for row in table(tmp_path)] == [0, 1, 2, 3]


# Checkpoints.


def test_checkpoint_holds_plain_types_and_the_backbone(tmp_path):
    fit(tmp_path, [Checkpoint(), Health(), Throughput(), Progress()])
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["backbone_config"] == {"_target_": "a.b", "width": 3}
    assert checkpoint["global_step"] == 12
    assert set(checkpoint["state_dict"]) == {"layer.weight", "layer.bias"}
    assert checkpoint["optimizer_states"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["last-1.ckpt", "last.ckpt"]


def saves(tmp_path, monkeypatch, settings, **intervals):
    steps = []
    original = pl.Trainer.save_checkpoint

    def counted(self, *args, **kwargs):
        steps.append(self.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", counted)
    intervals = {"every_n_epochs": None, "every_n_minutes": None} | intervals
    fit(tmp_path, [Checkpoint(**intervals)], **settings)
    return steps


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ({"every_n_steps": 3}, [3, 6, 9, 12]),
        ({"every_n_steps": 4}, [4, 8, 12]),
        ({"every_n_epochs": 1}, [4, 8, 12]),
        ({"every_n_epochs": 2, "every_n_steps": 4}, [4, 8, 12]),
        ({"every_n_epochs": 2}, [8, 12]),
        ({}, [12]),
        ({"every_n_minutes": 60}, [12]),
        ({"every_n_minutes": 1e-9}, list(range(1, 13))),
    ],
)
def test_checkpoint_saves_once_per_step_and_at_the_end(tmp_path, monkeypatch, intervals, expected):
    assert saves(tmp_path, monkeypatch, {}, **intervals) == expected


def test_checkpoint_never_saves_between_accumulated_batches(tmp_path, monkeypatch):
    seen = saves(tmp_path, monkeypatch, {"accumulate_grad_batches": 2}, every_n_minutes=1e-9)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    fit(tmp_path, [Checkpoint()], max_epochs=1)
    path = tmp_path / "checkpoints/last.ckpt"
    old = path.read_bytes()

    def full(checkpoint, filepath, *args, **kwargs):
        filepath.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("pytorch_lightning.strategies.Strategy.save_checkpoint", full, raising=True)
    for strategy in pl.strategies.SingleDeviceStrategy.__mro__:
        if "save_checkpoint" in vars(strategy):
            monkeypatch.setattr(strategy, "save_checkpoint", lambda self, c, f, **k: full(c, f))
    with pytest.raises(OSError, match="no space"):
        fit(tmp_path, [Checkpoint()], max_epochs=1)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_kill_before_the_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    fit(tmp_path, [Checkpoint()], max_epochs=1)
    path = tmp_path / "checkpoints/last.ckpt"
    old = path.read_bytes()
    (path.parent / ".last.ckpt.tmp").write_bytes(b"left by a kill")

    replace = os.replace

    def killed(source, target):
        if path != target:
            return replace(source, target)
        assert torch.load(source, weights_only=True)["global_step"] == 4  # whole before it counts
        raise SystemExit

    monkeypatch.setattr("unlabeled.callbacks.checkpoint.os.replace", killed)
    with pytest.raises(SystemExit):
        fit(tmp_path, [Checkpoint()], max_epochs=1)
    assert path.read_bytes() == old
    monkeypatch.undo()
    (path.parent / ".last.ckpt.tmp").write_bytes(b"left by a kill")
    callback = Checkpoint()
    trainer = SimpleNamespace(default_root_dir=str(tmp_path), is_global_zero=True)
    callback.setup(trainer, None, "fit")
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize("name", ["every_n_steps", "every_n_minutes", "every_n_epochs"])
def test_checkpoint_refuses_intervals_that_mean_nothing(name):
    with pytest.raises(ValueError, match=name):
        Checkpoint(**{name: 0})


# Throughput, learning rate, progress.


@pytest.fixture
def slept(monkeypatch):
    """A clock that moves by sleeping alone: how busy the machine is does not show."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr("unlabeled.callbacks.throughput.perf_counter", lambda: now[0])
    return now


class Takes(Module):
    def training_step(self, batch, batch_idx):
        time.sleep(0.06)
        return super().training_step(batch, batch_idx)


def test_throughput_finds_the_wait(tmp_path, slept):
    callback = Throughput(every_n_steps=4)
    fit(tmp_path, [callback], module=Takes(), wait=0.02)
    totals = callback.totals
    assert totals.images == 8 * 11  # all but the first batch
    assert totals.waiting == pytest.approx(0.02 * 11)
    assert totals.seconds == pytest.approx(0.08 * 11)
    rows = [row for row in table(tmp_path) if row["perf/data_wait"]]
    assert [int(row["step"]) for row in rows] == [3, 7, 11]
    assert [float(row["perf/data_wait"]) for row in rows] == pytest.approx([0.25] * 3)
    assert [float(row["perf/images_per_second"]) for row in rows] == pytest.approx([100] * 3)


@pytest.mark.parametrize("saves", [False, True])
def test_throughput_does_not_count_what_others_do_between_steps(tmp_path, slept, saves):
    class Slow(pl.Callback):
        def on_train_epoch_end(self, *args):
            time.sleep(0.2)

        def on_train_batch_end(self, *args):
            time.sleep(0 if saves else 0.02)

        def state_dict(self):
            time.sleep(0.02)
            return {}

    callback = Throughput(every_n_steps=100)
    # Named first: only its own reordering keeps the other's work out of the wait.
    checkpoint = [Checkpoint(every_n_steps=1)] if saves else []
    fit(tmp_path, [callback, Slow(), *checkpoint], module=Takes(), wait=0.01)
    steps = 2 if saves else 11  # a batch after a save is left out, the first of an epoch is not
    assert callback.totals.waiting == pytest.approx(0.01 * steps)
    assert callback.totals.seconds == pytest.approx((0.07 if saves else 0.09) * steps)


def test_rates_between_two_moments():
    a, b = Totals(100, 2.0, 1.0), Totals(300, 4.0, 1.5)
    assert b.since(a) == {"images_per_second": 100.0, "data_wait": 0.25}
    assert a.since(a) == {}


def test_learning_rate_is_the_one_used(tmp_path):
    fit(tmp_path, [LearningRate(every_n_steps=2)], max_epochs=1)
    rows = [row for row in table(tmp_path) if row["optim/lr"]]
    assert [float(row["optim/lr"]) for row in rows] == pytest.approx([0.1 / 2, 0.1 / 4])


@pytest.mark.parametrize("kind", [Health, LearningRate, Throughput])
def test_every_zero_steps_is_refused(kind):
    with pytest.raises(ValueError, match="at least 1"):
        kind(every_n_steps=0)


def test_progress_prints_lines_without_a_terminal(tmp_path, capfd):
    fit(tmp_path, [Progress(line=1e-6), Throughput()])
    lines = [x for x in capfd.readouterr().out.splitlines() if x.startswith("epoch")]
    assert lines[0].startswith("epoch 1/3  step 1/12  loss ")
    assert lines[-1].startswith("epoch 3/3  step 12/12  loss ")
    assert "images/s" in lines[-1]
    assert "data wait" in lines[-1]
    assert "took 0:00" in lines[-1]
    assert "\x1b" not in "".join(lines)


def test_progress_prints_few_lines(tmp_path, capfd):
    fit(tmp_path, [Progress(line=60)], max_steps=6, max_epochs=-1)
    lines = [x for x in capfd.readouterr().out.splitlines() if x.startswith("epoch")]
    assert [x.split("  ")[:2] for x in lines] == [["epoch 2", "step 6/6"]]  # it began no third


def test_stages_say_how_long_they_will_take(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("unlabeled.callbacks.stages.time.monotonic", lambda: clock[0])
    with stages(line=5) as show:
        for done in range(1, 2001):
            show("training of backbone", done, 2000)
            clock[0] += 2
        show("training of backbone", 1, 10)  # another one under the same name
        clock[0] += 6
        show("training of backbone", 2, 10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training of backbone: 1 of 2000"
    assert lines[1] == "training of backbone: 4 of 2000, 1:06:32 left"  # 1996 of two seconds
    assert lines[-4:-2][1] == "training of backbone: 2000 of 2000"
    assert lines[-2:] == [
        "training of backbone: 1 of 10",
        "training of backbone: 2 of 10, 0:00:48 left",
    ]
    assert len(lines) < 500  # fewer, the longer it takes


def test_progress_draws_a_bar_in_a_terminal(tmp_path):
    import io

    from rich.console import Console

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    callback = Progress(refresh=1e-6)
    file = Terminal()
    callback.console = Console(file=file, force_terminal=True, force_interactive=True, width=100)
    fit(tmp_path, [callback, Throughput()])
    drawn = file.getvalue()
    assert "12/12" in drawn
    assert "epoch 3/3" in drawn
    assert "loss" in drawn
    assert callback._bar is None


def test_progress_is_silent_where_disabled(tmp_path, capfd):
    callback = Progress(line=1e-6)
    callback.disable()
    fit(tmp_path, [callback])
    assert "epoch" not in capfd.readouterr().out


# Dashboards.


class Broken(Logger):
    name, version, calls = "broken", 0, 0

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        Broken.calls += 1
        raise ConnectionError("gone")


@pytest.mark.parametrize("broken", ["at its start", "while it logs"])
def test_a_broken_dashboard_does_not_stop_a_run(tmp_path, caplog, broken):
    def fails():
        raise OSError("no network")

    Broken.calls = 0
    guarded = Guarded(fails if broken == "at its start" else Broken, "W&B")
    fit(tmp_path, logger=[MetricsCSV(tmp_path), guarded], max_epochs=1)
    assert len(table(tmp_path)) == 4
    assert Broken.calls == (0 if broken == "at its start" else 1)
    messages = [r.message for r in caplog.records if "W&B failed" in r.message]
    assert len(messages) == 1
    assert "the run goes on" in messages[0]


def test_record_reaches_every_logger(tmp_path):
    logs = [MetricsCSV(tmp_path / "a"), MetricsCSV(tmp_path / "b")]
    record(SimpleNamespace(current_epoch=2, global_step=7, loggers=logs), {"x": 1.0})
    for name in "ab":
        assert table(tmp_path / name) == [{"step": "6", "epoch": "2", "x": "1"}]


def test_wandb_is_offline_without_a_key(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    empty = tmp_path / "netrc"
    empty.write_text("machine example.org login a password b\n")
    monkeypatch.setenv("NETRC", str(empty))
    assert not wandb_run.reachable()


def test_wandb_is_offline_without_a_network(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    tried = []

    def connect(address, timeout):
        tried.append(address)
        raise OSError("unreachable")

    monkeypatch.setattr("unlabeled.callbacks.wandb_run.socket.create_connection", connect)
    begin = time.monotonic()
    assert not wandb_run.reachable()
    assert tried == [("api.wandb.ai", 443)]
    assert time.monotonic() - begin < 6


def test_wandb_finds_a_netrc_entry_and_a_server_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.local:8080")
    file = tmp_path / "netrc"
    file.write_text("machine wandb.local login user password secret\n")
    monkeypatch.setenv("NETRC", str(file))
    tried = []

    def connect(address, timeout):
        tried.append(address)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr("unlabeled.callbacks.wandb_run.socket.create_connection", connect)
    assert wandb_run.reachable()
    assert tried == [("wandb.local", 8080)]


def test_wandb_writes_an_offline_run_that_keeps_its_id(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(wandb_run, "reachable", lambda: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = wandb_logger(about=About(tmp_path))
    logger.log_metrics({"train/loss": 1.0}, 0)
    identity = (tmp_path / "wandb_id").read_text()
    assert logger.dashboard.run.id == identity
    logger.close("finished")
    (folder,) = tmp_path.glob(f"wandb/offline-run-*-{identity}")
    assert "W&B is offline: no key or no network" in caplog.text
    assert f"wandb sync {folder}" in capsys.readouterr().out
    assert wandb_run.identity(About(tmp_path)) == identity
    assert "WANDB_MODE" not in os.environ
    monkeypatch.setenv("WANDB_MODE", "offline")  # W&B itself looks at it once per process
    logger = wandb_logger(about=About(tmp_path / "next"))
    logger.log_metrics({"train/loss": 1.0}, 0)
    assert not logger.failed
    logger.close("finished")
    assert list(tmp_path.glob("next/wandb/offline-run-*"))


def test_tensorboard_writes_events_or_names_the_extra(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra is not installed")
    logger = tensorboard(about=About(tmp_path))
    logger.log_metrics({"a": 1.0}, 0)
    logger.close("finished")
    assert list((tmp_path / "tensorboard").glob("events.*"))
    monkeypatch.setattr("unlabeled.callbacks.loggers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"unlabeled\[tensorboard\]"):
        tensorboard(about=About(tmp_path))


def test_norms_are_in_groups_while_a_method_trains_and_no_longer(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("unlabeled.callbacks.norm_groups.divide_norms", asked.append)
    fit(tmp_path, [NormGroups(size=2)], max_epochs=1)
    assert asked == [2, None]
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        NormGroups(size=0)


def test_groups_of_norms_must_fit_the_processes(monkeypatch):
    monkeypatch.setattr("unlabeled.dist.world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"norm_groups.size=3: 4 processes cannot be divided"):
        NormGroups(size=3).setup(None, None, "fit")
    NormGroups(size=64).setup(None, None, "fit")  # fewer than a group: all are one
    assert SyncBatchNorm.process_group is None
