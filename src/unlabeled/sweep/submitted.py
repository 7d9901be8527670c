"""What a SLURM job of a sweep runs. It imports the optional package, and only jobs import it."""

from pathlib import Path
from typing import Any

from hydra.core.utils import setup_globals
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

from unlabeled import slurm


class Submitted(SlurmLauncher):
    """Hydra's launcher for submitit, with this project's members, signals and exit codes.

    Args:
        sweep: the sweep's folder.
        requeues: how often a job may go back in the queue.
    """

    def __init__(self, *, sweep: str, requeues: int) -> None:
        super().__init__(sweep=sweep, requeues=requeues)

    def __call__(  # type: ignore[override]
        self, number: int, overrides: list[str], more: list[str]
    ) -> None:
        """Runs a member, once in each process of its job.

        Raises:
            RuntimeError: it failed, so that the job does for SLURM too.
        """
        slurm.watch.listen(self.params["requeues"])  # first: from here on submitit's do not act
        from unlabeled.sweep.run import run

        setup_globals()
        sweep = Path(self.params["sweep"])
        slurm.watch.on_leave = None
        try:
            member = run(
                context=self.hydra_context,
                config=self.config,  # type: ignore[arg-type]
                task=self.task_function,  # type: ignore[arg-type]
                sweep=sweep,
                number=number,
                overrides=overrides,
                more=more,
                job=slurm.number(),
            )
        except slurm.Stopped as stop:  # before or after training; else the task leaves itself
            slurm.watch.leave(str(stop))
        if member.state == "failed" and slurm.first():
            raise RuntimeError(member.reason)

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing: the job itself saves and requeues.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("unlabeled requeues by itself")
