"""Sweeps whose members are several processes each."""

import csv
import json
import os
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf
from test_runs import TINY

from unlabeled.report.run import read
from unlabeled.sweep import command, members

LINES = [
    *(line for line in TINY if line != "trainer=cpu"),
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=2"),
    *("evals=none", "callbacks=none", "backbone.width=8"),
]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("launcher", ["serial", "local"])
def test_a_member_of_two_processes(tmp_path, launcher):
    # Runs of processes within this one leave their places behind: a rank would wait for others.
    places = {"LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    clean = {name: value for name, value in os.environ.items() if name not in places}
    sweep = tmp_path / "it's a sweep"
    quoted = str(sweep).replace("'", "\\'")
    lines = [*LINES, f"hydra/launcher={launcher}", "seed=3", f"hydra.sweep.dir='{quoted}'"]
    done = subprocess.run(
        [sys.executable, "-m", "unlabeled.train", "-m", *lines],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=clean,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    (member,) = members.records(sweep)
    assert (member.state, member.tries) == ("finished", 1)
    with (sweep / "0/metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    status = json.loads((sweep / "0/status.json").read_text())
    assert status["state"] == "finished"
    assert status["identity"]["seed"] == 3
    assert read(sweep / "0").sweep == sweep
    if launcher == "local":
        said = members.log_path(sweep, 0).read_text()
    assert "MEMBER: 2/2" in said


@pytest.mark.parametrize(
    ("trainer", "wanted"),
    [
        ({"accelerator": "cpu", "devices": "auto", "num_nodes": 1}, False),
        ({"accelerator": "auto", "devices": "auto", "num_nodes": 1}, True),
        ({"accelerator": "cpu", "devices": 1, "num_nodes": 1}, False),
        ({"accelerator": "cpu", "devices": "2", "num_nodes": 1}, True),
        ({"accelerator": "gpu", "devices": [3], "num_nodes": 1}, False),
        ({"accelerator": "gpu", "devices": "0,3", "num_nodes": 1}, True),
        ({"accelerator": "cpu", "devices": 1, "num_nodes": 2}, True),
        (None, False),
    ],
)
def test_which_members_have_several_processes(monkeypatch, trainer, wanted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert command.several(OmegaConf.create({"trainer": trainer})) == wanted


def test_a_members_command_has_what_the_sweep_set(tmp_path):
    given = ["+hydra.job.env_set.A=b", "hydra/launcher=local", "hydra.sweep.dir=x"]
    config = OmegaConf.create({"hydra": {"overrides": {"hydra": given}}})
    own = {"sweep": tmp_path, "folder": "4", "number": 4}
    assert command.line(["unlabeled"], config, ["seed=1"], **own) == [
        *("unlabeled", "seed=1", "+hydra.job.env_set.A=b", f"hydra.run.dir='{tmp_path}/4'"),
        *(f"hydra.sweep.dir='{tmp_path}'", "hydra.sweep.subdir='4'", "hydra.job.id='4'"),
        "hydra.job.num=4",
    ]


def test_all_processes_of_a_command_end_with_it(tmp_path):
    left = f"import time; time.sleep(1); open({str(tmp_path / 'left')!r}, 'w')"
    code = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {left!r}])
print("unlabeled: what a pity", file=sys.stderr)
sys.exit(2)
"""
    code, said = command.call([sys.executable, "-c", code])
    assert (code, command.why(code, said)) == (2, "what a pity")
    time.sleep(1.2)
    assert not (tmp_path / "left").exists()


def test_why_a_command_ended():
    said = "noise\nunlabeled: RuntimeError: bad luck\n(debug=true shows the traceback)\nmore"
    assert command.why(1, said) == "RuntimeError: bad luck"
    assert command.why(2, "unlabeled: two mistakes:\n  - a\n  - b\n") == "two mistakes:; - a; - b"
    assert command.why(-9, "half") == "killed by signal 9: half"
    assert command.why(1, "") == "ended with code 1"
