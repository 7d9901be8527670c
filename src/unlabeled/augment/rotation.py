"""Rotation prediction's question and answer (Gidaris et al., 2018)."""

from typing import Literal

import torch
from torch import nn

from unlabeled.augment.geometry import rotate, rotate_rows
from unlabeled.augment.views import channels_last
from unlabeled.batch import Batch
from unlabeled.draws import Draws, to


class Rotations(nn.Module):
    """One view, turned by 90 degrees `target` times, after everything else was done to it.

    A flip belongs into `base`, before the turn: after it, turns by 90 and by 270 degrees would
    look alike.

    Args:
        base: a module (Batch, Draws) -> Batch that gives one view (B, 3, S, S).
        copies: "all" gives every image in all four turns: views (4B, 3, S, S), row k * B + b is
            image b turned k times, so the first B rows are upright; "one" gives a random turn
            of every image: (B, 3, S, S).
    """

    def __init__(self, base: nn.Module, copies: Literal["all", "one"] = "all") -> None:
        super().__init__()
        if copies not in ("all", "one"):
            raise ValueError(f"copies must be all or one, got {copies!r}")
        self.base, self.copies = base, copies

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        batch = self.base(batch, draws.fork("base"))
        views = batch.get("views", [])
        if len(views) != 1:
            raise ValueError(f"rotations turn one view, `base` gave {len(views)}")
        (x,) = views
        if self.copies == "all":
            turned = torch.cat([rotate(x, k) for k in range(4)])
            target = torch.arange(4, device=x.device).repeat_interleave(len(x))
        else:
            turns = draws.fork("turns").integers(4)
            turned = rotate_rows(x, turns)
            target = to(turns, x.device)
        return {**batch, "views": [channels_last(turned)], "target": target}
