"""The checkpoints of a run, each written in one piece; the last few are kept."""

import os
from pathlib import Path
from time import monotonic
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint as LightningCheckpoint

from unlabeled import checkpoints
from unlabeled.callbacks.metrics import MetricsCSV, finish_row

CLOCK_STEPS = 10  # processes agree on the time only this often: it costs a message


class Checkpoint(LightningCheckpoint):
    """Writes `last.ckpt`: all that a resumed run needs to go on as if it had never stopped.

    The file is written under another name, flushed to the disk and renamed, so that a run
    killed at any moment leaves the old or the new one, whole; rows of `metrics.csv` that it
    counts as written are on the disk before. The ones before it are `last-1.ckpt`, ...: what a
    run goes on from if the newest turns out damaged. It holds tensors and plain Python types
    only (`torch.load(weights_only=True)`), and the keys `backbone_config` and `identity` if the
    module has `backbone_config` and `run_identity`. A checkpoint due at an epoch's last batch
    waits for the epoch's end, and one is always written after the last step.

    Args:
        folder: where to write; by default `checkpoints` in the trainer's root folder.
        every_n_steps: optimizer updates between two checkpoints.
        every_n_minutes: time between two checkpoints.
        every_n_epochs: epochs between two checkpoints.
        keep: how many there are at most.
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 15,
        every_n_epochs: int | None = 1,
        keep: int = 2,
    ) -> None:
        intervals = {
            "every_n_steps": every_n_steps,
            "every_n_minutes": every_n_minutes,
            "every_n_epochs": every_n_epochs,
        }
        for name, value in intervals.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, or null for never; got {value}")
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep = None if folder is None else Path(folder), keep
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs
        self.seconds = None if every_n_minutes is None else every_n_minutes * 60
        self._step: int | None = None  # updates at the last batch's end
        self._saved: int | None = None  # updates in the last checkpoint
        self._due = False
        self._whole_epoch = False
        self._another = False  # whether the files that are there are of another run
        self._clock = monotonic()

    @property
    def path(self) -> Path:
        """The checkpoint's place, once the folder is known."""
        assert self.folder is not None
        return self.folder / checkpoints.NEWEST

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Finds the folder and removes what a kill left half written."""
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir) / "checkpoints"
        if trainer.is_global_zero:
            self._temporary.unlink(missing_ok=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Drops logged rows of updates that the checkpoint does not hold, and of another run's."""
        self._step, self._clock = trainer.global_step, monotonic()
        given = None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
        self._another = given is None or given.parent != self.path.parent.resolve()
        self._saved = trainer.global_step if given == self.path.resolve() else None
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.rewind(0 if self._another else trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Adds what is needed to build the backbone again, and to tell runs apart."""
        if (config := getattr(pl_module, "backbone_config", None)) is not None:
            checkpoint["backbone_config"] = config
        if (identity := getattr(pl_module, "run_identity", None)) is not None:
            checkpoint["identity"] = identity

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
            finish_row(trainer)  # Lightning would, later: too late for a kill in between
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
                for logger in trainer.loggers:
                    if isinstance(logger, MetricsCSV) and logger.path.exists():
                        _flush(logger.path)
                _flush(self._temporary)
                self._age()
                os.replace(self._temporary, self.path)
                _flush(self.path.parent)
        except BaseException:
            if trainer.is_global_zero:
                self._temporary.unlink(missing_ok=True)
            raise
        trainer.strategy.barrier("checkpoint")  # nobody goes on before it is there
        self._saved, self._due, self._clock = trainer.global_step, False, monotonic()

    def _age(self) -> None:
        """Keeps the newest under the next name, and that of any age it held before."""
        if self._another:
            for path in checkpoints.found(self.path)[1:]:
                path.unlink()
            self._another = False
            return
        for path in checkpoints.found(self.path):
            if path != self.path and int(path.stem.rpartition("-")[2]) >= self.keep:
                path.unlink()
        for age in range(self.keep - 1, 1, -1):
            if (newer := checkpoints.earlier(self.path, age - 1)).exists():
                os.replace(newer, checkpoints.earlier(self.path, age))
        if self.keep > 1 and self.path.exists():
            before = checkpoints.earlier(self.path, 1)
            before.unlink(missing_ok=True)
            try:
                os.link(self.path, before)  # so that there is a newest one at any moment
            except OSError:  # a file system without links
                os.replace(self.path, before)

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
