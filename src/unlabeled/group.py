"""The processes of one run that somebody else started (torchrun, srun): their name, their meeting.

Processes that Lightning starts need neither: they are told the folder, and meet to train.
"""

import os
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from unlabeled.errors import InputError


def began(form: str) -> str:
    """What tells a run from others, the same in all of its processes: when it began.

    Where others started several processes, each on its own clock, it is what they share instead:
    SLURM's number of the job and its step, torchrun's number of the run, or torchrun's process.

    Args:
        form: of the time, as `time.strftime` takes it.

    Raises:
        InputError: they share nothing that would be another's next time.
    """
    given = os.environ.get
    if int(given("SLURM_STEP_NUM_TASKS", "1")) > 1:  # srun's
        return f"slurm_{given('SLURM_JOB_ID')}_{given('SLURM_STEP_ID', '0')}"
    if "RANK" not in os.environ or int(given("WORLD_SIZE", "1")) < 2:
        return time.strftime(form)
    if (name := given("TORCHELASTIC_RUN_ID", "none")) not in ("none", ""):
        return f"torchrun_{name.replace('/', '_')}"
    if "TORCHELASTIC_RUN_ID" in os.environ and given("LOCAL_WORLD_SIZE") == given("WORLD_SIZE"):
        return f"torchrun_{os.getppid()}_{_ticks(os.getppid())}"
    raise InputError(
        f"this is process {given('RANK')} of {given('WORLD_SIZE')}, and nothing tells all of them "
        "the folder of their run: write hydra.run.dir=DIR, or torchrun --rdzv-id=NAME"
    )


def meet(trainer: Any) -> None:
    """Starts the other processes of a trainer and connects all, unless training did."""
    from unlabeled import dist  # torch

    if trainer.world_size > 1 and dist.world_size() == 1:
        connect = trainer.strategy.setup_environment
        launcher = trainer.strategy.launcher
        connect() if launcher is None else launcher.launch(connect, trainer=trainer)


def _ticks(process: int) -> str:
    """When a process of this machine began, in clock ticks since the machine did."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]


OmegaConf.register_new_resolver("began", began, use_cache=True, replace=True)
