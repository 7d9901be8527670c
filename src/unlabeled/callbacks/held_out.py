"""How well a pretext task is solved on images that were not learned from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from unlabeled import dist
from unlabeled.batch import first
from unlabeled.callbacks.metrics import record
from unlabeled.disk import replace_arrays


class HeldOut(pl.Callback):
    """Logs `held_out/<term>` and `held_out/accuracy` of test images, augmented as in training.

    Silent for methods without a pretext task, and for data without a test split. It only looks:
    nothing is chosen by what it finds. At the end of the training it keeps pictures for the
    report, where the method makes some, in figures/samples.npz of the run's folder.

    Args:
        every_n_epochs: how often; None: at the end of the training only.
        limit: about how many images.
        pictures: images that the report shows.
    """

    def __init__(
        self, *, every_n_epochs: int | None = None, limit: int = 1024, pictures: int = 8
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if pictures < 0:
            raise ValueError(f"pictures must not be negative, got {pictures}")
        self.every_n_epochs, self.limit, self.pictures = every_n_epochs, limit, pictures
        self._measured_at = -1  # epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measures after every n-th epoch."""
        every = self.every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0:
            self._measured_at = trainer.global_step
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measures, unless the last epoch's end just did, and keeps pictures."""
        if trainer.interrupted or not _measurable(trainer, pl_module):
            return
        if self._measured_at != trainer.global_step:
            self._measure(trainer, pl_module)
        if self.pictures and dist.world_size() == 1:
            self._keep(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer, method: Any) -> None:
        if not _measurable(trainer, method):
            return
        found: dict[str, list[Tensor]] = {}
        # Loaders may draw from torch's global generator; the method shall not notice.
        with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context():
            for key, batch in enumerate(_batches(trainer, method, self.limit)):
                values = method.measure(method.augmented(batch, key), key)
                for name, value in values.items():
                    found.setdefault(name, []).append(value.float())
        means = {name: torch.stack(values).mean() for name, values in found.items()}
        means = {name: dist.reduce_sum(x) / dist.world_size() for name, x in means.items()}
        record(trainer, {f"held_out/{name}": x.item() for name, x in means.items()})

    def _keep(self, trainer: pl.Trainer, method: Any) -> None:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            training = method.training
            method.eval()
            columns: dict[str, Tensor] = {}
            shown: set[str | None] = set()  # tasks, where there are several
            for batch in _batches(trainer, method, self.limit):
                if batch.get("task") in shown:
                    break
                shown.add(batch.get("task"))
                columns |= method.pictures(method.augmented(first(batch, self.pictures), 0))
            method.train(training)
        if not columns:
            return
        arrays = {f"column{i}": _bytes(x) for i, x in enumerate(columns.values())}
        arrays["titles"] = np.array(list(columns))
        replace_arrays(Path(trainer.default_root_dir) / "figures/samples.npz", arrays)


def _measurable(trainer: pl.Trainer, method: Any) -> bool:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return method.pretext and hasattr(data, "unseen") and data.has("test")


def _batches(trainer: pl.Trainer, method: Any, limit: int) -> Any:
    for batch in trainer.datamodule.unseen(limit):  # type: ignore[attr-defined]
        yield method.transfer_batch_to_device(batch, method.device, 0)


def _bytes(x: Tensor) -> Any:
    """Images (B, 3, h, w) in [0, 1] as uint8 (B, h, w, 3)."""
    pixels = (x.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
