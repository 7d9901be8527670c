"""Members as jobs of a SLURM array, by submitit and Hydra's launcher for it.

Each job writes how its member is doing itself, so that it goes on when the process that submitted
it is gone; this side only writes what a job cannot: that it died without a word.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from unlabeled import slurm
from unlabeled.errors import InputError
from unlabeled.sweep import members
from unlabeled.sweep.launch import say, told
from unlabeled.sweep.local import tail
from unlabeled.sweep.members import Member
from unlabeled.sweep.settings import Settings

JOBS = "jobs"  # member -> SLURM's number of its job; in the records' folder
WAITS = "waits"  # member -> why SLURM lets it wait
MISSES = 3  # looks at the queue without a job until it counts as gone
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
ENDS += ("BOOT_FAIL", "PREEMPTED")


def run_array(launcher: Any, sweep: Path, todo: list[Member], settings: Settings) -> None:
    """Submits members of a Hydra launcher as one array, and waits for them.

    Members whose jobs an earlier start submitted are waited for, if these still exist.

    Raises:
        InputError: SLURM, or the optional package, is not here; the trainer contradicts the job.
    """
    if shutil.which("sbatch") is None:
        raise InputError("hydra/launcher=slurm: there is no `sbatch` here; is this a login node?")
    here = queue() or {}
    kept = _json(sweep / members.RECORDS / JOBS)
    jobs = {m.number: kept[str(m.number)] for m in todo if kept.get(str(m.number)) in here}
    new = [m for m in todo if m.number not in jobs]
    if new:
        jobs |= _submit(launcher, sweep, new, settings)
        _write(sweep / members.RECORDS / JOBS, {**kept, **{str(n): j for n, j in jobs.items()}})
    if jobs:
        say("SLURM jobs " + " ".join(sorted(set(jobs.values()))))
    try:
        _wait(sweep, jobs)
    except KeyboardInterrupt:
        say(
            "the jobs go on without this process, and so does the table; the same command with "
            f"hydra.sweep.dir={sweep} waits for them again, scancel ends them"
        )
        raise


def sizes(settings: Settings, overrides: list[str], strategy: str) -> list[str]:
    """What the trainer must be told of a job of several processes.

    Raises:
        InputError: the command line says another number.
    """
    if settings.nodes * settings.tasks == 1:
        return []
    typed = dict(line.lstrip("+").split("=", 1) for line in overrides if "=" in line)
    wanted = {"trainer.num_nodes": settings.nodes, "trainer.devices": settings.tasks}
    for key, value in wanted.items():
        if key in typed and typed[key] != str(value):
            raise InputError(
                f"{key}={typed[key]}, but the job has launcher.nodes={settings.nodes} with "
                f"{settings.tasks} processes each: leave {key} to the launcher, which sets it"
            )
    more = [f"{key}={value}" for key, value in wanted.items()]
    return [*more, "trainer.strategy=ddp"] if strategy == "auto" else more


def parameters(settings: Settings) -> dict[str, Any]:
    """Settings under the names of submitit's executor."""
    setup = list(settings.setup)
    if settings.cpus_per_task:  # srun of SLURM 22.05 to 23.02 forgets it
        setup.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    given: dict[str, Any] = {
        "timeout_min": settings.minutes,
        "nodes": settings.nodes,
        "tasks_per_node": settings.tasks,
        "cpus_per_task": settings.cpus_per_task,
        "gpus_per_node": settings.gpus_per_node,
        "mem_gb": settings.memory,
        "name": "unlabeled",
        "slurm_account": settings.account,
        "slurm_partition": settings.partition,
        "slurm_qos": settings.qos,
        "slurm_constraint": settings.constraint,
        "slurm_exclude": settings.exclude,
        "slurm_signal_delay_s": settings.warning,
        "slurm_array_parallelism": settings.jobs or 256,
        "slurm_setup": setup or None,
        "slurm_srun_args": ["--kill-on-bad-exit=1"],  # one process alone would wait for the rest
        "slurm_additional_parameters": {"requeue": True, **settings.options},
    }
    return {key: value for key, value in given.items() if value is not None}


def queue() -> dict[str, tuple[str, str]] | None:
    """This user's jobs that have not ended: number -> (state, why it waits); None: no answer."""
    code, said = slurm._ask("squeue", "--me", "--noheader", "--array", "--format=%F|%K|%A|%T|%r")
    if code:
        return None
    found = {}
    for line in said.splitlines():
        parts = line.split("|", 4)
        if len(parts) == 5:
            array, task, job, state, reason = parts
            found[f"{array}_{task}" if task.isdecimal() else job] = state, reason
    return found


def ending(job: str) -> str | None:
    """How the accounting says that a job ended; None if it did not, or nobody knows."""
    code, said = slurm._ask("sacct", "--noheader", "--parsable2", "-X", "-j", job, "-o", "State")
    states = [line.split()[0] for line in said.splitlines() if line.strip()]
    return states[-1] if not code and states and states[-1] in ENDS else None


def _submit(launcher: Any, sweep: Path, new: list[Member], settings: Settings) -> dict[int, str]:
    try:
        import submitit
        from submitit.core.utils import FailedJobError

        from unlabeled.sweep.submitted import Submitted
    except ImportError as error:
        raise InputError(
            f"hydra/launcher=slurm needs: pip install 'unlabeled[slurm]' ({error})"
        ) from error
    strategy = str(OmegaConf.select(launcher.config, "trainer.strategy"))
    more = {m.number: sizes(settings, m.overrides, strategy) for m in new}
    executor = submitit.AutoExecutor(cluster="slurm", folder=sweep / ".submitit" / "%j")
    call = Submitted(sweep=str(sweep), requeues=settings.requeues)
    call.setup(
        hydra_context=launcher.hydra_context,
        task_function=launcher.task_function,
        config=launcher.config,
    )
    try:
        executor.update_parameters(**parameters(settings))
        with executor.batch():
            jobs = [executor.submit(call, m.number, m.overrides, more[m.number]) for m in new]
        return {m.number: job.job_id for m, job in zip(new, jobs, strict=True)}
    except (FailedJobError, NameError) as error:  # sbatch's refusal; an option nobody knows
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = [line for line in lines if "sbatch" in line] or lines[-1:]
        reason = "; ".join(said).removeprefix("subprocess.CalledProcessError: ")
        for i, m in enumerate(new):
            told(sweep, members.ended(sweep, m.number, "failed", reason, 2), len(new) - i - 1)
        return {}


def _wait(sweep: Path, jobs: Mapping[int, str]) -> None:
    left, missed = dict(jobs), dict.fromkeys(jobs, 0)
    pause, waits = 0.5, {}
    while left:
        time.sleep(pause)
        pause = min(10.0, pause * 1.2)
        here = queue()
        for number, job in list(left.items()):
            member = members.load(sweep, number)
            if member.state not in members.ENDED:
                missed[number] = 0 if here is None or job in here else missed[number] + 1
                if not missed[number]:
                    continue
                state = ending(job)
                member = members.load(sweep, number)  # it may have said so meanwhile
                if member.state not in members.ENDED:
                    if state is None and missed[number] < MISSES:
                        continue
                    member = _died(sweep, number, job, state)
            del left[number]
            pause = 0.5
            told(sweep, member, len(left))
        now = {str(n): list((here or {})[j]) for n, j in left.items() if j in (here or {})}
        if now != waits:
            waits = now
            _write(sweep / members.RECORDS / WAITS, waits)
            from unlabeled.report import sweep as table

            table.write(sweep)


def _died(sweep: Path, number: int, job: str, state: str | None) -> Member:
    said = tail(sweep / ".submitit" / job / f"{job}_0_log.err")
    reason = f"{state or 'gone'} in SLURM" + (f": {said}" if said else "")
    ended = "interrupted" if state == "CANCELLED" else "failed"
    return members.ended(sweep, number, ended, reason)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)
