"""An index of tracks for the small recordings that methods are tested on."""

import tempfile
from functools import cache
from pathlib import Path

import torch

from unlabeled.data.scenes_video import ScenesVideo
from unlabeled.data.tracks import Tracks

KEPT: list[tempfile.TemporaryDirectory] = []  # until the process ends


@cache
def track_file() -> str:
    """The folder of an index for conftest.SHORT; one recording in eight has no track."""
    folder = tempfile.TemporaryDirectory(prefix="tracks")
    KEPT.append(folder)
    root = Path(folder.name)
    for side, split in ScenesVideo(size=16, train=64, test=16)(root, 0).items():
        owner = torch.arange(2 * len(split)) // 2
        owner = owner[owner % 8 > 0]
        g = torch.Generator().manual_seed(0)
        corner = torch.randint(0, 8, (len(owner), 2, 2), generator=g)
        boxes = torch.cat([corner, corner + 8], 2).float()
        frames = torch.tensor([[0, 6], [3, 9]])[torch.arange(len(owner)) % 2]
        Tracks(owner, frames, boxes).write(root / f"{side}.npz", split.identity())
    return str(root)


def with_tracks(lines: list[str]) -> list[str]:
    """Overrides with that folder in the place of TRACKS."""
    return [x.replace("TRACKS", track_file()) if "TRACKS" in x else x for x in lines]
