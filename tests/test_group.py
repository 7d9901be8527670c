"""Processes that others start: one folder, and one group also where nothing trains."""

import json
import os
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from unlabeled.errors import InputError
from unlabeled.group import began

OUTSIDE = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
OUTSIDE += ("SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_ID")
TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)


def test_processes_of_torchrun_share_a_folder_whenever_they_start():
    started = []
    for rank in ("0", "1"):
        code = "from unlabeled.group import began; print(began('%H-%M-%S'))"
        environment = {**os.environ, **TORCHRUN, "RANK": rank}
        command = [sys.executable, "-c", code]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
        time.sleep(1.1)
    first, second = (process.communicate()[0].strip() for process in started)
    assert first == second
    assert first.startswith(f"torchrun_{os.getpid()}_")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "the time"),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "mine"}, "the time"),
        ({**TORCHRUN, "RANK": "1", "TORCHELASTIC_RUN_ID": "a/b"}, "torchrun_a_b"),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3"},
            "slurm_12_3",
        ),
    ],
)
def test_the_name_of_a_run(monkeypatch, given, wanted):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert began("the time") == wanted


@pytest.mark.parametrize("given", [{}, {**TORCHRUN, "WORLD_SIZE": "4"}])
def test_processes_that_share_nothing_are_refused(monkeypatch, given):
    for name, value in {"WORLD_SIZE": "2", **given, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"write hydra\.run\.dir=DIR"):
        began("%H")


def test_the_config_names_runs_by_it(compose):
    root = OmegaConf.load(__file__.replace("tests/test_group.py", "conf/train.yaml"))
    assert "${began:" in OmegaConf.to_container(root)["hydra"]["run"]["dir"]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_an_evaluation_under_torchrun_is_one_run(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--master-port=0", "-m", "unlabeled.train"]
    lines = ["method=none", "backbone.width=8", "data.limit=64", "evals=knn", "trainer=ddp"]
    lines += ["trainer.accelerator=cpu", "trainer.devices=2", "baselines=false"]
    command = [*torchrun, *lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Starting with 2 processes" in done.stderr + done.stdout
    (out,) = (tmp_path / "outputs/none").iterdir()
    assert out.name.startswith("torchrun_")
    alone = tmp_path / "alone"
    command = [sys.executable, "-m", "unlabeled.train", *lines[:-2], "trainer.devices=1"]
    command += ["baselines=false", f"hydra.run.dir={alone}"]
    subprocess.run(command, capture_output=True, check=True)
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (out, alone)]
    assert scores[0] == scores[1]


WRITES = """
import os

from unlabeled import train
from unlabeled.evaluate.scores import Scores

write = Scores.write


def told(self, folder):
    with open(folder / "writers", "a") as file:
        file.write(os.environ.get("LOCAL_RANK", "0"))
    write(self, folder)


Scores.write = told
train.main()
"""


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_a_finished_run_of_two_processes_gets_what_is_missing(tmp_path):
    """Nothing is trained then, and processes that Lightning starts meet to evaluate."""
    (script := tmp_path / "script.py").write_text(WRITES)
    out = tmp_path / "run"
    lines = ["method=simclr", "backbone.width=8", "method.hidden=16", "data.limit=64"]
    lines += ["data.batch_size=32", "trainer.max_epochs=1", "trainer=ddp", "baselines=false"]
    lines += ["trainer.accelerator=cpu", "trainer.devices=2", f"hydra.run.dir={out}"]
    found = []
    for evals in ("evals=knn", "evals=[knn,clustering]"):
        command = [sys.executable, str(script), *lines, evals]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Starting with 2 processes" in done.stderr + done.stdout
        found.append(json.loads((out / "scores.json").read_text()))
    before, after = found
    assert {name: after[name] for name in before} == before
    assert any(name.startswith("clustering/") for name in after)
    assert {*(out / "writers").read_text()} == {"0"}
