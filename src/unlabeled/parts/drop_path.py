"""Stochastic depth whose draws a run that stops and goes on makes again."""

import torch
from torch import Tensor, nn

from unlabeled.draws import Draws, to

BRANCHES = ("drop_path", "drop_path1", "drop_path2")  # where timm's blocks have theirs


class DropPath(nn.Module):
    """Leaves a residual branch out for some rows, and scales it for the others.

    Huang et al., 2016. timm's own draws from the global generator, whose state no checkpoint
    holds. This one does nothing in evaluation mode, nor before it is fed draws.

    Args:
        p: probability that a row goes without the branch.
        place: of this branch in the network; it makes the draws of branches differ.
    """

    def __init__(self, p: float, place: int) -> None:
        super().__init__()
        self.p, self.place = p, place
        self.draws: Draws | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or self.draws is None:
            return x
        # Rows are those of one or several views of a batch, view by view.
        views = len(x) // self.draws.rows
        u = self.draws.fork(self.place).fork(self.calls).uniform(views)  # B, views
        self.calls += 1
        kept = (u.T.flatten() >= self.p).to(torch.float32) / (1 - self.p)
        return x * to(kept, x.device).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def drop_path_in(backbone: nn.Module, rate: float) -> None:
    """Gives every residual branch of a timm model a DropPath, of p from 0 to `rate` with depth.

    Raises:
        ValueError: it has no such branches.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path must lie in [0, 1), got {rate}")
    if rate == 0:
        return
    blocks = [m for m in backbone.modules() if any(hasattr(m, name) for name in BRANCHES)]
    if not blocks:
        raise ValueError(
            f"drop_path={rate} needs blocks whose branches can be left out (a vision transformer "
            f"of timm); {type(backbone).__name__} has none: set drop_path=0"
        )
    for i, block in enumerate(blocks):
        for j, name in enumerate(BRANCHES):
            if hasattr(block, name):
                p = rate * i / max(1, len(blocks) - 1)
                setattr(block, name, DropPath(p, i * len(BRANCHES) + j))


def feed(backbone: nn.Module, draws: Draws) -> None:
    """The draws of this step, for all forward passes until the next."""
    for module in backbone.modules():
        if isinstance(module, DropPath):
            module.draws, module.calls = draws, 0
