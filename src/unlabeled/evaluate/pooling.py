"""The poolings that make every stage's map about 9 000 numbers (Goyal et al., 2019)."""

import math
from collections.abc import Sequence
from typing import Literal

from unlabeled.evaluate.contract import FINAL, Request, Shapes

# (channels, height, width) of ResNet-50's stages at 224 pixels -> window (side, stride, padding)
PUBLISHED = {
    (64, 112, 112): (10, 10, 4),  # 12 x 12, 9 216 numbers; the padding's zeros count in the mean
    (256, 56, 56): (16, 8, 0),  # 6 x 6, 9 216
    (512, 28, 28): (13, 5, 0),  # 4 x 4, 8 192
    (1024, 14, 14): (8, 3, 0),  # 3 x 3, 9 216
    (2048, 7, 7): (6, 1, 0),  # 2 x 2, 8 192
}
Stages = Literal["all"] | int | Sequence[str]
Pooling = Literal["published", "adaptive"]


def checked(stages: Stages, pooling: str, max_features: int) -> None:
    """Raises ValueError for settings that no backbone can serve."""
    if stages == "" or (isinstance(stages, str) and stages != "all"):
        raise ValueError(f"stages must be 'all', a number or a list of names, got {stages!r}")
    if isinstance(stages, int) and stages < 1:
        raise ValueError(f"stages must be at least 1, the number of deepest stages, got {stages}")
    if not isinstance(stages, int) and not stages:
        raise ValueError("stages is empty: name a stage, or say 'all'")
    if pooling not in ("published", "adaptive"):
        raise ValueError(f"pooling must be published or adaptive, got {pooling!r}")
    if max_features < 1:
        raise ValueError(f"max_features must be at least 1, got {max_features}")


def pooled(shapes: Shapes, stages: Stages, pooling: Pooling, max_features: int) -> list[Request]:
    """The features of the wanted stages, in the backbone's order.

    "published" takes the windows of `PUBLISHED` where a map is one of those. They overlap, so
    they are not the cells that "adaptive" pooling cuts a map of the same size into: the last
    stage's see 6 x 6 of 7 x 7 places each. Other maps are cut into the finest square grid of
    cells with at most `max_features` numbers.

    Args:
        shapes: of the backbone.
        stages: "all", so many of the deepest, or names, of which "final" is the output; "all"
            has the output where it is not the average of the last stage.
        pooling: of maps that the benchmark knows.
        max_features: of a stage, otherwise.

    Raises:
        ValueError: the backbone has no such stage.
    """
    every = {name: cells(name, shape, pooling, max_features) for name, shape in shapes.maps.items()}
    if not shapes.pooled or not every:
        every["final"] = FINAL
    if "pixels" in shapes.maps:  # the baseline has its own stage
        return [every["pixels"]]
    if isinstance(stages, int):
        return list(every.values())[-stages:]
    if stages == "all":
        return list(every.values())
    known = {**every, "final": FINAL}
    if unknown := [name for name in stages if name not in known]:
        raise ValueError(f"the backbone has no stages {unknown}; it has {list(known)}")
    return [known[name] for name in stages]


def said(request: Request) -> str:
    """How a request pools, for the details of a score."""
    if request.window:
        side, stride, padding = request.window
        return f"average over windows of {side}, stride {stride}, padding {padding}, as published"
    return f"average over {request.grid} x {request.grid} cells"


def cells(name: str, shape: tuple[int, int, int], pooling: Pooling, max_features: int) -> Request:
    """The features of one stage with maps (channels, height, width): see `pooled`."""
    channels, height, width = shape
    if pooling == "published" and (window := PUBLISHED.get(shape)):
        side, stride, padding = window
        return Request(name, (height + 2 * padding - side) // stride + 1, window)
    return Request(name, max(1, min(height, width, math.isqrt(max_features // channels))))
