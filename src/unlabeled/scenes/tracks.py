"""Where the solids of moving scenes are in every picture."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlabeled.scenes.labels import boxes
from unlabeled.scenes.motion import Moving
from unlabeled.scenes.render import trace


def tracks(moving: Moving, split: str, positions: Sequence[int], size: int) -> list[Tensor]:
    """Boxes (M, T, 4) float32 of the M solids of each recording in its T pictures.

    Each holds the pixels of its solid that are seen, as boxes of `unlabeled.truth`; where none
    is, it is all NaN. Solids are in the order of the scene, the one the class names first.

    Args:
        moving: the recordings.
        split: any name.
        positions: which recordings.
        size: side of the pictures in pixels.
    """
    found = []
    for frame in range(moving.frames):
        scene = moving.at(split, positions, frame)
        what = trace(scene, size).what.view(len(positions), 1, size, size)
        shown = what == torch.arange(moving.solids).view(1, -1, 1, 1)
        box = boxes(shown)
        found.append(box.where(shown.flatten(2).any(2)[..., None], torch.nan))
    there = scene.there[:, : moving.solids]
    whole = torch.stack(found, dim=2)  # B M T 4
    return [each[some] for each, some in zip(whole, there, strict=True)]
