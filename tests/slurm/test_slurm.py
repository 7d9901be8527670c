"""On a real SLURM of two nodes that lie on this machine: sweeps, DDP, requeues, failures.

`make slurm-test` runs all of it, the fast tests a sweep with a requeue. Where SLURM cannot be
started or installed they are skipped and say why.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "scripts/slurm/cluster.py"
CONF = "/run/unlabeled-slurm/etc/slurm.conf"
pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(900)]

TINY = [
    *("method=simclr", "method.hidden=32", "optim@method.optim=sgd"),
    *("augment@method.augment=mild", "backbone.width=16", "data.batch_size=16", "data.limit=64"),
    *("trainer=cpu", "trainer.precision=32-true", "trainer.max_epochs=-1", "evals=none"),
    *("trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_epochs=null"),
]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """SLURM's environment; what was not up before is stopped afterwards."""
    done = subprocess.run(
        [sys.executable, CLUSTER, "up"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()
        pytest.skip(f"no SLURM here: {reason[0] if reason else 'cluster.py up failed'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", CONF)
        patch.setenv("OMP_NUM_THREADS", "1")
        # jobs import torch again and again: compiled files are kept for all of them
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("compiled")))
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield
    if "already" not in done.stdout:
        subprocess.run([sys.executable, CLUSTER, "down"], check=True)


def command(*overrides):
    return [sys.executable, "-m", "unlabeled.train", *map(str, overrides)]


def sweeping(folder, *overrides):
    """A sweep on SLURM that has just been started."""
    words = ["-m", "hydra/launcher=slurm", "launcher.time=30", f"hydra.sweep.dir={folder}"]
    out = Path(folder).with_suffix(".log").open("a")
    return subprocess.Popen(
        command(*words, *TINY, *overrides), stdout=out, stderr=subprocess.STDOUT
    )


def ended(process, folder, seconds=420):
    """A sweep's exit code and what it said."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    said = Path(folder).with_suffix(".log").read_text()
    logs = "".join(p.read_text()[-1500:] for p in Path(folder).glob(".submitit/*/*.err"))
    return code, f"{said}\n{logs}"


def members(folder):
    with (Path(folder) / "sweep.csv").open(newline="") as file:
        return {int(row["member"]): row for row in csv.DictReader(file)}


def waited(what, seconds=180):
    """The first true value of a function."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.3)
    return value


def said(*words):
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def losses(run):
    path = Path(run) / "metrics.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]


def states(job):
    """What the accounting says of every try of a job."""
    lines = said("sacct", "-n", "-P", "-X", "-D", "-j", job, "-o", "State").splitlines()
    return [line.split()[0] for line in lines if line]


def job_of(folder, number=0):
    def known():
        path = Path(folder) / ".members/jobs"
        return json.loads(path.read_text()).get(str(number)) if path.exists() else None

    return waited(known)


def same(first, second):
    """Two runs ended with the same weights, optimizer and metrics, bit for bit."""
    assert losses(first) == losses(second)
    a, b = (
        torch.load(Path(run) / "checkpoints/last.ckpt", weights_only=True)
        for run in (first, second)
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        left, right = tree_leaves(a[part]), tree_leaves(b[part])
        assert len(left) == len(right) > 0
        for x, y in zip(left, right, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def whole(folder, *overrides):
    """The same run, never interrupted, in one process."""
    done = subprocess.run(
        command(*TINY, *overrides, f"hydra.run.dir={folder}"),
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "SLURM_CONF"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "values", ["0.2,-1", pytest.param("0.2,-1,0.1", marks=pytest.mark.slow)], ids=["two", "three"]
)
def test_a_sweep_with_a_failure_and_a_requeue(slurm, tmp_path, values):
    lines = ["trainer.max_steps=60", f"method.temperature={values}"]
    sweep, kinds = tmp_path / "sweep", ["finished", "failed", "finished"][: values.count(",") + 1]
    limit = [] if len(kinds) == 2 else ["launcher.jobs=2"]
    process = sweeping(sweep, *lines, "launcher.memory=1", "launcher.cpus_per_task=1", *limit)
    job = job_of(sweep)
    assert re.fullmatch(r"\d+_0", job)  # a job of an array
    waited(lambda: len(losses(sweep / "0")) >= 3)
    said("scancel", "--signal=USR2", job)  # as before a preemption
    code, text = ended(process, sweep)
    assert code == 2, text  # one member was refused
    found = members(sweep)
    assert [row["status"] for row in found.values()] == kinds, text
    assert "temperature must be positive" in found[1]["reason"]
    assert [row["tries"] for row in found.values()] == ["2", "1", "1"][: len(kinds)], text
    assert found[0]["job"] == job
    waited(lambda: states(job) == ["REQUEUED", "COMPLETED"], 30)
    array = job.partition("_")[0]
    waited(lambda: states(f"{array}_1") == ["FAILED"], 30)
    if limit:
        assert states(f"{array}_2") == ["COMPLETED"]
        assert "ArrayTaskThrottle=2" in said("scontrol", "show", "job", array)
    for column in ("`method.temperature`", "`status`", "`time`", "`reason`"):
        assert column in (sweep / "sweep.md").read_text()
    assert len(losses(sweep / "0")) == 60
    same(sweep / "0", whole(tmp_path / "whole", lines[0], "method.temperature=0.2"))


@pytest.mark.slow
def test_two_nodes_train_as_one_process(slurm, tmp_path):
    # small steps: in large ones rounding, which differs, grows by itself
    lines = ["trainer.max_steps=8", "backbone.norm=sync", "method.optim.lr=0.001"]
    process = sweeping(tmp_path / "two", *lines, "launcher.nodes=2", "trainer.strategy=ddp")
    code, text = ended(process, tmp_path / "two")
    assert code == 0, text
    job = job_of(tmp_path / "two")
    assert said("sacct", "-n", "-P", "-X", "-j", job, "-o", "NNodes").split() == ["2"]
    one = whole(tmp_path / "one", *lines, "trainer.strategy=ddp")
    first, second = ([float(x) for x in losses(run)] for run in (one, tmp_path / "two/0"))
    assert len(first) == 8
    assert second == pytest.approx(first, rel=1e-3)


@pytest.mark.slow
def test_a_run_that_meets_its_time_limit_goes_on(slurm, tmp_path):
    lines = ["trainer.max_steps=2500", "seed=3", "logger=wandb"]
    os.environ["WANDB_MODE"] = "offline"
    sweep = tmp_path / "sweep"
    try:
        process = sweeping(sweep, *lines, "launcher.warning=20")
        job = job_of(sweep)
        waited(lambda: len(losses(sweep / "0")) >= 5)
        wandb = (sweep / "0/wandb_id").read_text()
        said("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        waited(lambda: "REQUEUED" in states(job), 120)
        made = len(losses(sweep / "0"))
        assert 5 <= made < 2500
        said("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        code, text = ended(process, sweep)
    finally:
        os.environ["WANDB_MODE"] = "disabled"
    assert code == 0, text
    assert waited(lambda: states(job)[-1] == "COMPLETED", 30)
    assert members(sweep)[0]["tries"] == "2", text
    assert (sweep / "0/wandb_id").read_text() == wandb
    assert len(list((sweep / "0/wandb").glob(f"*run-*-{wandb}"))) == 2  # two parts of one run
    same(sweep / "0", whole(tmp_path / "whole", *lines[:2]))


@pytest.mark.slow
def test_two_nodes_are_requeued_together(slurm, tmp_path):
    lines = ["trainer.max_steps=400", "launcher.nodes=2"]
    sweep = tmp_path / "sweep"
    process = sweeping(sweep, *lines)
    job = job_of(sweep)
    waited(lambda: len(losses(sweep / "0")) >= 5)
    said("scancel", "--signal=USR1", job)
    code, text = ended(process, sweep)
    assert code == 0, text
    assert members(sweep)[0]["tries"] == "2", text
    found = [int(row) for row in _steps(sweep / "0")]
    assert found == list(range(400))


def _steps(run):
    with (run / "metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_requeued_but_can_go_on(slurm, tmp_path):
    lines = ["trainer.max_steps=600", "seed=4"]
    sweep = tmp_path / "sweep"
    process = sweeping(sweep, *lines)
    job = job_of(sweep)
    waited(lambda: len(losses(sweep / "0")) >= 5)
    said("scancel", job)
    code, text = ended(process, sweep)
    assert code == 1, text
    found = members(sweep)[0]
    assert found["status"] == "interrupted", text
    assert "cancelled in SLURM" in found["reason"]
    assert waited(lambda: states(job) == ["CANCELLED"], 30)
    made = len(losses(sweep / "0"))
    saved = torch.load(sweep / "0/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 5 <= saved == made < 600
    code, text = ended(sweeping(sweep, *lines), sweep)
    assert code == 0, text
    assert members(sweep)[0]["tries"] == "2"
    same(sweep / "0", whole(tmp_path / "whole", *lines))


@pytest.mark.slow
def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(slurm, tmp_path):
    lines = ["trainer.max_steps=600", "seed=5", "callbacks.checkpoint.every_n_steps=10"]
    sweep = tmp_path / "sweep"
    process = sweeping(sweep, *lines)
    job = job_of(sweep)
    waited(lambda: len(losses(sweep / "0")) >= 15)
    node = said("squeue", "-h", "-j", job, "-o", "%N").strip()
    pid = Path(f"/run/unlabeled-slurm/slurmd-{node}.pid")
    os.kill(int(pid.read_text()), signal.SIGKILL)
    _kill(job)
    pid.unlink()
    said("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=died")
    try:
        code, text = ended(process, sweep)
    finally:
        said("slurmd", "-N", node, "-f", CONF)
        waited(lambda: node in said("sinfo", "-h", "-N", "-o", "%N %t").replace("down", ""))
        resume = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        subprocess.run(resume, capture_output=True, check=False)  # it may be back already
    assert code == 0, text
    assert members(sweep)[0]["tries"] == "2", text
    assert states(job)[-1] == "COMPLETED"
    same(sweep / "0", whole(tmp_path / "whole", *lines))


def _kill(job):
    """All processes of a job, those that watch over it first."""
    ours, parents = [], set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_JOB_ID={job}\0" in (path / "environ").read_text(errors="replace"):
                ours.append(int(path.name))
                parents.add(int((path / "stat").read_text().rpartition(")")[2].split()[1]))
        except OSError:
            continue
    watching = []
    for parent in parents:
        try:
            if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text():
                watching.append(parent)
        except OSError:
            continue
    for pid in [*watching, *ours]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.slow
def test_the_table_says_what_slurm_refuses(slurm, tmp_path):
    sweep = tmp_path / "sweep"
    process = sweeping(sweep, "trainer.max_steps=1", "launcher.partition=nowhere", "seed=0,1")
    code, text = ended(process, sweep, 120)
    assert code == 2, text
    for row in members(sweep).values():
        assert row["status"] == "failed"
        assert "invalid partition" in row["reason"].lower()


@pytest.mark.slow
def test_a_job_that_people_wrote_themselves(slurm, tmp_path):
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m unlabeled.train "$@"\n')
    program.chmod(0o755)
    job = said(
        *("env", f"UNLABELED={program}", "sbatch", "--parsable", "--nodes=2"),
        *("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30"),
        *(f"--chdir={tmp_path}", str(ROOT / "scripts/slurm/train.sbatch")),
        *(line for line in TINY if line != "trainer=cpu"),
        *("trainer.accelerator=cpu", "trainer.max_steps=300"),
    ).strip()
    run = tmp_path / "outputs/slurm" / job
    waited(lambda: len(losses(run)) >= 5)
    said("scancel", "--signal=USR2", job)
    waited(lambda: states(job)[-1] in ("COMPLETED", "FAILED", "CANCELLED"), 300)
    log = (tmp_path / f"slurm-{job}.log").read_text()
    assert states(job) == ["REQUEUED", "COMPLETED"], log
    assert [int(step) for step in _steps(run)] == list(range(300)), log
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
