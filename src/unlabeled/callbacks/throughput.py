"""Images per second, the time that training waits for its data, and what it costs a CPU."""

from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from unlabeled import dist
from unlabeled.callbacks.metrics import Periodic, record


@dataclass(frozen=True)
class Totals:
    """What training has cost until now: images of all processes, and seconds of this one."""

    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    def since(self, earlier: "Totals") -> dict[str, float]:
        """Images per second and the share of time spent waiting, from then to now."""
        seconds = self.seconds - earlier.seconds
        if seconds <= 0:
            return {}
        return {
            "images_per_second": (self.images - earlier.images) / seconds,
            "data_wait": (self.waiting - earlier.waiting) / seconds,
        }


class Throughput(Periodic):
    """Logs `perf/images_per_second`, `perf/data_wait` (a share, 0 to 1) and `perf/cpu_seconds`.

    Waiting is the time from a batch's end to the next one's arrival on the device. What runs
    between epochs (probes, checkpoints, validation) does not count, nor does the first batch,
    which builds caches. On a GPU the host runs ahead, so only sums over many steps mean much.
    CPU seconds are those of this process and all its threads (not of workers) since the fit was
    set up, clustering and probes included; a resumed run goes on counting.

    Args:
        every_n_steps: optimizer updates between two rows.
    """

    def __init__(self, *, every_n_steps: int = 10) -> None:
        super().__init__(every_n_steps)
        self.totals = Totals()  # the progress bar reads it
        self._logged = Totals()
        self._ended: float | None = None  # when the last batch did, or the epoch began
        self._came: float | None = None
        self._warm = False
        self._cpu_before, self._cpu_start = 0.0, process_time()

    @property
    def cpu_seconds(self) -> float:
        """What this process has computed for the training until now."""
        return self._cpu_before + process_time() - self._cpu_start

    def state_dict(self) -> dict[str, float]:
        """The CPU time so far."""
        return {"cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Goes on from the CPU time of the run that is resumed."""
        self._cpu_before = state_dict.get("cpu_seconds", 0.0)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Becomes the last but for checkpoints: others' work must not count as waiting."""
        self._cpu_start = process_time()
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        saving = [c for c in others if isinstance(c, Checkpoint)]
        others = [c for c in others if not isinstance(c, Checkpoint)]
        trainer.callbacks = [*others, self, *saving]  # type: ignore[attr-defined]

    def on_train_epoch_start(self, *args: Any) -> None:
        """Starts the clock."""
        self._ended = perf_counter()

    def on_validation_end(self, *args: Any) -> None:
        """Starts it again: validation is no waiting."""
        self._ended = perf_counter()

    def on_save_checkpoint(self, *args: Any) -> None:
        """Leaves the gap that saving makes out of the sums."""
        self._ended = None

    def on_train_batch_start(self, *args: Any) -> None:
        """The batch is here."""
        self._came = perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the batch to the sums."""
        now = perf_counter()
        if self._warm and self._ended is not None and self._came is not None:
            images = len(batch["index"]) * dist.world_size()
            t, waited = self.totals, self._came - self._ended
            self.totals = Totals(
                t.images + images, t.seconds + now - self._ended, t.waiting + waited
            )
        self._warm, self._ended = True, now
        if self.due(trainer):
            values = self.totals.since(self._logged) | {"cpu_seconds": self.cpu_seconds}
            self._logged = self.totals
            record(trainer, {f"perf/{name}": value for name, value in values.items()})
