"""Batches larger than memory for losses that compare images: `unlabeled.backbones.chunks`."""

from typing import Any

import pytorch_lightning as pl
from torch import nn

from unlabeled.backbones.chunks import divide, unite
from unlabeled.parts.drop_path import DropPath
from unlabeled.parts.task_norm import TaskNorms


class Chunks(pl.Callback):
    """While a method trains, its backbone computes in chunks, and so do momentum copies of it.

    Heads and losses get the whole batch. It costs another forward pass, as activation
    checkpointing does. Batch norm of the backbone takes its statistics from chunks, and moves
    its running ones once for each.

    Args:
        rows: images (patches, tiles, clips) at a time, at most.
    """

    def __init__(self, *, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.rows = rows
        self._networks: list[nn.Module] = []

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Refuses networks that would compute something else again.

        Raises:
            ValueError: their branches are left out at random by row of the batch, or their norms
                are exchanged between tasks.
        """
        for module in pl_module.modules():
            if isinstance(module, DropPath):
                raise ValueError("callbacks=chunks cannot leave out branches: method.drop_path=0")
            if isinstance(module, TaskNorms) and module.places:
                raise ValueError("callbacks=chunks cannot exchange norms: method.norm=shared")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Divides the backbone and what is of its kind."""
        inside: list[str] = []
        for name, module in pl_module.named_modules():
            if type(module) is type(pl_module.backbone) and not name.startswith(tuple(inside)):
                inside.append(f"{name}.")
                divide(module, self.rows)
                self._networks.append(module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leaves the networks as they were."""
        while self._networks:
            unite(self._networks.pop())

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves the networks as they were."""
        self.on_train_end(trainer, pl_module)
