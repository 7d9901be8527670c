"""Samples that may stand against one another: never two that were cut from one video."""

from typing import Any

import torch
from torch import Tensor


def another(own: Tensor, everyone: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the first sample of another source, from a place on and going round.

    Args:
        own: (B,) int64, the source of each row: see `unlabeled.batch.sources`.
        everyone: (N,) int64, those of the global batch.
        start: (B,) int64, any number modulo N: where each row begins to look.

    Returns:
        Places (B,) int64 in [0, N), and (B,) bool: whether there is any; if not, the place means
        nothing.
    """
    places = (start[:, None] + torch.arange(len(everyone), device=own.device)) % len(everyone)
    other = everyone[places] != own[:, None]
    first = other.int().argmax(1, keepdim=True)
    return places.gather(1, first)[:, 0], other.any(1)


def several(trainer: Any, stage: str) -> None:
    """For methods whose negatives are other samples of a batch, before they are trained.

    Raises:
        ValueError: there can be none: the training set is one video, or a batch one sample.
    """
    data = trainer.datamodule
    if stage != "fit" or data is None:
        return
    if data.batch_size < 2:
        raise ValueError(
            f"negatives are other recordings of a batch: choose data.batch_size of 2 or more, got "
            f"{data.batch_size}"
        )
    if (count := data.sources("train") if hasattr(data, "sources") else data.count) < 2:
        raise ValueError(
            f"negatives are of other videos, and the {data.count} training recordings are cut from "
            f"{count}: add another, or, where clips of one video may be negatives of each other, "
            "data.layout.group=null (of folders of videos)"
        )
