"""What a training run says about itself in the terminal."""

import math
import sys
from time import monotonic
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from unlabeled.callbacks.throughput import Throughput, Totals


class Progress(ProgressBar):
    """One bar over all steps of the training; lines of plain text where there is no terminal.

    It shows the epoch, the loss, images per second and the share of time spent waiting for
    data. The loss is read from the device only when it is shown.

    Args:
        refresh: seconds between two looks of the bar.
        line: seconds between two lines of plain text.
    """

    def __init__(self, *, refresh: float = 0.5, line: float = 5.0) -> None:
        super().__init__()
        if refresh <= 0 or line <= 0:
            raise ValueError(f"refresh and line are seconds above 0, got {refresh} and {line}")
        self.refresh, self.line = refresh, line
        self.enabled = True
        self.console = Console()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._began = self._shown = self._measured = 0.0
        self._first = 0  # the step that this part of the run began at
        self._totals = Totals()
        self._rates: dict[str, float] = {}

    def disable(self) -> None:
        """Says nothing from now on; Lightning calls it on all processes but the first."""
        self.enabled = False

    def enable(self) -> None:
        """The opposite."""
        self.enabled = True

    @property
    def interactive(self) -> bool:
        """Whether a bar that moves can be drawn."""
        return self.console.is_interactive and self.console.file.isatty()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draws the bar."""
        if not self.enabled:
            return
        self._began = self._shown = self._measured = monotonic()
        self._first = trainer.global_step
        if self.interactive:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
                refresh_per_second=max(1.0, 1 / self.refresh),
                expand=True,
            )
            self._bar.start()
            total = _total(trainer)
            self._task = self._bar.add_task(
                _epoch(trainer), total=total, completed=self._first, text=""
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Moves it, where it is time to."""
        interval = self.refresh if self._bar else self.line
        if self.enabled and monotonic() - self._shown >= interval:
            self._show(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Shows the last step."""
        if self.enabled:
            self._show(trainer, begun=trainer.current_epoch)  # all are over, and counted
            self._stop()

    def on_exception(self, *args: Any) -> None:
        """Gives the terminal back."""
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Gives the terminal back."""
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Text above the bar, from `LightningModule.print`."""
        if self.enabled:
            self.console.print(*args)

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _show(self, trainer: pl.Trainer, begun: int | None = None) -> None:
        self._shown = monotonic()
        text = "  ".join(self._numbers(trainer))
        if self._bar:
            self._bar.update(
                self._task,
                completed=trainer.global_step,
                description=_epoch(trainer, begun),
                text=text,
            )
            return
        step, total = trainer.global_step, _total(trainer)
        done = f"{step}/{total}" if total else f"{step}"
        left = f"  {self._left(step, total)}" if total else ""
        # Not through rich, which would wrap the line at 80 columns.
        print(f"{_epoch(trainer, begun)}  step {done}  {text}{left}", file=sys.stdout, flush=True)

    def _numbers(self, trainer: pl.Trainer) -> list[str]:
        loss = trainer.progress_bar_metrics.get("train/loss")
        parts = [] if loss is None else [f"loss {float(loss):.3f}"]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                # Over 2 seconds at least, so that the numbers can be read.
                if monotonic() - self._measured >= 2 or not self._rates:
                    new = callback.totals.since(self._totals)
                    self._rates = new or self._rates
                    self._totals, self._measured = callback.totals, monotonic()
                if self._rates:
                    parts.append(f"{self._rates['images_per_second']:,.0f} images/s")
                    parts.append(f"data wait {self._rates['data_wait']:.0%}")
        return parts

    def _left(self, step: int, total: int) -> str:
        spent, made = monotonic() - self._began, step - self._first
        seconds = round(spent if step >= total else spent / max(1, made) * (total - step))
        clock = f"{seconds // 60}:{seconds % 60:02d}"
        return f"took {clock}" if step >= total else f"{clock} left"


def _total(trainer: pl.Trainer) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None


def _epoch(trainer: pl.Trainer, begun: int | None = None) -> str:
    last, now = trainer.max_epochs, trainer.current_epoch + 1 if begun is None else begun
    if last is None or last < 0:
        return f"epoch {now}"
    return f"epoch {min(now, last)}/{last}"
