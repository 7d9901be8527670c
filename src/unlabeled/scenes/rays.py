"""Where rays hit solids, with exact surface normals.

A solid is a union of convex parts, a part the common part of half-spaces and quadrics, so that a
ray enters it once (the slab method of Kay & Kajiya, 1986); the torus alone is found by sphere
tracing (Hart, 1996). y is up, z to the viewer.
Points and directions are (3, R): one row a coordinate.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 40  # of sphere tracing
NEAR_ENOUGH = 1e-3  # to the torus, in its own units
RING, TUBE = 0.66, 0.27  # radii of the torus


class Plane(NamedTuple):
    """The half-space where normal . p <= offset."""

    normal: tuple[float, float, float]
    offset: float


class Quadric(NamedTuple):
    """Where sum of weights * (p - centre)^2 <= level.

    A negative weight of y makes a cone below its apex, the centre.
    """

    weights: tuple[float, float, float]
    centre: tuple[float, float, float]
    level: float


Part = tuple[Plane | Quadric, ...]


class Solid(NamedTuple):
    """A shape; without parts it is the torus."""

    parts: tuple[Part, ...]
    low: tuple[float, float, float]  # corners of the box about it
    high: tuple[float, float, float]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(R,) of (3, R) and (3, R): summed in one order, so that no ray depends on its batch."""
    return torch.addcmul(torch.addcmul(a[0] * b[0], a[1], b[1]), a[2], b[2])


def meet(solid: Solid, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays from outside first meet a solid.

    Args:
        solid: what they meet.
        origin: (3, R).
        direction: (3, R), of any length.

    Returns:
        t (R,) with the point at origin + t * direction, infinite for rays that miss or start
        beyond; and the outward normal (3, R) of length 1, meaningless for them.
    """
    if not solid.parts:
        return _torus(origin, direction)
    first, normal = _enter(solid.parts[0], origin, direction)
    for part in solid.parts[1:]:
        t, n = _enter(part, origin, direction)
        closer = t < first
        first, normal = torch.where(closer, t, first), torch.where(closer, n, normal)
    return first, normal


def _enter(part: Part, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    near = torch.full_like(origin[0], -math.inf)
    far, face = -near, torch.zeros_like(origin[0], dtype=torch.int64)
    for i, surface in enumerate(part):
        clip = _half_space if isinstance(surface, Plane) else _quadric
        start, end = clip(surface, origin, direction)  # type: ignore[arg-type]
        later = start > near
        near, far = torch.where(later, start, near), torch.minimum(far, end)
        face.masked_fill_(later, i)
    flat = [s.normal if isinstance(s, Plane) else (0.0, 0.0, 0.0) for s in part]
    normal = origin.new_tensor(flat).T.contiguous().index_select(1, face)
    for i, surface in enumerate(part):
        if isinstance(surface, Quadric):
            point = origin + near * direction - origin.new_tensor(surface.centre)[:, None]
            out = point * origin.new_tensor(surface.weights)[:, None]
            out = out * dot(out, out).clamp(min=1e-12).rsqrt()
            normal = torch.where(face == i, out, normal)
    return torch.where((near < far) & (near > 0), near, math.inf), normal


def _half_space(plane: Plane, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    (a, b, c), offset = plane
    along = a * direction[0] + b * direction[1] + c * direction[2]
    t = (offset - (a * origin[0] + b * origin[1] + c * origin[2])) / along.abs()
    return torch.where(along < 0, -t, -math.inf), torch.where(along < 0, math.inf, t)


def _quadric(surface: Quadric, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    w = origin.new_tensor(surface.weights)[:, None]
    away = origin - origin.new_tensor(surface.centre)[:, None]
    a, b = dot(w * direction, direction), dot(w * direction, away)
    a = torch.where(a.abs() < 1e-12, 1e-12, a)  # along the axis of a cylinder
    square = b * b - a * (dot(w * away, away) - surface.level)
    root = square.clamp(min=0).sqrt()
    one, two = (-b - root) / a, (-b + root) / a
    start, end = torch.minimum(one, two), torch.maximum(one, two)
    misses = square < 0
    if surface.weights[1] < 0:  # a steep ray enters the lower of two cones for good, or leaves it
        steep, down = a < 0, direction[1] < 0
        start, end = (
            torch.where(steep, torch.where(down, end, -math.inf), start),
            torch.where(steep, torch.where(down, math.inf, start), end),
        )
    return torch.where(misses, math.inf, start), torch.where(misses, -math.inf, end)


def _torus(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """About the z axis."""
    length = dot(direction, direction).sqrt()
    start, end = _quadric(Quadric((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), 1.0), origin, direction)
    t, over = start.clamp(min=0), torch.full_like(start, math.inf)
    alive = ((start < end) & (end > 0)).nonzero().flatten()
    o, d, at, last = *(x.index_select(-1, alive) for x in (origin, direction)), t[alive], end[alive]
    for _ in range(STEPS):
        gap, _ = _to_tube(o + at * d)
        at = at + gap / length[alive]
    gap, normal = _to_tube(o + at * d)
    over[alive] = torch.where((gap.abs() < NEAR_ENOUGH) & (at < last), at, math.inf)
    normals = torch.zeros_like(origin)
    normals[:, alive] = normal
    return over, normals


def _to_tube(p: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the torus, and the direction away from it."""
    x, y, z = p
    around = (x * x + y * y).sqrt().clamp(min=1e-6)
    beside = 1 - RING / around
    middle = torch.stack([x * beside, y * beside, z])  # from the nearest point of the ring
    length = dot(middle, middle).sqrt().clamp(min=1e-6)
    return length - TUBE, middle / length
