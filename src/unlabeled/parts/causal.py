"""What the frames up to each moment tell: contexts that do not see the future."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Memory = Literal["gru", "conv", "none"]


class Past(nn.Module):
    """Rows of frames (B, T, D) -> contexts (B, T, dim), the t-th of frames 1 to t.

    Args:
        features: D.
        kind: "gru", "conv" (residual convolutions over time that look back) or "none": the frame
            alone, mapped linearly.
        dim: width of the contexts.
        blocks: layers of the GRU, or convolutions; each of these sees `reach` - 1 frames further.
        reach: frames that a convolution sees, the last one included.
    """

    def __init__(
        self, features: int, kind: Memory, *, dim: int, blocks: int = 1, reach: int = 3
    ) -> None:
        super().__init__()
        if kind not in ("gru", "conv", "none"):
            raise ValueError(f"context must be gru, conv or none, got {kind!r}")
        if dim < 1 or blocks < 1 or reach < 1:
            raise ValueError(f"need dim, blocks and reach of at least 1: {dim}, {blocks}, {reach}")
        self.kind, self.reach, self.dim = kind, reach, dim
        if kind == "gru":
            self.gru = nn.GRU(features, dim, blocks, batch_first=True)
        else:
            self.first = nn.Linear(features, dim)
            count = blocks if kind == "conv" else 0
            self.blocks = nn.ModuleList(nn.Conv1d(dim, dim, reach) for _ in range(count))

    def forward(self, z: Tensor) -> Tensor:
        if self.kind == "gru":
            return self.gru(z)[0]
        c = self.first(z).transpose(1, 2)
        for block in self.blocks:
            c = c + block(F.pad(F.relu(c), (self.reach - 1, 0)))  # padded in the past alone
        return c.transpose(1, 2)
