"""Shuffle & Learn's question and answer (Misra et al., 2016)."""

import torch
from torch import nn

from unlabeled.batch import Batch
from unlabeled.draws import Draws, to


class FrameOrder(nn.Module):
    """Three of five pictures a < b < c < d < e of a recording, in order or not.

    b, c, d are in order and b, a, d and b, e, d are not: a question with two sides, whether the
    middle one lies between the others in time. Each may be reversed in time, which does not change
    the answer. The pictures of one recording share their draws.

    Args:
        base: a module (Batch, Draws) -> Batch that gives one view (B, 5, 3, S, S).
        positive: share of tuples in order; the paper's is 1 to 3.
        reverse: with this probability the tuple runs backwards.
    """

    def __init__(self, base: nn.Module, positive: float = 0.25, reverse: float = 0.5) -> None:
        super().__init__()
        for name, share in (("positive", positive), ("reverse", reverse)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        self.base, self.positive, self.reverse = base, positive, reverse

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        """Views (B, 3, 3, S, S), `target` (B,): 1 in order, and `frames` (B, 3) of the tuples."""
        batch = self.base(batch, draws.fork("base"))
        views, frames = batch.get("views", []), batch.get("frames")
        if len(views) != 1 or views[0].ndim != 5 or views[0].shape[1] != 5 or frames is None:
            shapes = [tuple(view.shape) for view in views]
            raise ValueError(
                "the order of frames is asked of five pictures of each recording with their "
                f"`frames`: choose decode=five_frames; `base` gave views {shapes}"
            )
        (x,) = views
        ordered = draws.fork("ordered").chance(self.positive)
        late = draws.fork("outside").chance(0.5)
        middle = torch.where(ordered, 2, torch.where(late, 4, 0))
        chosen = torch.stack([torch.full_like(middle, 1), middle, torch.full_like(middle, 3)], 1)
        backwards = draws.fork("reverse").chance(self.reverse)
        chosen = torch.where(backwards[:, None], chosen.flip(1), chosen)  # B 3
        picked = to(chosen, x.device)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return {
            **batch,
            "views": [x[rows, picked]],
            "frames": frames.gather(1, picked),
            "target": to(ordered.long(), x.device),
        }
