"""The solids: ten classes of them, and cards for clutter.

All but the corners of some fit into a ball of radius 1 about the origin; y is up, z to the viewer.
"""

import math

import torch
from torch import Tensor

from unlabeled.scenes.rays import RING, TUBE, Part, Plane, Quadric, Solid, meet


def _box(x: float, y: float, z: float) -> Part:
    return tuple(
        Plane(tuple(sign * float(i == axis) for i in range(3)), half)  # type: ignore[arg-type]
        for axis, half in enumerate((x, y, z))
        for sign in (1, -1)
    )


def _slab(axis: int, low: float, high: float) -> Part:
    one = tuple(float(i == axis) for i in range(3))
    return Plane(one, high), Plane(tuple(-v for v in one), -low)  # type: ignore[arg-type]


def _prism(corners: list[tuple[float, float]], half: float) -> Part:
    """A convex polygon, counter-clockwise in x and y, of thickness 2 * half."""
    sides = []
    for (x, y), (u, v) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(u - x, v - y)
        n = ((v - y) / length, (x - u) / length, 0.0)
        sides.append(Plane(n, n[0] * x + n[1] * y))
    return (*sides, *_slab(2, -half, half))


def _around(radius: float, turn: float, n: int = 5) -> list[tuple[float, float]]:
    angles = [math.pi / 2 + 2 * math.pi * (i + turn) / n for i in range(n)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _pyramid(half: float, bottom: float, top: float) -> Part:
    run, rise = top - bottom, half
    length = math.hypot(run, rise)
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1)]
    faces = [
        Plane((x * run / length, rise / length, z * run / length), top * rise / length)
        for x, z in sides
    ]
    return (*faces, Plane((0.0, -1.0, 0.0), -bottom))


def _octahedron(radius: float) -> Part:
    n = 3**-0.5
    signs = [(x, y, z) for x in (n, -n) for y in (n, -n) for z in (n, -n)]
    return tuple(Plane(sign, radius * n) for sign in signs)


def _ball(radius: float, y: float = 0.0) -> Part:
    return (Quadric((1.0, 1.0, 1.0), (0.0, y, 0.0), radius * radius),)


def _tube(radius: float, half: float) -> Part:
    return (Quadric((1.0, 0.0, 1.0), (0.0, 0.0, 0.0), radius * radius), *_slab(1, -half, half))


def _cone(radius: float, bottom: float, top: float) -> Part:
    slope = radius / (top - bottom)
    return (Quadric((1.0, -slope * slope, 1.0), (0.0, top, 0.0), 0.0), *_slab(1, bottom, top))


def _star(outer: float, inner: float, half: float) -> tuple[Part, ...]:
    tips, notches = _around(outer, 0), _around(inner, 0.5)
    # the kites overlap, so that no ray slips through between two of them
    backs = _around(-0.1, 0)
    kites = [[backs[i], notches[i - 1], tips[i], notches[i]] for i in range(5)]
    return tuple(_prism(kite, half) for kite in kites)


def hit(kind: int, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """As `meet`, with the solid's position in `SOLIDS`."""
    return meet(list(SOLIDS.values())[kind], origin, direction)


def _even(x: float, y: float, z: float) -> tuple[tuple[float, float, float], ...]:
    return (-x, -y, -z), (x, y, z)


_DISC = (Quadric((1.0, 1.0, 0.0), (0.0, 0.0, 0.0), 1.0), *_slab(2, -0.03, 0.03))

SOLIDS: dict[str, Solid] = {
    "ball": Solid((_ball(0.85),), *_even(0.85, 0.85, 0.85)),
    "cube": Solid((_box(0.66, 0.66, 0.66),), *_even(0.66, 0.66, 0.66)),
    "cylinder": Solid((_tube(0.6, 0.78),), *_even(0.6, 0.78, 0.6)),
    "cone": Solid((_cone(0.78, -0.7, 0.95),), (-0.78, -0.7, -0.78), (0.78, 0.95, 0.78)),
    "torus": Solid((), *_even(RING + TUBE, RING + TUBE, TUBE)),
    "pyramid": Solid((_pyramid(0.7, -0.62, 0.95),), (-0.7, -0.62, -0.7), (0.7, 0.95, 0.7)),
    "capsule": Solid(
        (_tube(0.46, 0.5), _ball(0.46, 0.5), _ball(0.46, -0.5)), *_even(0.46, 0.96, 0.46)
    ),
    "octahedron": Solid((_octahedron(0.98),), *_even(0.98, 0.98, 0.98)),
    "cross": Solid(
        (_box(0.88, 0.28, 0.28), _box(0.28, 0.88, 0.28), _box(0.28, 0.28, 0.88)),
        *_even(0.88, 0.88, 0.88),
    ),
    "star": Solid(_star(0.97, 0.42, 0.2), *_even(0.95, 0.97, 0.2)),
    # thin cards for clutter, of no class
    "disc": Solid((_DISC,), *_even(1.0, 1.0, 0.03)),
    "square": Solid((_box(0.8, 0.8, 0.03),), *_even(0.8, 0.8, 0.03)),
    "triangle": Solid(
        (_prism(_around(1.0, 0, 3), 0.03),), (-0.867, -0.5, -0.03), (0.867, 1.0, 0.03)
    ),
}
CLASSES = tuple(SOLIDS)[:10]
CARDS = tuple(SOLIDS)[10:]
POINTS = ("top", "bottom", "left", "right", "front", "back")


def key_points() -> Tensor:
    """(classes, 6, 3): where the axes leave each solid, in the order of `POINTS`.

    The axis of the torus goes through its hole; its front and back are those of its lowest part.
    """
    axes = torch.tensor([[0, 1, 0], [0, -1, 0], [-1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, -1.0]]).T
    found = torch.stack([2 * axes - hit(k, 2 * axes, -axes)[0] * axes for k in range(10)])
    found = found.transpose(1, 2)
    ring = CLASSES.index("torus")
    found[ring, 4:] = torch.tensor([[0, -RING, TUBE], [0, -RING, -TUBE]])
    return found.contiguous()
