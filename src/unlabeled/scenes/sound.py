"""What scenes sound like: each class of solids has a timbre of its own.

Pitch, loudness, the moment and the noise say nothing about the class. The faster the first solid
moves, the louder it is.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from unlabeled.draws import Draws
from unlabeled.scenes.motion import Moving
from unlabeled.scenes.solids import CLASSES

PITCH = (180.0, 420.0)  # of the lowest partial, in Hz
PARTIALS = 6
# class by class: how strong each partial is, how far apart they are (1: harmonic), share of
# hiss, and how often in a second the sound is struck anew (0: it lasts)
TIMBRES = (
    ((1.0, 0.0, 0.0, 0.0, 0.0, 0.0), 1.0, 0.0, 0.0),  # a pure tone
    ((1.0, 0.0, 0.33, 0.0, 0.2, 0.0), 1.0, 0.0, 0.0),  # odd partials, as a clarinet
    ((1.0, 0.5, 0.33, 0.25, 0.2, 0.17), 1.0, 0.0, 0.0),  # all, as a string
    ((0.1, 0.3, 1.0, 0.3, 0.1, 0.0), 1.0, 0.0, 0.0),  # the third: nasal
    ((1.0, 0.6, 0.4, 0.3, 0.2, 0.1), 1.41, 0.0, 4.0),  # far apart and struck: a bell
    ((1.0, 0.0, 0.0, 0.0, 0.0, 0.0), 1.0, 0.0, 9.0),  # a pure tone struck fast
    ((0.4, 0.2, 0.1, 0.0, 0.0, 0.0), 1.0, 0.7, 0.0),  # hissing
    ((0.3, 0.0, 0.0, 0.0, 0.0, 0.0), 1.0, 0.8, 6.0),  # a rattle
    ((0.2, 0.2, 0.2, 0.4, 0.8, 1.0), 1.0, 0.0, 0.0),  # bright
    ((1.0, 0.0, 0.8, 0.0, 0.0, 0.6), 1.73, 0.1, 0.0),  # a chord out of tune
)


def sounds(
    moving: Moving,
    split: str,
    positions: Sequence[int],
    rate: int,
    *,
    timbre: Literal["class", "random"] = "class",
    noise: float = 0.02,
) -> Tensor:
    """The sound (B, samples) float32 in [-1, 1] of recordings, as long as their pictures.

    Args:
        moving: the recordings.
        split: any name.
        positions: which recordings.
        rate: samples in a second.
        timbre: that of the class, or of none: a control in which sound says nothing of it.
        noise: root mean square of the noise of the room; a full square wave has 1.
    """
    count = round(moving.frames / moving.rate * rate)
    time = torch.arange(count) / rate
    kinds = moving.world.classes(positions).tolist()
    loud = _stretched(moving, split, positions, count)
    made = []
    for row, (i, kind) in enumerate(zip(positions, kinds, strict=True)):
        draws = Draws("scenes", moving.seed, split, "sound", int(i))
        u = draws.uniform(4)[0].tolist()
        phases = draws.fork("phase").uniform(PARTIALS)[0]
        hiss = draws.fork("hiss").normal(2, count)[0]
        chosen = kind if timbre == "class" else int(u[3] * len(CLASSES))
        strength, apart, hissing, struck = TIMBRES[chosen]
        pitch = PITCH[0] * (PITCH[1] / PITCH[0]) ** u[0]
        number = torch.arange(PARTIALS)
        tones = pitch * (1 + number * apart)
        heard = torch.tensor(strength) * (tones < 0.45 * rate)  # none that would fold back
        waves = (2 * math.pi * (tones[:, None] * time + phases[:, None])).sin()
        sound = (heard[:, None] * waves).sum(0) / heard.square().sum().sqrt().clamp(min=1e-6)
        sound = (1 - hissing) * sound + hissing * hiss[0]
        if struck:
            sound = sound * (-6 * ((struck * time + u[1]) % 1)).exp() * 1.8
        gain = 0.08 + 0.12 * u[2]
        made.append(gain * (0.25 + 0.75 * loud[row]) * sound + noise * hiss[1])
    return torch.stack(made).clamp(-1, 1)


def _stretched(moving: Moving, split: str, positions: Sequence[int], count: int) -> Tensor:
    """(B, count): loudness, computed at few times and joined by lines."""
    coarse = max(2, math.ceil(moving.frames / moving.rate * 50))
    times = torch.linspace(0, moving.frames / moving.rate, coarse)
    few = moving.loudness(split, positions, times)
    return torch.nn.functional.interpolate(
        few[:, None], size=count, mode="linear", align_corners=True
    )[:, 0]
