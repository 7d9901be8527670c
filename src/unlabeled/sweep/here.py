"""Members one after another in this process, which spares them the imports.

Only those of several processes run beside it: see `unlabeled.sweep.command`.
"""

from pathlib import Path
from typing import Any

from hydra.core.utils import configure_log

from unlabeled.sweep.command import several
from unlabeled.sweep.launch import told
from unlabeled.sweep.local import run_aside
from unlabeled.sweep.members import Member
from unlabeled.sweep.run import run
from unlabeled.sweep.settings import Settings


def run_here(launcher: Any, sweep: Path, todo: list[Member], settings: Settings) -> None:
    """Runs members of a Hydra launcher; only what ends this whole process ends the rest."""
    logging = (launcher.config.hydra.hydra_logging, launcher.config.hydra.verbose)
    configure_log(*logging)
    for i, member in enumerate(todo):
        if _several(launcher, member):
            ended = run_aside(launcher, sweep, member)
        else:
            ended = run(
                context=launcher.hydra_context,
                config=launcher.config,
                task=launcher.task_function,
                sweep=sweep,
                number=member.number,
                overrides=member.overrides,
            )
        configure_log(*logging)
        told(sweep, ended, len(todo) - i - 1)


def _several(launcher: Any, member: Member) -> bool:
    try:
        loader = launcher.hydra_context.config_loader
        return several(loader.load_sweep_config(launcher.config, member.overrides))
    except Exception:  # which `run` meets again, and notes
        return False
