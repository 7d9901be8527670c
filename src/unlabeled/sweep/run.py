"""One member of a sweep in this process."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus, run_job
from omegaconf import DictConfig, OmegaConf, open_dict

from unlabeled import slurm
from unlabeled.errors import InputError
from unlabeled.report import sweep as table
from unlabeled.sweep import command, members
from unlabeled.sweep.members import Member

STATES = {0: "finished", 130: "interrupted"}  # by the code of a member's command


def run(
    *,
    context: Any,
    config: DictConfig,
    task: Callable[[DictConfig], Any],
    sweep: Path,
    number: int,
    overrides: Sequence[str],
    more: Sequence[str] = (),
    job: str | None = None,
    program: Sequence[str] = (),
) -> Member:
    """Runs a member to its end, and keeps its record and the sweep's table.

    Args:
        context: Hydra's.
        config: the sweep's, with Hydra's part.
        task: gets the member's config.
        sweep: the sweep's folder.
        number: the member's.
        overrides: the member's, whose record has them without secrets.
        more: overrides that the launcher adds to the member's own.
        job: SLURM's number of it.
        program: what starts a run, for a member of several processes; empty: they are started.

    Returns:
        The member as it ended. What is no `Exception` goes on to the caller, noted.
    """
    member = members.load(sweep, number)
    writes = slurm.first()
    if writes:
        member = members.started(sweep, number, job=job)
        table.write(sweep)

    def note(state: str, reason: str | None, code: int = 0) -> Member:
        if not writes:
            return member
        ended = members.ended(sweep, number, state, reason, code)
        table.write(sweep)
        return ended

    slurm.watch.on_leave = note
    try:
        single = context.config_loader.load_sweep_config(config, [*overrides, *more])
        with open_dict(single):
            single.hydra.job.num = number
            single.hydra.job.id = job or str(number)
        folder = _folder(sweep, single)
        if writes:
            _claim(sweep, member, folder)
        if program and command.several(single):
            own = {"sweep": sweep, "folder": folder, "number": number}
            code, said = command.call(command.line(program, config, overrides, **own))
            slurm.watch.on_leave = None
            return note(STATES.get(code, "failed"), *_reason(code, said))
        done = run_job(
            hydra_context=context,
            task_function=task,
            config=single,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except Exception as error:
        return note("failed", _told(error), _code(error))
    except slurm.Stopped:
        raise  # whoever leaves notes it
    except BaseException as error:
        note("interrupted", type(error).__name__)
        raise
    slurm.watch.on_leave = None
    if done.status == JobStatus.COMPLETED:
        return note("finished", None)
    error = done._return_value
    return note("failed", _told(error), _code(error))


def _reason(code: int, said: str) -> tuple[str | None, int]:
    return (command.why(code, said), 2 if code == 2 else 1) if code else (None, 0)


def _folder(sweep: Path, single: DictConfig) -> str:
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(single)  # `${hydra:job.num}` looks there
    try:
        return str(OmegaConf.select(single, "hydra.sweep.subdir"))
    finally:
        HydraConfig.instance().cfg = before


def _claim(sweep: Path, member: Member, folder: str) -> None:
    """Notes a member's folder, unless it is another's."""
    for other in members.records(sweep):
        if other.number != member.number and other.folder == folder:
            raise InputError(
                f"{sweep / folder} is the folder of member {other.number}: have "
                "hydra.sweep.subdir tell members apart, e.g. by ${hydra:job.num}"
            )
    members.update(sweep, member.number, folder=folder)


def _code(error: Any) -> int:
    return 2 if isinstance(error, InputError) else 1


def _told(error: Any) -> str:
    """What happened in one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    text = "; ".join(line.strip() for line in lines[:4]) if _code(error) == 2 else lines[0]
    return text if _code(error) == 2 else f"{type(error).__name__}: {text}"


def threads(slots: int) -> dict[str, str]:
    """Environment that shares this machine's cores among members that run at once."""
    if "OMP_NUM_THREADS" in os.environ or slots < 2:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // slots))}
