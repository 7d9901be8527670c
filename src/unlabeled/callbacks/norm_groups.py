"""Batch norm over groups of processes instead of all: SwAV's 8 GPUs, SEER's 64."""

from typing import Any

import pytorch_lightning as pl

from unlabeled.dist import divide_norms


class NormGroups(pl.Callback):
    """While a method trains, `norm: sync` means: over `size` processes, neighbours in rank.

    On one machine these are faster to ask than all. Fewer processes than `size` are one group.

    Args:
        size: processes (GPUs) of a group; it must divide their number.
    """

    def __init__(self, *, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Makes the groups.

        Raises:
            ValueError: size does not divide the number of processes.
        """
        try:
            divide_norms(self.size)
        except ValueError as error:
            raise ValueError(f"callbacks.norm_groups.size={self.size}: {error}") from None

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Leaves the norms as they were."""
        divide_norms(None)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves the norms as they were."""
        divide_norms(None)
