"""Inside a SLURM job: the warning before the end, and going on in another try of the same job.

SLURM warns by a signal before a time limit (`--signal`) or a preemption, and by SIGTERM at the
very end. The run saves at its next update, puts its job back in the queue and ends; the next try
has the same number and folder, and goes on from the checkpoint. Nobody else may requeue: these
handlers replace submitit's, and `environment` is Lightning's without its own.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from unlabeled.errors import InputError

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
INTERACTIVE = ("bash", "interactive")  # names of jobs that a person types in
MARGIN = 15  # seconds before the end of the time at which nothing is waited for any more
PATIENCE = {signal.SIGTERM: 10}  # what SLURM kills after is KillWait, 30 s unless configured
MOST_PATIENCE = 90  # seconds: a preemption has its own limit, which a job cannot ask for
COMMAND_SECONDS = 30


class Stopped(BaseException):
    """SLURM's warning ends this try of a run; no `except Exception` may keep it."""

    state = "interrupted"


class Watch:
    """This process's ear for the warning."""

    def __init__(self) -> None:
        self.warned: signal.Signals | None = None
        self.training = False  # whether somebody looks at `warned` between updates
        self.most = 100  # tries
        self.on_leave: Callable[[str, str], Any] | None = None  # (state, reason)
        self.answer: str | None = None  # of SLURM to the wish to be requeued; "" is yes
        self._process = 0
        self._asking = threading.Lock()

    def listen(self, most: int | None = None) -> None:
        """Takes the signals; in a batch job only, and again whenever somebody else took them.

        Args:
            most: tries after which the job is not put back in the queue any more.
        """
        self.most = self.most if most is None else most
        if inside() and threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            for number in SIGNALS:
                signal.signal(number, self._hear)

    def requeue(self) -> str:
        """Puts this job back in the queue, once; empty, or why that was not done."""
        with self._asking:
            if self.answer is None:
                self.answer = _requeue(self.most) if first() else ""
            return self.answer

    def leave(self, why: str) -> NoReturn:
        """Requeues and ends the process at once: SLURM kills what stays, and waits for nobody."""
        refused = self.requeue()
        state = "interrupted" if refused else "queued"
        with suppress(Exception):
            if self.on_leave is not None and first():
                self.on_leave(state, f"{why}; {refused or 'requeued'}")
        print(f"unlabeled: {why}; {refused or 'requeued'}", file=sys.stderr)
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1 if refused else 0)

    def _hear(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process or self.warned is not None:
            return  # a data worker, which inherits handlers; or told again
        self.warned = signal.Signals(number)
        threading.Thread(target=self._last_resort, args=(self.warned,), daemon=True).start()
        if not self.training:
            raise Stopped(f"{self.warned.name} from SLURM")

    def _last_resort(self, number: signal.Signals) -> None:
        """Goes back to the queue with the last checkpoint, if no update ends in time."""
        patience = PATIENCE.get(number) or min(MOST_PATIENCE, max(5, _left() - MARGIN))
        threading.Event().wait(patience)
        self.leave(f"{number.name} from SLURM, and no update ended within {patience:.0f} s")


watch = Watch()


def inside() -> bool:
    """Whether this process is part of a batch job."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE


def first() -> bool:
    """Whether this is the job's first process, which alone speaks to SLURM and writes."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


def number() -> str:
    """The job as SLURM's commands name it: `12`, or `7_1` for the second of an array."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{x}_ID") for x in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def environment() -> list[Any]:
    """Lightning's plugins of a batch job: its processes, without its requeue."""
    from pytorch_lightning.plugins.environments import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def check(num_nodes: int, num_devices: int) -> None:
    """Refuses a trainer of another size than the job: every process would train for itself.

    Raises:
        InputError: the job has other numbers of nodes or of processes.
    """
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if not inside() or "SLURM_PROCID" not in os.environ or tasks == num_nodes * num_devices:
        return
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    raise InputError(
        f"SLURM started {tasks} processes on {nodes} nodes, but trainer.num_nodes={num_nodes} "
        f"trainer.devices={num_devices} are {num_nodes * num_devices}: write "
        f"trainer=ddp trainer.num_nodes={nodes} trainer.devices={max(1, tasks // nodes)}"
    )


def _requeue(most: int) -> str:
    job = number()
    tries = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    said = _ask("scontrol", "show", "job", "--oneliner", job)[1]
    now = dict(re.findall(r"\b(JobState|Reason|Restarts)=(\S+)", said))
    if int(now.get("Restarts", tries)) > tries:
        return ""  # SLURM did: a preemption without a warning, or somebody by hand
    state = now.get("JobState")  # of a job that ends it is COMPLETING, however it ends
    if state == "CANCELLED" or (state == "COMPLETING" and now.get("Reason") != "TimeLimit"):
        return "cancelled in SLURM"
    if tries >= most:
        return f"requeued {most} times already (launcher.requeues)"
    code, said = _ask("scontrol", "requeue", job)
    return f"SLURM did not requeue it ({said.strip()})" if code else ""


def _left() -> float:
    """Seconds of this job's time that are left; an hour where SLURM does not say."""
    said = _ask("squeue", "--noheader", "--format=%L", "--jobs", os.environ["SLURM_JOB_ID"])[1]
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", said.strip())
    if not found:
        return 3600.0
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def _ask(*command: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout + done.stderr
