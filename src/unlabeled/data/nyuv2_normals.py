"""Surface normals of NYU Depth V2: from depth, from packed arrays and from pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.data.depth import Camera, axes_between, normals_of
from unlabeled.data.matlab import member, opened, unpickled
from unlabeled.data.rgb import pixels
from unlabeled.truth import Annotation

NORMALS = (
    "https://dl.fbaipublicfiles.com/fair_self_supervision_benchmark/"
    "nyuv2_surfacenormal_metadata.zip (all_normals.pklz) or "
    "https://www.inf.ethz.ch/personal/ladickyl/nyu_normals_gt.zip (nyu_normals_gt/)"
)
# Of the colour camera, as the data set's toolbox has it; there the first pixel's centre is (1, 1).
CAMERA = Camera(518.857901, 519.469611, 325.582449 - 0.5, 253.736166 - 0.5)
FINE = 32767  # steps of a component of a stored normal: 0.002 degrees
PROBED = 8  # images that say which axes a file of normals has


class Derived(Annotation):
    """Normals of the filled depth, unknown where the raw depth is."""

    def __init__(self, path: Path, rows: Sequence[int], window: int, tolerance: float) -> None:
        self.path, self.rows, self.window, self.tolerance = path, rows, window, tolerance

    def __len__(self) -> int:
        return len(self.rows)

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        found = []
        for i in positions:
            depth = _depth(self.path, "depths", self.rows[i])
            normals = normals_of(depth, CAMERA, window=self.window, tolerance=self.tolerance)
            found.append(normals * (_depth(self.path, "rawDepths", self.rows[i]) > 0))
        return found


class Packed(Annotation):
    """Normals (N, 3, h, w) int16 of an unpacked file."""

    def __init__(self, stored: np.ndarray) -> None:
        self.stored = stored

    def __len__(self) -> int:
        return len(self.stored)

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        return [F.normalize(torch.from_numpy(self.stored[i]).float(), dim=0) for i in positions]


class Pictures(Annotation):
    """Normals in colours of files <row + 1>.png, unknown where the raw depth is.

    Raises:
        ValueError: a file is not there.
    """

    def __init__(self, folder: Path, labelled: Path, rows: Sequence[int]) -> None:
        self.files = [folder / f"{row + 1:05}.png" for row in rows]
        self.labelled, self.rows = labelled, rows
        if missing := [file for file in self.files if not file.is_file()]:
            raise ValueError(f"{missing[0]} is not there: get it from {NORMALS}")

    def __len__(self) -> int:
        return len(self.files)

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        found = []
        for i in positions:
            colours = pixels(self.files[i])
            normals = colours.float() / 127.5 - 1
            known = (_depth(self.labelled, "rawDepths", self.rows[i]) > 0) & (
                normals.norm(dim=0) > 0.5
            )
            found.append(F.normalize(normals, dim=0) * known)
        return found


class Aligned(Annotation):
    """Normals of a file, with axes named as those of the depth are.

    Args:
        given: of the file.
        derived: of the depth, of the same images.
        like: those whose axes these have too.
    """

    def __init__(
        self, given: Annotation, derived: Annotation, like: "Aligned | None" = None
    ) -> None:
        self.given, self.derived, self.like = given, derived, like
        self._axes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.given)

    @property
    def axes(self) -> Tensor:
        """(3, 3), found when they are first needed."""
        if self.like is not None:
            return self.like.axes
        if self._axes is None:
            some = [*range(0, len(self), max(1, len(self) // PROBED))]
            given, wanted = (
                torch.cat([x.flatten(1).T for x in of.several(some)])
                for of in (self.given, self.derived)
            )
            self._axes = axes_between(given, wanted)
        return self._axes

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        axes = self.axes
        return [torch.einsum("ij,jhw->ihw", axes, x) for x in self.given.several(positions)]


def unpacked(path: Path, rows: Sequence[int], into: Callable[..., np.ndarray]) -> np.ndarray:
    """Packed normals (n, 3, h, w) int16, 0 where they are not valid."""
    content: Any = unpickled(path)
    names = ("all_normals", "all_valid_depth_masks", "all_filenames")
    if not isinstance(content, dict) or any(name not in content for name in names):
        raise ValueError(f"{path} must hold a dictionary of {names}")
    normals, masks, files = (content[name] for name in names)
    place = {int(str(name).partition("_")[0].partition(".")[0]): i for i, name in enumerate(files)}
    if missing := [row + 1 for row in rows if row + 1 not in place]:
        raise ValueError(f"{path} has no normals of image {missing[0]}")
    h, w = np.asarray(normals[0]).shape[:2]
    made = into((len(rows), 3, h, w), np.int16)
    for i, row in enumerate(rows):
        at = place[row + 1]
        normal = np.asarray(normals[at], dtype=np.float32).transpose(2, 0, 1)
        length = np.linalg.norm(normal, axis=0)
        valid = (np.asarray(masks[at]) != 0) & (length > 0.5)
        made[i] = np.round(normal / np.maximum(length, 0.5) * valid * FINE)
    return made


def _depth(path: Path, name: str, row: int) -> Tensor:
    """(h, w) float32 in metres."""
    with opened(path) as file:
        return torch.from_numpy(np.ascontiguousarray(member(file, name, path)[row].T)).float()
