"""Members one after another in this process, which spares them the imports."""

from pathlib import Path
from typing import Any

from hydra.core.utils import configure_log

from unlabeled.sweep.launch import told
from unlabeled.sweep.members import Member
from unlabeled.sweep.run import run
from unlabeled.sweep.settings import Settings


def run_here(launcher: Any, sweep: Path, todo: list[Member], settings: Settings) -> None:
    """Runs members of a Hydra launcher; only what ends this whole process ends the rest."""
    logging = (launcher.config.hydra.hydra_logging, launcher.config.hydra.verbose)
    configure_log(*logging)
    for i, member in enumerate(todo):
        ended = run(
            context=launcher.hydra_context,
            config=launcher.config,
            task=launcher.task_function,
            sweep=sweep,
            number=member.number,
        )
        configure_log(*logging)
        told(sweep, ended, len(todo) - i - 1)
