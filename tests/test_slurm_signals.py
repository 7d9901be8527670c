"""What a run answers to SLURM's signals, with commands that only pretend to be SLURM's."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from unlabeled import slurm
from unlabeled.errors import InputError


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function: what `scontrol show job` says -> None; `asked` is where requests end up."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NAME", "unlabeled")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def says(text, code=0):
        program = tmp_path / "scontrol"
        program.write_text(
            f'#!/bin/sh\nif [ "$1" = show ]; then echo "{text}"; exit; fi\n'
            f'echo "$@" >> {tmp_path}/asked; echo no such luck >&2; exit {code}\n'
        )
        program.chmod(0o755)
        squeue = tmp_path / "squeue"
        squeue.write_text("#!/bin/sh\necho 1-02:03:04\n")
        squeue.chmod(0o755)

    says.asked = tmp_path / "asked"
    return says


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        ("JobState=RUNNING Reason=None Restarts=0", ""),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0", ""),
        ("JobState=COMPLETING Reason=None Restarts=0", "cancelled in SLURM"),
        ("JobState=CANCELLED Reason=None Restarts=0", "cancelled in SLURM"),
    ],
)
def test_who_is_requeued(job, state, answer):
    job(state)
    watch = slurm.Watch()
    assert watch.requeue() == answer
    assert watch.requeue() == answer  # once
    asked = job.asked.read_text().splitlines() if job.asked.exists() else []
    assert asked == ([] if answer else ["requeue 12"])


def test_what_slurm_requeued_itself_is_not_requeued_again(job):
    job("JobState=COMPLETING Reason=None Restarts=1")
    assert slurm.Watch().requeue() == ""
    assert not job.asked.exists()


def test_a_member_of_an_array_is_requeued_alone(job, monkeypatch):
    job("JobState=RUNNING Restarts=0")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    slurm.Watch().requeue()
    assert job.asked.read_text() == "requeue 7_3\n"


def test_requeues_end_some_time_and_refusals_are_told(job, monkeypatch):
    job("JobState=RUNNING Restarts=3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    watch = slurm.Watch()
    watch.most = 3
    assert "requeued 3 times already" in watch.requeue()
    job("JobState=RUNNING Restarts=3", code=1)
    assert slurm.Watch().requeue() == "SLURM did not requeue it (no such luck)"


def test_only_the_first_process_asks(job, monkeypatch):
    job("JobState=RUNNING Restarts=0")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert slurm.Watch().requeue() == ""
    assert not job.asked.exists()


def test_time_left(job):
    job("")
    assert slurm._left() == ((24 + 2) * 60 + 3) * 60 + 4


def test_a_job_and_a_trainer_of_other_sizes(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NAME", "unlabeled")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    slurm.check(1, 1)  # no process of srun's
    monkeypatch.setenv("SLURM_PROCID", "0")
    slurm.check(2, 2)
    with pytest.raises(InputError, match=r"trainer\.num_nodes=2 trainer\.devices=2"):
        slurm.check(1, 1)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    slurm.check(1, 1)


WARNED = """
    import os, signal, sys, time
    from unlabeled import slurm
    slurm.watch.listen()
    child = os.fork()
    if child == 0:  # a data worker
        time.sleep(1.5)
        os._exit(0)
    slurm.watch.on_leave = lambda state, reason: print(state, reason, flush=True)
    try:
        os.kill(child, signal.SIGTERM)
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        time.sleep(5)
    except slurm.Stopped as stop:
        assert os.waitpid(child, 0)[1] == 0
        os.kill(os.getpid(), signal.SIGTERM)  # SLURM goes on
        slurm.watch.leave(str(stop))
"""


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_before_training_a_warning_ends_the_run_at_once(job, name):
    job("JobState=RUNNING Restarts=0")
    line = [sys.executable, "-c", textwrap.dedent(WARNED), name]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"queued {name} from SLURM; requeued\n"
    assert job.asked.read_text() == "requeue 12\n"


def test_outside_of_jobs_signals_are_left_alone(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    slurm.Watch().listen()
    assert signal.getsignal(signal.SIGTERM) is before
