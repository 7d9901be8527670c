"""The odd-one-out's question and answer (Fernando et al., 2017)."""

import itertools

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.draws import Draws, to


class OddOneOut(nn.Module):
    """Several short sequences of one clip, all in order but one, and which one that is.

    Each is a run of consecutive frames from a random time on. The odd one's frames are in an order
    that is drawn uniformly from all that are wrong. The frames of a recording share their draws.

    Args:
        base: a module (Batch, Draws) -> Batch that gives one view (B, T, 3, S, S).
        elements: how many sequences.
        frames: of each.
        reversals: whether the frames backwards count as a wrong order; where motion looks the same
            both ways nobody can tell.
    """

    def __init__(
        self, base: nn.Module, elements: int = 6, frames: int = 6, reversals: bool = True
    ) -> None:
        super().__init__()
        if elements < 2:
            raise ValueError(f"one of at least 2 elements is odd, got elements={elements}")
        least = 2 if reversals else 3
        if not least <= frames <= 8:
            raise ValueError(
                f"frames must be {least} to 8 with reversals={reversals}, got {frames}: all their "
                "orders are listed"
            )
        self.base, self.elements, self.frames = base, elements, frames
        orders = torch.tensor(list(itertools.permutations(range(frames))))
        right = (orders == torch.arange(frames)).all(1)
        if not reversals:
            right |= (orders.flip(1) == torch.arange(frames)).all(1)
        self.wrong = orders[~right]  # W F, on the CPU, where draws are

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        """Views (B, N, F, 3, S, S), `target` (B,) the odd one, `frames` (B, N, F) as shown."""
        batch = self.base(batch, draws.fork("base"))
        views, frames = batch.get("views", []), batch.get("frames")
        if len(views) != 1 or views[0].ndim != 5 or frames is None:
            shapes = [tuple(view.shape) for view in views]
            raise ValueError(
                "the odd one out is asked of one clip of each recording with its `frames`: choose "
                f"decode=clip; `base` gave views {shapes}"
            )
        (x,) = views
        room = x.shape[1] - self.frames
        if room < 0:
            raise ValueError(
                f"clips of {x.shape[1]} frames hold no sequence of {self.frames}: raise "
                "decode.frames, or lower method.augment.frames"
            )
        start = draws.fork("start").integers(room + 1, self.elements)  # B N
        odd = draws.fork("odd").integers(self.elements)  # B
        order = self.wrong[draws.fork("order").integers(len(self.wrong))]  # B F
        is_odd = torch.arange(self.elements) == odd[:, None]
        shown = torch.where(is_odd[..., None], order[:, None], torch.arange(self.frames))
        picked = start[..., None] + shown  # B N F
        there = to(picked, x.device)
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        named = frames.gather(1, to(picked.flatten(1), frames.device)).view(picked.shape)
        return {**batch, "views": [x[rows, there]], "frames": named, "target": to(odd, x.device)}


def in_order(frames: Tensor) -> Tensor:
    """Whether the frames (..., F) that a sequence shows rise: the answer, from indices alone."""
    return (frames.diff(dim=-1) > 0).all(-1)
