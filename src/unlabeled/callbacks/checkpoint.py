"""The one checkpoint of a run, replaced in one piece."""

import os
from pathlib import Path
from time import monotonic
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint as LightningCheckpoint

from unlabeled.callbacks.metrics import MetricsCSV

CLOCK_STEPS = 10  # processes agree on the time only this often: it costs a message


class Checkpoint(LightningCheckpoint):
    """Writes `last.ckpt`: all that a resumed run needs to go on as if it had never stopped.

    The file is written under another name, flushed to the disk and renamed, so that a run
    killed at any moment leaves the old or the new one, whole. It holds tensors and plain
    Python types only (`torch.load(weights_only=True)`), and the key `backbone_config` if the
    module has that attribute. A checkpoint due at an epoch's last batch waits for the epoch's
    end, and one is always written after the last step.

    Args:
        folder: where to write; by default `checkpoints` in the trainer's root folder.
        every_n_steps: optimizer updates between two checkpoints.
        every_n_minutes: time between two checkpoints.
        every_n_epochs: epochs between two checkpoints.
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 15,
        every_n_epochs: int | None = 1,
    ) -> None:
        intervals = {
            "every_n_steps": every_n_steps,
            "every_n_minutes": every_n_minutes,
            "every_n_epochs": every_n_epochs,
        }
        for name, value in intervals.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, or null for never; got {value}")
        self.folder = None if folder is None else Path(folder)
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.seconds = None if every_n_minutes is None else every_n_minutes * 60
        self._step: int | None = None  # updates at the last batch's end
        self._saved: int | None = None  # updates in the last checkpoint
        self._due = False
        self._whole_epoch = False
        self._clock = monotonic()

    @property
    def path(self) -> Path:
        """The checkpoint's place, once the folder is known."""
        assert self.folder is not None
        return self.folder / "last.ckpt"

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Finds the folder and removes what a kill left half written."""
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if trainer.is_global_zero:
            self._temporary.unlink(missing_ok=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Drops logged rows of updates that the checkpoint does not hold: they come again."""
        self._step, self._clock = trainer.global_step, monotonic()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.rewind(trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Adds what is needed to build the backbone again."""
        if (config := getattr(pl_module, "backbone_config", None)) is not None:
            checkpoint["backbone_config"] = config

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves between updates where that is due."""
        step = trainer.global_step
        self._whole_epoch = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        if step == self._step:
            return  # gradients accumulate, and no checkpoint holds them
        self._step = step
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self._due = True
        self._due = self._due or self._late(trainer, step)
        # Lightning calls an epoch that the last step cuts short complete from here on; saved
        # now, it can be gone on with.
        last = step == trainer.max_steps or trainer.should_stop
        if not self._whole_epoch and (self._due or last):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Saves between epochs where that is due."""
        n = self.every_n_epochs
        if self._whole_epoch and (
            self._due or (n is not None and (trainer.current_epoch + 1) % n == 0)
        ):
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Saves the last step, if it is not saved yet."""
        if self._saved != trainer.global_step:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Writes the checkpoint; every process must call it."""
        try:
            trainer.save_checkpoint(self._temporary, weights_only=False)
            if trainer.is_global_zero:
                _flush(self._temporary)
                os.replace(self._temporary, self.path)
                _flush(self.path.parent)
        except BaseException:
            if trainer.is_global_zero:
                self._temporary.unlink(missing_ok=True)
            raise
        trainer.strategy.barrier("checkpoint")  # nobody goes on before it is there
        self._saved, self._due, self._clock = trainer.global_step, False, monotonic()

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(".last.ckpt.tmp")

    def _late(self, trainer: pl.Trainer, step: int) -> bool:
        if self.seconds is None or (trainer.world_size > 1 and step % CLOCK_STEPS):
            return False
        late = monotonic() - self._clock >= self.seconds
        # The first process's clock counts: all must save at the same step.
        return bool(trainer.strategy.broadcast(late)) if trainer.world_size > 1 else late


def _flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
