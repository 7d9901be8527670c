"""Normalisation layers by name, and batch norm as several devices would compute it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.dist import SyncBatchNorm

Norm = Literal["batch", "sync", "group", "layer", "none"]


def norm_layer(kind: Norm, splits: int = 1) -> Callable[[int], nn.Module]:
    """What builds a normalisation layer for a number of channels.

    Args:
        kind: "batch" (of this process), "sync" (of all processes), "group" (32 groups, or as
            many as divide the channels; Wu & He, 2018), "layer" (over channels and places of each
            image, with a scale and a shift per channel; Ba et al., 2016) or "none".
        splits: "batch" only: statistics over this many equal parts of the batch.
    """
    if kind not in ("batch", "sync", "group", "layer", "none"):
        raise ValueError(f"norm must be batch, sync, group, layer or none, got {kind!r}")
    if splits < 1:
        raise ValueError(f"bn_splits must be at least 1, got {splits}")
    if splits > 1 and kind != "batch":
        raise ValueError(f"bn_splits={splits} needs norm=batch, got norm={kind}")
    if kind == "group":
        return _group_norm
    if kind == "layer":
        return partial(nn.GroupNorm, 1)
    if kind == "none":
        return nn.Identity
    if kind == "sync":
        return SyncBatchNorm
    return nn.BatchNorm2d if splits == 1 else partial(SplitBatchNorm2d, splits=splits)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(math.gcd(32, channels), channels)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics are those of `splits` devices that share the batch.

    Part i is the i-th of `splits` contiguous slices of rows, as device i would hold it. Running
    statistics move by the mean over parts; in eval mode this is plain batch norm.

    Args:
        num_features: channels.
        splits: number of parts; it must divide the batch.
    """

    def __init__(self, num_features: int, *, splits: int) -> None:
        super().__init__(num_features)
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        if len(input) % self.splits:
            raise ValueError(
                f"a batch of {len(input)} images does not divide into bn_splits={self.splits}"
            )
        if input.numel() == self.splits * input.shape[1]:
            raise ValueError(
                f"bn_splits={self.splits} leaves one value per channel, which has no variance: "
                "choose fewer splits or a larger batch"
            )
        self.num_batches_tracked += 1  # type: ignore[operator]
        share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()  # type: ignore[operator]
        means = self.running_mean.repeat(self.splits, 1)  # type: ignore[union-attr]
        variances = self.running_var.repeat(self.splits, 1)  # type: ignore[union-attr]
        parts = [
            F.batch_norm(x, m, v, self.weight, self.bias, True, share, self.eps)
            for x, m, v in zip(input.chunk(self.splits), means, variances, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))  # type: ignore[union-attr]
            self.running_var.copy_(variances.mean(0))  # type: ignore[union-attr]
        return torch.cat(parts)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"
