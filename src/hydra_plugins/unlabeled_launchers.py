"""Where a sweep's members run: Hydra looks for launchers in this package, and imports it always.

So it is light; `unlabeled.sweep` has what they do.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Serial(Launcher):
    """One member after another in this process."""

    config: DictConfig
    hydra_context: HydraContext
    task_function: TaskFunction

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keeps what Hydra gives."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs what is not finished yet, and gives every job's objective."""
        from unlabeled.sweep.launch import launch

        return launch(self.config, job_overrides, self._run)

    def _run(self, *given: Any) -> None:
        from unlabeled.sweep.here import run_here

        run_here(self, *given)


class Local(Serial):
    """Members in processes of their own on this machine, several at once."""

    def _run(self, *given: Any) -> None:
        from unlabeled.sweep.local import run_local

        run_local(self, *given)


class Slurm(Serial):
    """Members as jobs of a SLURM array."""

    def _run(self, *given: Any) -> None:
        from unlabeled.sweep.array import run_array

        run_array(self, *given)
