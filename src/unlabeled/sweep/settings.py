"""What the config's `launcher` asks for, checked before anything starts."""

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from unlabeled.annotations import mistake, nearest, shown
from unlabeled.config import summary
from unlabeled.errors import InputError

LEAST = {"jobs": 1, "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1}
LEAST |= {"memory": 1, "warning": 10, "requeues": 0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Resources of each member of a sweep.

    Args:
        jobs: how many run at once; None: as many as fit.
        nodes: machines of a member.
        gpus_per_node: GPUs of each; None or 0: none asked for.
        tasks_per_node: processes of each; None: one per GPU, at least one.
        cpus_per_task: CPU cores of a process, data workers included.
        memory: of a node, in GB.
        time: minutes, or SLURM's `hours:minutes:seconds` and `days-hours`.
        account, partition, qos, constraint, exclude: SLURM's.
        warning: seconds between the signal to save and the end of the time.
        requeues: how often a member may go on after it was stopped.
        setup: shell commands before the start, e.g. `module load cuda`.
        options: further options of sbatch, long names without dashes.
    """

    jobs: int | None = None
    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: float | int | None = None
    time: int | str = 60
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    warning: int = 120
    requeues: int = 100
    setup: list[str] = field(default_factory=list)
    options: dict[str, str | int | float | bool] = field(default_factory=dict)

    @property
    def tasks(self) -> int:
        """Processes of a node."""
        return self.tasks_per_node or max(1, self.gpus_per_node or 0)

    @property
    def minutes(self) -> int:
        """The time limit, rounded up to minutes."""
        return minutes(self.time)


def read(node: Mapping[str, Any]) -> Settings:
    """The settings in a config's `launcher`.

    Raises:
        InputError: naming every unknown key and every value that cannot be.
    """
    hints = typing.get_type_hints(Settings)
    names = [f.name for f in fields(Settings)]
    found = []
    for key, value in node.items():
        if key not in names:
            near = nearest(str(key), names)
            found.append(f"`launcher.{key}`: " + (f"did you mean `{near}`?" if near else "unknown"))
        elif problem := mistake(value, hints[key]):
            found.append(f"`launcher.{key}={shown(value)}`: {problem}")
        elif key in LEAST and value is not None and value < LEAST[key]:
            found.append(f"`launcher.{key}={shown(value)}`: must be at least {LEAST[key]}")
    if not found:
        settings = Settings(**node)
        try:
            if settings.minutes * 60 <= settings.warning:
                found.append(
                    f"`launcher.time={settings.time}`: shorter than launcher.warning, "
                    f"{settings.warning} s: nothing could be saved"
                )
            else:
                return settings
        except ValueError as error:
            found.append(f"`launcher.time={shown(settings.time)}`: {error}")
    raise InputError(summary(found))


def minutes(time: int | str) -> int:
    """A time limit as SLURM writes it, in minutes, rounded up.

    Raises:
        ValueError: it is no time.
    """
    if isinstance(time, int):
        time = str(time)
    days, _, clock = time.rpartition("-")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise ValueError("not a time: minutes, hours:minutes:seconds, or days-hours:minutes")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, mins, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:  # SLURM reads `10` and `10:30` as minutes, and minutes and seconds
        hours, (mins, seconds) = 0, (*parts, 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + seconds
    if not total:
        raise ValueError("must be more than nothing")
    return -(-total // 60)
