"""What the network sees: augmented views of a few images, shown once."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from unlabeled.batch import denormalize, first
from unlabeled.callbacks.loggers import Guarded
from unlabeled.shown import Images, montage


class Views(pl.Callback):
    """Shows dashboards the views of the first batch's first images, before the first update.

    Silent where no dashboard is there, and in a run that goes on.

    Args:
        images: how many.
        most: views of each, at most; patch methods have many.
    """

    def __init__(self, *, images: int = 8, most: int = 16) -> None:
        if images < 1 or most < 1:
            raise ValueError(f"images and most must be at least 1, got {images} and {most}")
        self.images, self.most = images, most

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Augments them anew, so that the batch itself stays as it is."""
        boards = [logger for logger in trainer.loggers if isinstance(logger, Guarded)]
        if trainer.global_step or batch_idx or not boards or not trainer.is_global_zero:
            return
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            shown = pl_module.augmented(first(batch, self.images), 0)
        parts = shown.get("tasks") or {shown.get("task") or "augmented": shown}
        for name, part in parts.items():
            pictures = sheet(f"views/{name}", part["views"], self.images, self.most)
            for board in boards:
                board.log_images(pictures, 0)


def sheet(name: str, views: list[Tensor], rows: int, most: int) -> Images:
    """A picture for each of the first rows: its views in their order, side by side; no sound."""
    seen = [view for view in views if view.ndim > 2]
    columns = [column[:rows] for view in seen for column in _images(view)]
    more = f", {most} of {len(columns)} views" if len(columns) > most else ""
    pictures = [montage([row]) for row in zip(*columns[:most], strict=True)]
    return Images(name, pictures, [f"{i}{more}" for i in range(len(pictures))])


def _images(view: Tensor) -> list[np.ndarray]:
    """One view (B, 3, H, W), or patches or tiles (B, ..., 3, H, W), as uint8 (B, H, W, 3) each."""
    view = view.float()
    if view.shape[-3] == 3:
        view = denormalize(view)
    else:  # one channel, as some methods hand it on: its own range
        low, high = view.amin((-1, -2), keepdim=True), view.amax((-1, -2), keepdim=True)
        view = ((view - low) / (high - low).clamp(min=1e-6))[..., :1, :, :]
        view = view.expand(*view.shape[:-3], 3, *view.shape[-2:])
    pixels = (view.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    flat = pixels.reshape(len(pixels), -1, *pixels.shape[-3:]).permute(1, 0, 3, 4, 2)
    return [np.ascontiguousarray(images.numpy()) for images in flat]
