"""What is known about images besides their class: boxes, masks, normals, key-points.

A layout's splits carry annotations (`Split.annotations`), the data module gives them
(`data.annotation(split, kind)`), evaluations read them. Positions are those of `data.scan`, and
pixels those of the whole image, `data.image(split, position)`, before any crop; `moved` takes
them into a crop. Real data sets and rendered ones follow the same table:

| kind | one image's tensor |
|---|---|
| `boxes` | (M, 4) float32: left, top, right, bottom of its objects |
| `box_labels` | (M,) int64: class of each box |
| `difficult` | (M,) bool: boxes that count neither as found nor as missed |
| `presence` | (C,) int64: for each class, 1 it is in the image, -1 it is not, 0 it does not count |
| `tags` | (M,) int64: all of its classes, where images have several and no other is denied |
| `masks` | (H, W) uint8: m + 1 on the visible pixels of object m, 0 elsewhere, 255 unknown |
| `segmentation` | (H, W) uint8: c + 1 on pixels of class c, 0 background, 255 unknown |
| `normals` | (3, H, W) float32 of length 1: x right, y up, z to the viewer; 0 where unknown |
| `keypoints` | (M, K, 3) float32: x, y and 2 visible, 1 hidden, 0 outside or not given |
| `lengths` | (M,) float32: what errors of an object's key-points are measured in; 0 not given |
| `factors` | (F,) float32: what the image was made from |
| `redrawn` | (F, 3, H, W) uint8: the image as it were, had one of its factors come out otherwise |
| `tracks` | (M, T, 4) float32: boxes in the T pictures of a recording, NaN where not seen |
| `motion` | () int64: how the first object of a recording moves |

Lengths are in pixels with the origin at the top left corner of the top left pixel, so that pixel
(row i, column j) covers [j, j + 1) x [i, i + 1) and its centre is (j + .5, i + .5). `data.names`
names key-points, factors, what is redrawn, and motions. M may differ between images, and be 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = (
    *("boxes", "box_labels", "difficult", "presence", "tags", "masks", "segmentation", "normals"),
    *("keypoints", "lengths", "factors", "redrawn", "tracks", "motion"),
)
UNKNOWN = 255  # in masks and segmentation


class Annotation(ABC):
    """One kind of annotation of every image of a split."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        """Those of some images, in that order; many at once may be cheaper."""

    def __getitem__(self, position: int) -> Tensor:
        return self.several([position])[0]

    def stacked(self, positions: Sequence[int] | None = None) -> Tensor:
        """(B, ...) of some images, of all if None. Raises RuntimeError if their shapes differ."""
        found = self.several(range(len(self)) if positions is None else positions)
        return found if isinstance(found, Tensor) else torch.stack(tuple(found))

    def take(self, positions: Tensor) -> "Annotation":
        """Those of the images at `positions` alone."""
        return _Taken(self, positions)


class Kept(Annotation):
    """Annotations in memory: a tensor (N, ...), or a list where shapes differ."""

    def __init__(self, values: Tensor | Sequence[Tensor]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        if isinstance(self.values, Tensor):
            return self.values[torch.as_tensor(positions)]  # type: ignore[return-value]
        return [self.values[i] for i in positions]


class Read(Annotation):
    """Annotations that `read` makes of a position when they are asked for, e.g. from a file."""

    def __init__(self, count: int, read: Callable[[int], Tensor]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        return [self.read(int(i)) for i in positions]


class _Taken(Annotation):
    def __init__(self, whole: Annotation, positions: Tensor) -> None:
        self.whole, self.positions = whole, positions.tolist()

    def __len__(self) -> int:
        return len(self.positions)

    def several(self, positions: Sequence[int]) -> Sequence[Tensor]:
        return self.whole.several([self.positions[i] for i in positions])


@runtime_checkable
class Annotated(Protocol):
    """The part of a data module that evaluations of annotations use, besides `Data`."""

    def kinds(self, split: str) -> frozenset[str]:
        """The annotations of a split."""
        ...

    def annotation(self, split: str, kind: str) -> Annotation:
        """One kind. Raises ValueError, naming those there are, if the split has it not."""
        ...

    def names(self, split: str, kind: str) -> tuple[str, ...]:
        """Names of key-points or factors, in their order; none where they have no names."""
        ...

    def image(self, split: str, position: int) -> Tensor:
        """The whole image (3, H, W) uint8, in whose pixels annotations are."""
        ...


class Window(NamedTuple):
    """The part of an image that a crop shows, and the crop's size, all in pixels.

    `decode.window` of `Center` is what evaluations see; flipping is left to whoever flips.
    """

    top: float
    left: float
    height: float
    width: float
    rows: int
    columns: int


def moved(kind: str, value: Tensor, window: Window) -> Tensor:
    """An image's annotation as it is in a crop.

    Boxes are clipped (what is outside has no area left, but keeps its place); key-points outside
    get visibility 0; maps take the nearest pixel and are unknown beyond the image. What has no
    pixels stays as it is.
    """
    top, left, height, width, rows, columns = window
    if kind not in KINDS:
        raise ValueError(f"the kind of an annotation must be one of {KINDS}, got {kind!r}")
    if kind in ("boxes", "keypoints"):
        scale = value.new_tensor([columns / width, rows / height])
        start, end = value.new_tensor([left, top]), value.new_tensor([columns, rows])
        if kind == "boxes":
            corners = (value.view(-1, 2, 2) - start) * scale
            return corners.clamp(min=0).minimum(end).flatten(1)
        places = (value[..., :2] - start) * scale
        inside = ((places >= 0) & (places < end)).all(-1, keepdim=True)
        return torch.cat([places, value[..., 2:] * inside], dim=-1)
    if kind == "lengths":
        return value * (columns / width * rows / height) ** 0.5
    if kind in ("masks", "segmentation", "normals"):
        i = (top + (torch.arange(rows) + 0.5) * height / rows).floor().long() + 1
        j = (left + (torch.arange(columns) + 0.5) * width / columns).floor().long() + 1
        unknown = 0 if kind == "normals" else UNKNOWN
        wide = F.pad(value, (1, 1, 1, 1), value=unknown)
        i, j = (x.clamp(0, n - 1) for x, n in zip((i, j), wide.shape[-2:], strict=True))
        return wide[..., i, :][..., j]
    return value
