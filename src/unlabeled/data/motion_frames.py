"""Shuffle & Learn's five frames of a window in which much moves (Misra et al., 2016)."""

import torch
from torch import Tensor

from unlabeled.batch import Batch
from unlabeled.data.clip_decode import entries
from unlabeled.data.clip_parts import Crop
from unlabeled.data.recordings import Recording
from unlabeled.data.rgb import UnreadableError
from unlabeled.draws import Draws


class MotionFrames:
    """Five frames a < b < c < d < e under one box: crops [(5, 3, S, S)] and `frames` (5,).

    d - b is uniform up to `tau_max`, as far as the recording is long enough; b is drawn with a
    probability proportional to the motion between b and d, c uniformly between them, a and e from
    `tau_min` to `tau_max` frames outside. Where nothing moves at all, b is uniform.

    Args:
        crop: the part of the pictures that is shown.
        tau_max: most frames from b to d (the paper's 60), and from a to b and d to e.
        tau_min: least frames from a to b and from d to e (the paper's 15).
    """

    gives = frozenset({"crops", "frames"})

    def __init__(self, *, crop: Crop, tau_max: int = 60, tau_min: int = 15) -> None:
        if not 1 <= tau_min <= tau_max or tau_max < 2:
            raise ValueError(
                f"need 1 <= tau_min <= tau_max and tau_max >= 2, got {tau_min} and {tau_max}"
            )
        self.crop, self.tau_max, self.tau_min = crop, tau_max, tau_min

    @property
    def least(self) -> int:
        """Pictures that a recording needs; what has fewer is no training recording."""
        return 2 * self.tau_min + 3

    def __call__(self, recording: Recording, *key: int | str) -> Batch:
        """Raises `UnreadableError` if the recording has fewer than `least` pictures."""
        frames = self.frames(recording, Draws(*key, "frames"))
        crop = self.crop(recording.pictures(frames.tolist()), Draws(*key, "box"))
        return entries([crop], frames, None)

    def frames(self, recording: Recording, draws: Draws) -> Tensor:
        """(5,) int64, rising."""
        count = len(recording.times)
        if count < self.least:
            raise UnreadableError(f"{count} frames are too few for tau_min: it takes {self.least}")
        u = draws.uniform(5)[0].double()
        longest = min(self.tau_max, count - 1 - 2 * self.tau_min)
        span = 2 + int(u[0] * (longest - 1))  # of b to d, 2 to longest
        moved = torch.cat([torch.zeros(1), recording.motion().double().cumsum(0)])
        starts = torch.arange(self.tau_min, count - self.tau_min - span)
        weight = moved[starts + span] - moved[starts]
        weight = weight if weight.sum() > 0 else torch.ones_like(weight)
        place = torch.searchsorted(weight.cumsum(0), u[1] * weight.sum(), right=True)
        b = int(starts[place.clamp(max=len(starts) - 1)])
        d = b + span
        c = b + 1 + int(u[2] * (span - 1))
        early = max(0, b - self.tau_max)
        a = early + int(u[3] * (b - self.tau_min - early + 1))
        late = min(count - 1, d + self.tau_max)
        e = d + self.tau_min + int(u[4] * (late - d - self.tau_min + 1))
        return torch.tensor([a, b, c, d, e])

    def __repr__(self) -> str:
        return f"MotionFrames(crop={self.crop!r}, tau_max={self.tau_max}, tau_min={self.tau_min})"
