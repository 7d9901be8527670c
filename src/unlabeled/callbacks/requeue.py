"""Saves and stops a run that SLURM warned, at the end of an update."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint as LightningCheckpoint

from unlabeled.callbacks.checkpoint import Checkpoint
from unlabeled.slurm import Stopped, inside, watch

ASK_STEPS = 10  # GPUs would have to be waited for in every step


class Requeue(LightningCheckpoint):
    """Ends training at the same update in every process, with a checkpoint of it.

    It counts as a checkpoint for Lightning, which calls those last: what others log of an update
    is written before the run stops.

    Args:
        checkpoint: writes the file.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._step = 0
        self._due = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Takes the signals back from Lightning, and answers for them from here on."""
        self._step = trainer.global_step
        watch.training = True
        watch.listen()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops between updates; the last one of an epoch waits for the epoch's end."""
        step, before = trainer.global_step, self._step
        self._step = step
        if step == before:
            return  # gradients accumulate, and no checkpoint holds them
        self._due = self._due or self._warned(trainer, step)
        whole = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        if self._due and not whole:
            # Lightning writes the update's metrics after this, and nobody would make them again.
            trainer._logger_connector.update_train_step_metrics()
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stops between epochs."""
        if self._due:
            self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leaves what comes after training to the handler: evaluations begin anew."""
        watch.training = False
        if watch.warned is not None:
            self._stop(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Has nobody wait for an update that never comes."""
        watch.training = False

    def _warned(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether any process was warned; each has to ask at the same steps."""
        here = watch.warned is not None
        if trainer.world_size == 1:
            return here
        if trainer.strategy.root_device.type != "cpu" and step % ASK_STEPS:
            return False
        return bool(trainer.strategy.reduce_boolean_decision(here, all=False))

    def _stop(self, trainer: pl.Trainer) -> None:
        self.checkpoint.save(trainer)
        watch.training = False
        watch.requeue()  # now: what unwinds below may be killed
        name = watch.warned.name if watch.warned is not None else "a warning"
        raise Stopped(f"{name} from SLURM, saved after update {trainer.global_step}")


def requeues(callbacks: Sequence[Any]) -> list[Requeue]:
    """What a run's callbacks lack in a batch job."""
    return [Requeue(c) for c in callbacks if isinstance(c, Checkpoint)] if inside() else []
