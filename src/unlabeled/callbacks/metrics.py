"""Where a run's numbers go: `metrics.csv`, whatever dashboards there are beside it."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class Periodic(pl.Callback):
    """Does something after every n-th optimizer update.

    Args:
        every_n_steps: n.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps, self._step = every_n_steps, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Knows where a resumed run stands."""
        self._step = trainer.global_step

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether the batch just done made such an update; to be asked at each batch's end.

        Batches that only accumulate gradients leave the number of updates as it was.
        """
        new, self._step = trainer.global_step != self._step, trainer.global_step
        return new and self._step % self.every_n_steps == 0


def record(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Writes values of the update just made to every logger, in Lightning's count from 0.

    `LightningModule.log` would drop them at steps that are no multiple of `log_every_n_steps`.
    """
    row = {"epoch": trainer.current_epoch, **values}
    for logger in trainer.loggers:
        logger.log_metrics(row, step=max(0, trainer.global_step - 1))


def finish_row(trainer: pl.Trainer) -> None:
    """Writes what Lightning is about to log of the batch just done to `metrics.csv` already.

    To be asked at a batch's end by what saves a checkpoint there: a run killed before Lightning
    logs goes on behind that batch, and nobody would write it.
    """
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        if values and isinstance(logger, MetricsCSV):
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=step)


class LearningRate(Periodic):
    """Logs `optim/lr`, the first parameter group's, of the update just made."""

    def __init__(self, *, every_n_steps: int = 10) -> None:
        super().__init__(every_n_steps)
        self.used = 0.0

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Remembers the rate before the schedule moves on."""
        self.used = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Logs it."""
        if self.due(trainer):
            record(trainer, {"optim/lr": self.used})


class MetricsCSV(Logger):
    """Writes `metrics.csv`: one row per logged step, a column per name, empty where not logged.

    Every row is on disk at once, and a kill leaves it whole. Rows of the same step become one
    row, and a new name adds a column to all rows. A file that exists is continued; see `rewind`.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None  # None: the file was not read yet
        self._row: dict[str, str] = {}  # the last row written here, and where it starts
        self._start = 0

    @property
    def name(self) -> str:
        """The file's stem."""
        return "metrics"

    @property
    def version(self) -> int:
        """A run has one such file."""
        return 0

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's folder holds its whole config."""

    @rank_zero_only
    def rewind(self, step: int | None = None) -> None:
        """Forgets the rows of updates that a run resumed after `step` updates makes again.

        Lightning counts from 0, so these are the rows at `step` and later. A last line that a
        kill cut short is dropped too. Without a step only that is done.
        """
        rows = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                header, *lines = list(csv.reader(file)) or [[]]
            rows = [
                dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)
            ]
            rows = [row for row in rows if step is None or int(row["step"]) < step]
        names = {name: None for row in rows for name, cell in row.items() if cell}
        self._rewrite(["step", "epoch", *(n for n in names if n not in ("step", "epoch"))], rows)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds to the row of `step`, or starts it."""
        if self._columns is None:
            self.rewind()
        assert self._columns is not None
        row = {name: _cell(value) for name, value in metrics.items() if name != "step"}
        row = {"step": str(0 if step is None else step), **row}
        again = self._row.get("step") == row["step"]
        row = self._row | row if again else row
        if row == self._row:
            return
        if new := [name for name in row if name not in self._columns]:
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self._rewrite([*self._columns, *new], [*(rows[:-1] if again else rows), row])
            return
        # In one piece: a kill leaves the row as it was or as it is.
        with self.path.open("r+b", buffering=0) as file:
            self._start = self._start if again else file.seek(0, os.SEEK_END)
            file.seek(self._start)
            file.write(self._line(row))
            file.truncate()
        self._row = row

    def _line(self, row: Mapping[str, str]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns or (), restval="", extrasaction="ignore").writerow(row)
        return text.getvalue().encode()

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        """Replaces the file; the last of the rows may be added to."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = columns
        temporary = self.path.with_name(".metrics.csv.tmp")
        lines = [self._line(row) for row in (dict(zip(columns, columns, strict=True)), *rows)]
        temporary.write_bytes(b"".join(lines))
        os.replace(temporary, self.path)
        self._row = {name: cell for name, cell in rows[-1].items() if cell} if rows else {}
        self._start = sum(map(len, lines[:-1]))


def _cell(value: float) -> str:
    # 9 digits tell any two float32 apart.
    return str(value) if isinstance(value, int) else f"{float(value):.9g}"
