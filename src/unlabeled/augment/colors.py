"""Colourisation's question and answer: the image without its colours, and these."""

import torch
from torch import nn

from unlabeled.augment.views import Chain, Ops, finished, taken, unit
from unlabeled.batch import Batch
from unlabeled.draws import Draws
from unlabeled.lab import rgb_to_lab


class Colors(nn.Module):
    """One view in grey, L / 100 in all three channels, and `target` {"ab": (B, 2, S, S)}.

    L and the colours a and b are CIE Lab's, of the view that `ops` make. These must leave colours
    alone: jitter would teach colours that photographs don't have, and grey images none.

    Args:
        ops: what is done to the crop before it loses its colours, a flip for instance.
    """

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        self.chain = Chain(ops)

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        (crop,) = taken(batch, 1, "view in grey")
        lab = rgb_to_lab(self.chain(unit(crop), draws.fork("view")))
        light, ab = lab[..., :1, :, :], lab[..., 1:, :, :]
        grey = torch.cat([light / 100] * 3, -3)
        return {**batch, "views": [finished(grey)], "target": {"ab": ab.contiguous()}}
