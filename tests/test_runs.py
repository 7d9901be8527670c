"""Whole runs: the files they leave, going on in their folder, and what must not change them.

Most run the command line in this process, which spares the imports of another.
"""

import contextlib
import csv
import fcntl
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import OWN, ROOT
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from torch.utils._pytree import tree_leaves

from unlabeled import train

TINY = [
    "method=simclr",
    "method.hidden=32",
    "optim@method.optim=sgd",
    "augment@method.augment=mild",
    "backbone.width=16",
    "data.batch_size=16",
    "data.limit=64",
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=4",
    "trainer.max_epochs=20",
    "trainer.log_every_n_steps=1",
]
FAST_EVALS = ["evals.linear.epochs=1", "evals.linear.lrs=[0.1]", "evals.linear.stages=[res5]"]
NAMES = [
    "knn/k20_t0.07/top1",
    "linear/res5/top1",
    "baseline/random/knn/k20_t0.07/top1",
    "baseline/pixels/knn/k20_t0.07/top1",
]


def unlabeled(*arguments: object) -> tuple[int, str]:
    """The console script, called in this process: its exit code and standard error."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["unlabeled", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            train.main()
    HydraConfig.instance().cfg = None  # other tests run without a command line
    return stop.value.code, errors.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """80 images in two classes, and another 20 that nobody labelled."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, kinds, count in (("labelled", ("cat", "dog"), 40), ("bare", (".",), 20)):
        for kind in kinds:
            (root / part / kind).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / kind / f"{i}.png")
    return root


def in_folder(root):
    """Overrides of a run on files that are read while it trains."""
    return [
        "data=folder",
        f"data.root={root}",
        "data.eval_decode.size=16",
        "data.eval_decode.resize=16",
        "data.size=16",
        *TINY,
        "data.limit=null",
    ]


@pytest.fixture(scope="module")
def whole(folder):
    """Overrides of a run that trains and evaluates on labelled images."""
    return [*in_folder(folder / "labelled"), "data.layout.test_share=0.2", *FAST_EVALS]


@pytest.fixture(scope="module")
def finished(whole, tmp_path_factory):
    """The folder of a whole run: trained, evaluated, reported."""
    out = tmp_path_factory.mktemp("runs") / "first"
    assert unlabeled(*whole, f"hydra.run.dir={out}") == (0, "")
    return out


def checkpoint(out):
    return torch.load(out / "checkpoints/last.ckpt", weights_only=True)


def scores(out):
    return json.loads((out / "scores.json").read_text())


def status(out):
    return json.loads((out / "status.json").read_text())


def metrics(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def trained(out):
    """The rows of the training alone."""
    return [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in metrics(out)]


def losses(out):
    return [row["train/loss"] for row in metrics(out)]


def same_weights(a, b):
    first, second = checkpoint(a)["state_dict"], checkpoint(b)["state_dict"]
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_files_of_a_run(finished):
    config = yaml.safe_load((finished / ".hydra/config.yaml").read_text())
    assert config["method"]["backbone"] == config["backbone"]  # references are resolved
    assert "${" not in (finished / ".hydra/config.yaml").read_text()
    saved = checkpoint(finished)
    assert saved["global_step"] == 4
    assert "backbone.conv1.weight" in saved["state_dict"]
    assert saved["backbone_config"]["_target_"] == "unlabeled.backbones.resnet.ResNet"
    rows = metrics(finished)
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert all(float(row["train/loss"]) > 0 for row in rows)
    assert set(NAMES) <= scores(finished).keys()
    details = json.loads((finished / "scores_details.json").read_text())
    assert details.keys() == scores(finished).keys()
    for name in NAMES:
        low, high = details[name]["ci95"]
        assert low <= scores(finished)[name] <= high
        assert details[name]["n"] == 16
    report = (finished / "report.html").read_text()
    assert "<html" in report
    assert "knn" in report
    assert np.load(finished / "figures/neighbours.npz")["neighbours"].shape[1] == 8


def test_the_status_of_a_run(finished):
    found = status(finished)
    assert (found["state"], found["reason"]) == ("finished", None)
    assert found["host"]
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["seconds"] > 0
    assert found["started"] <= found["ended"]
    assert "commit" in found
    assert found["trained"] == {"max_epochs": 20, "max_steps": 4}


def test_a_finished_run_trains_no_more_and_evaluates_what_is_missing(finished, whole, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    before = scores(again)
    without = {name: x for name, x in before.items() if "linear/" not in name}
    (again / "scores.json").write_text(json.dumps({**without, "knn/k1_t0.07/top1": 0.123}))
    assert unlabeled(*whole, f"hydra.run.dir={again}") == (0, "")
    assert same_weights(finished, again)
    assert trained(again) == trained(finished)
    assert float(metrics(again)[-1]["eval/knn/k1_t0.07/top1"]) == 0.123
    assert scores(again) == {**before, "knn/k1_t0.07/top1": 0.123}  # kNN was not run again
    assert status(again)["state"] == "finished"


def test_another_run_of_the_seed_has_the_same_scores(finished, whole, tmp_path):
    assert unlabeled(*whole, "seed=0", f"hydra.run.dir={tmp_path}") == (0, "")
    assert same_weights(finished, tmp_path)
    assert scores(finished) == scores(tmp_path)
    assert metrics(finished)[-1]["train/loss"] == metrics(tmp_path)[-1]["train/loss"]


def test_evaluating_a_run_later_gives_its_own_scores(finished, whole, tmp_path):
    code = unlabeled(
        *("method=none", "backbone=checkpoint", f"backbone.path={finished}", "evals=standard"),
        *(
            line
            for line in whole
            if not line.startswith(("backbone", "method", "optim", "augment"))
        ),
        f"hydra.run.dir={tmp_path}",
    )
    assert code == (0, "")
    assert scores(tmp_path) == scores(finished)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_goes_on_from_a_path_from_its_folder_or_not_at_all(tmp_path):
    def started(out, *lines):
        common = [*TINY, "evals=none", "callbacks=none", f"hydra.run.dir={tmp_path / out}"]
        assert unlabeled(*common, *lines) == (0, "")
        return [int(row["step"]) for row in metrics(tmp_path / out)]

    constant = ["method.optim.schedule=constant", "method.optim.warmup=0"]  # no matter how long
    assert started("whole", *constant) == [0, 1, 2, 3]
    assert started("half", *constant, "trainer.max_steps=2") == [0, 1]
    assert started("path", *constant, f"resume={tmp_path / 'half'}") == [2, 3]
    assert same_weights(tmp_path / "whole", tmp_path / "path")
    short = [*constant, f"resume={tmp_path / 'half'}", f"hydra.run.dir={tmp_path / 'short'}"]
    for key, *asked in (
        ("max_steps", "trainer.max_steps=1"),
        ("max_epochs", "trainer.max_epochs=0", "trainer.max_steps=-1"),
    ):
        code, says = unlabeled(*TINY, "evals=none", *short, *asked)
        assert code == 2
        assert f"write trainer.{key} of at least" in says
    assert started("half", *constant) == [0, 1, 2, 3]  # resume=auto
    assert same_weights(tmp_path / "whole", tmp_path / "half")
    assert started("half", "seed=1", "resume=none") == [0, 1, 2, 3]
    assert not same_weights(tmp_path / "whole", tmp_path / "half")
    assert checkpoint(tmp_path / "half")["global_step"] == 4


KILLED = """
import os, signal
from unlabeled import train
from unlabeled.method import Method


def killed(self, batch, batch_idx):
    if batch["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)

Method.on_train_batch_start = killed
train.main()
"""


@pytest.mark.parametrize(
    ("method", "workers"),
    [pytest.param("moco_v2", 0, marks=pytest.mark.slow), ("byol", 2), ("deepcluster", 0)],
)
def test_a_killed_run_goes_on_in_its_folder(folder, tmp_path, method, workers):
    lines = [
        f"experiment=cifar10/{method}",
        *(
            x
            for x in in_folder(folder / "labelled")
            if not x.startswith(("method", "optim", "aug"))
        ),
        *OWN.get(method, []),
        *("data.tier=folder", f"data.workers={workers}", "callbacks.checkpoint.every_n_steps=1"),
        *("trainer.max_steps=8", "evals=none", "logger=none", "data.limit=64"),
    ]
    assert unlabeled(*lines, f"hydra.run.dir={tmp_path / 'whole'}") == (0, "")
    half = [*lines, f"hydra.run.dir={tmp_path / 'half'}"]
    done = subprocess.run([sys.executable, "-c", KILLED, *half], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint(tmp_path / "half")["global_step"] == 6  # four updates are an epoch
    assert status(tmp_path / "half")["state"] == "running"
    assert unlabeled(*half) == (0, "")  # resume=auto
    whole, gone_on = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "half")
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        first, second = tree_leaves(whole[part]), tree_leaves(gone_on[part])
        assert len(first) == len(second) > 0
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert losses(tmp_path / "whole") == losses(tmp_path / "half")
    assert len(losses(tmp_path / "half")) == 8


def test_evaluations_without_labels_are_skipped_or_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("UNLABELED_DATA", str(tmp_path))  # no VOC that a machine may have
    run = [*in_folder(folder / "bare"), "data.batch_size=8", "trainer.max_steps=1"]
    assert unlabeled(*run, "evals=all", f"hydra.run.dir={tmp_path / 'all'}") == (0, "")
    said = capsys.readouterr().out
    for name in ("knn", "linear"):
        assert f"skipped the evaluation {name}: the images of the train" in said
    for evals in ("evals=knn", "evals=[knn,linear]"):
        code, says = unlabeled(*run, evals, f"hydra.run.dir={tmp_path / 'named'}")
        assert code == 2
        assert "the evaluation 'knn' cannot run: the images of the train" in says
        assert "Traceback" not in says
        assert not (tmp_path / "named/checkpoints").exists()  # refused before it trained


def test_what_trains_networks_comes_last_and_a_stop_loses_no_scores(
    whole, finished, tmp_path, capsys, monkeypatch
):
    from unlabeled.evaluate.finetune import FineTune

    def stopped(self, subject):
        raise RuntimeError("the power went")

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    old = {name: -1.0 for name in ("finetune/100pct/top1", "health/std", *scores(out))}
    (out / "scores.json").write_text(json.dumps(old))  # of other weights
    capsys.readouterr()
    lines = [line for line in whole if line not in FAST_EVALS]
    lines += ["evals=[finetune,knn,clustering]", "evals.finetune.epochs=1", "resume=none"]
    lines = [*lines, "evals.finetune.lr_trunk=[0.01]", "evals.finetune.lr_head=[0.1]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTune, "tune", stopped)
        assert unlabeled(*lines, f"hydra.run.dir={out}")[0] != 0
    said = capsys.readouterr().out
    assert "evaluation finetune: trains networks" in said
    assert "~evals.finetune leaves it out" in said
    known = scores(out)
    assert known["knn/k20_t0.07/top1"] >= 0
    assert known["clustering/k2/nmi"] >= 0
    assert not [name for name in known if "finetune" in name]  # the old ones are not taken for new
    assert "health/std" not in known  # the weights are new
    lines[lines.index("resume=none")] = "resume=auto"
    assert unlabeled(*lines, f"hydra.run.dir={out}") == (0, "")
    said = capsys.readouterr().out
    assert "clustering" not in said.partition("Scores, with")[0]  # it has its scores
    assert scores(out) == {**known, **scores(out)}
    assert 0 <= scores(out)["finetune/100pct/top1"] <= 1


def test_an_error_ends_with_1_and_is_in_the_status(tmp_path, monkeypatch):
    from unlabeled.methods.simclr import SimCLR

    def broken(self, batch):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(SimCLR, "loss", broken)
    code, says = unlabeled(*TINY, "evals=none", f"hydra.run.dir={tmp_path}")
    assert code == 1
    assert "RuntimeError: no such luck" in says
    assert "Traceback" not in says
    found = status(tmp_path)
    assert (found["state"], found["reason"]) == ("failed", "RuntimeError: no such luck")
    assert not found["trained"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["method=simclr", "method.temprature=0.1"], "did you mean `temperature`?"),
        (["data=folder", "data.root=/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["data.limit=8"], "batch"),
        (["resume=/nowhere/x.ckpt"], "/nowhere/x.ckpt"),
        (["backbone=checkpoint", "backbone.path=/nowhere/run"], "/nowhere/run"),
        (["method.temperature=-1"], "temperature"),
        (["decode=one"], "2 chains for 1 crops"),  # the first batch tells
    ],
)
def test_wrong_input_ends_with_2(tmp_path, lines, says):
    tiny = [t for t in TINY if "backbone=checkpoint" not in lines or not t.startswith("backbone")]
    code, said = unlabeled(*tiny, "evals=none", f"hydra.run.dir={tmp_path / 'run'}", *lines)
    assert code == 2
    assert says in said
    assert "Traceback" not in said
    if (tmp_path / "run/status.json").exists():
        assert status(tmp_path / "run")["state"] == "failed"
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_workers_change_nothing(folder, tmp_path):
    for workers in (0, 2):
        out = tmp_path / str(workers)
        lines = [*in_folder(folder / "labelled"), "data.tier=folder", f"data.workers={workers}"]
        assert unlabeled(*lines, "evals=none", f"hydra.run.dir={out}") == (0, "")
    assert same_weights(tmp_path / "0", tmp_path / "2")


def test_probes_change_nothing(tmp_path):
    choices = {"bare": "none", "probed": "[online_knn,online_linear]"}
    for out, callbacks in choices.items():
        lines = [*TINY, f"callbacks={callbacks}", "evals=none", "trainer.max_steps=6"]
        assert unlabeled(*lines, f"hydra.run.dir={tmp_path / out}") == (0, "")
    assert same_weights(tmp_path / "bare", tmp_path / "probed")
    rows = metrics(tmp_path / "probed")
    assert sum(row["online/linear_top1"] != "" for row in rows) == 6
    assert any(row["online/knn_top1"] for row in rows)


def test_wandb_needs_no_key_and_each_job_of_a_sweep_has_its_own_run(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    lines = [*TINY, "logger=wandb", "evals=none", "trainer.max_steps=1"]
    code, says = unlabeled("-m", *lines, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert code == 0, says
    for job in ("0", "1"):
        assert list((tmp_path / job).rglob("run-*.wandb")), f"job {job}"


def test_three_ways_to_start_it():
    script, module = [str(ROOT / "src/unlabeled/train.py")], ["-m", "unlabeled.train"]
    console = Path(sys.executable).parent / "unlabeled"
    said = []
    for way in ([sys.executable, *script], [sys.executable, *module], [str(console)]):
        done = subprocess.run(
            [*way, "--cfg", "job", "method=byol", "seed=3"],
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout)
    assert said[0] == said[1] == said[2]
    assert "seed: 3" in said[0]
    assert "unlabeled.methods.byol.BYOL" in said[0]


def test_a_folder_refuses_the_config_of_another_run(tmp_path):
    lines = [*TINY, "evals=none", "trainer.max_steps=2", f"hydra.run.dir={tmp_path}"]
    assert unlabeled(*lines) == (0, "")
    before = (tmp_path / "status.json").read_text()
    code, says = unlabeled(*lines, "seed=5", "data.batch_size=8")
    assert code == 2
    assert "differs in data.batch_size" in says
    assert "seed" in says
    assert "resume=none" in says
    assert (tmp_path / "status.json").read_text() == before


def test_what_another_run_left_without_a_checkpoint_is_not_replaced(tmp_path):
    scored, curves = tmp_path / "scored", tmp_path / "curves"
    lines = [*TINY, "evals=none", "trainer.max_steps=2"]
    none = ["method=none", "trainer=cpu", "backbone.width=16", "data.limit=64", "evals=health"]
    assert unlabeled(*none, "baselines=false", f"hydra.run.dir={scored}") == (0, "")
    before = (scored / "scores.json").read_text()
    code, says = unlabeled(*lines, f"hydra.run.dir={scored}")
    assert code == 2
    assert f"{scored} holds another run, which differs in" in says
    assert (scored / "scores.json").read_text() == before

    assert unlabeled(*lines, f"hydra.run.dir={curves}") == (0, "")
    shutil.rmtree(curves / "checkpoints")  # as if killed before the first
    before = (curves / "metrics.csv").read_text()
    code, says = unlabeled(*lines, "seed=7", f"hydra.run.dir={curves}")
    assert code == 2
    assert "which differs in data.seed, seed:" in says
    assert (curves / "metrics.csv").read_text() == before
    assert unlabeled(*lines, f"hydra.run.dir={curves}") == (0, "")


def test_a_second_sweep_in_a_folder_is_refused_for_what_it_is(tmp_path):
    (tmp_path / ".members").mkdir()
    with (tmp_path / ".members/lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, says = unlabeled("-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert code == 2
    assert "another sweep runs in this folder" in says
    assert "cannot write" not in says


def test_a_run_begun_anew_in_its_folder_is_evaluated_anew(tmp_path):
    lines = [*TINY, "evals=knn", "trainer.max_steps=2", f"hydra.run.dir={tmp_path}"]
    assert unlabeled(*lines) == (0, "")
    details = json.loads((tmp_path / "scores_details.json").read_text())
    assert details["knn/k20_t0.07/top1"]["seed"] == 0
    assert unlabeled(*lines, "seed=5", "resume=none") == (0, "")
    details = json.loads((tmp_path / "scores_details.json").read_text())
    assert details["knn/k20_t0.07/top1"]["seed"] == 5
