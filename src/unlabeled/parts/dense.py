"""Fully connected layers of pretext tasks' heads."""

import itertools
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.dist import SyncBatchNorm
from unlabeled.draws import Draws
from unlabeled.parts.dropout import dropped, probability


class Dense(nn.Module):
    """Linear layers, each followed by norm and ReLU, with dropout behind.

    Args:
        widths: of the input and of every layer; with one alone this is the identity.
        norm: "batch" (of this process), "sync" (of all processes) or "none".
        normed: how many layers have a norm, from the first; null: all. A layer with norm has no
            bias.
        affine: whether a norm has scale and shift.
        dropout: probability that an output of a layer is left out.
    """

    def __init__(
        self,
        *widths: int,
        norm: Literal["batch", "sync", "none"] = "batch",
        normed: int | None = None,
        affine: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(widths, default=0) < 1:
            raise ValueError(f"widths must be at least 1, got {list(widths)}")
        if norm not in ("batch", "sync", "none"):
            raise ValueError(f"norm must be batch, sync or none, got {norm!r}")
        layer = {"batch": nn.BatchNorm1d, "sync": SyncBatchNorm}.get(norm)
        count = len(widths) - 1
        first = 0 if layer is None else count if normed is None else normed
        self.dim, self.dropout = widths[-1], probability(dropout)
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=i >= first) for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(
            layer(width, affine=affine) if layer and i < first else nn.Identity()
            for i, width in enumerate(widths[1:])
        )

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, dim); nothing is dropped without draws."""
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = F.relu(norm(layer(x)))
            x = dropped(x, self.dropout, None if draws is None else draws.fork(i))
        return x
