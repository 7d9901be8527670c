"""Rays through scenes: what each pixel shows, and its colour."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.scenes.rays import dot
from unlabeled.scenes.solids import SOLIDS, hit
from unlabeled.scenes.world import ZOOM, Scene

LOW = torch.tensor([solid.low for solid in SOLIDS.values()])
HIGH = torch.tensor([solid.high for solid in SOLIDS.values()])
CORNERS = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
HIGHLIGHT = 5  # squarings of a highlight: an exponent of 32
REACH = 1.2  # of the ball about a thing that is 1 in size: a cube's corners lie farther out
SLACK = 2e-3  # of a point's depth, in which nothing hides it
LIFT = 4e-3  # start of a shadow's ray above the surface


class Hits(NamedTuple):
    """What P = size * size pixels of B scenes show, flat, in rows; N = B * P."""

    depth: Tensor  # (N,)
    what: Tensor  # (N,) int64: thing of its scene; Q is the wall, Q + 1 the floor
    normal: Tensor  # (3, N), of length 1, in the camera's axes
    place: Tensor  # (3, N), where textures are looked up
    direction: Tensor  # (3, P): the rays
    size: int


def trace(scene: Scene, size: int) -> Hits:
    """Casts a ray through the centre of every pixel of square images."""
    q, p = scene.kind.shape[1], size * size
    along = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = along.repeat(size) * ZOOM, -along.repeat_interleave(size) * ZOOM
    direction = torch.stack([x, y, -torch.ones(p)])
    depth, what, normal, place = _background(scene, direction, q)
    thing, pixel = _covered(scene, size)
    flat = torch.div(thing, q, rounding_mode="floor") * p + pixel
    t, n, at = _strike(scene, thing, torch.zeros(3, 1), pick(direction, pixel))
    depth.scatter_reduce_(0, flat, t, "amin")
    seen = (t == pick(depth, flat)).nonzero().flatten()
    spot = pick(flat, seen)
    what.index_copy_(0, spot, pick(thing, seen) % q)
    for whole, part in ((normal, n), (place, at)):
        for axis in range(3):
            whole[axis].index_copy_(0, spot, pick(part[axis], seen))
    return Hits(depth, what, normal, place, direction, size)


def pick(x: Tensor, positions: Tensor) -> Tensor:
    """Some columns (..., R) of many; `index_select` is eight times as fast as brackets."""
    return x.index_select(-1, positions)


def _background(scene: Scene, direction: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wall and floor, as the fields of `Hits`."""
    b, p = len(scene.kind), direction.shape[1]
    facing = scene.wall[:, :3]
    slant = (
        facing[:, :1] * direction[0] + facing[:, 1:2] * direction[1] + facing[:, 2:] * direction[2]
    )
    wall = torch.where(slant < 0, -scene.wall[:, 3:] / slant, math.inf)
    down = torch.where(direction[1] < 0, -1 / direction[1], math.inf)
    floor = down * scene.floor[:, None]
    depth = torch.minimum(wall, floor).clamp(max=60.0)
    low = floor < wall
    up = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    normal = torch.where(low, up, facing.T[:, :, None]).reshape(3, -1)
    place = (direction[:, None] * depth).reshape(3, -1)
    return depth.reshape(b * p).clone(), (q + low.long()).reshape(b * p), normal, place


def _covered(scene: Scene, size: int) -> tuple[Tensor, Tensor]:
    """Pairs of (thing, pixel) (R,) that may meet: pixels of the box about each thing's corners."""
    low, high = LOW[scene.kind], HIGH[scene.kind]
    corners = low[:, :, None] + (high - low)[:, :, None] * CORNERS
    corners = corners * scene.size[..., None, None]
    at = (scene.turn[:, :, None] * corners[..., None, :]).sum(-1) + scene.centre[:, :, None]
    sign = torch.tensor([1.0, -1.0])
    screen = at[..., :2] * sign / (-at[..., 2:].clamp(max=-0.05) * ZOOM)
    screen = ((screen + 1) / 2 * size).flatten(0, 1)
    start = (screen.amin(1) - 1).floor().clamp(0, size).long()
    stop = (screen.amax(1) + 1).ceil().clamp(0, size).long()
    wide, tall = (stop - start).clamp(min=0).unbind(1)
    count = wide * tall * scene.there.flatten()
    thing = torch.repeat_interleave(count)
    within = torch.arange(len(thing)) - (count.cumsum(0) - count)[thing]
    row = torch.div(within, wide[thing], rounding_mode="floor")
    column = within - row * wide[thing]
    return thing, (start[thing, 1] + row) * size + start[thing, 0] + column


def _strike(
    scene: Scene, thing: Tensor, origin: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays (3, R) meet the thing (R,) each is paired with, if they do.

    Returns:
        t (R,), infinite for a miss; the normal (3, R), and the point in the thing's own axes.
    """
    kinds = pick(scene.kind.flatten(), thing)
    t = torch.full_like(direction[0], math.inf)
    normal, place = torch.zeros_like(direction), torch.zeros_like(direction)
    poses = [scene.turn.flatten(2), scene.centre, scene.size[..., None]]
    table = torch.cat(poses, dim=2).flatten(0, 1).T.contiguous()
    for kind in scene.kind.unique().tolist():
        rows = (kinds == kind).nonzero().flatten()
        if not len(rows):
            continue
        pose = pick(table, pick(thing, rows))
        r, middle, scale = pose[:9], pose[9:12], pose[12]
        o = (pick(origin, rows) if origin.shape[1] > 1 else origin) - middle
        d = pick(direction, rows)
        inside = [torch.stack([dot(r[i::3], v) / scale for i in range(3)]) for v in (o, d)]
        first, n = hit(kind, *inside)
        t.index_copy_(0, rows, first)
        reached = first.where(first.isfinite(), torch.zeros(()))
        for i in range(3):
            normal[i].index_copy_(0, rows, dot(r[3 * i : 3 * i + 3], n))
            place[i].index_copy_(0, rows, (inside[0][i] + reached * inside[1][i]) * scale)
    return t, normal, place


def hidden(scene: Scene, image: Tensor, point: Tensor) -> Tensor:
    """(R,) bool: whether a thing lies between the camera and points.

    Args:
        scene: B scenes.
        image: (R,) int64, the scene of each point.
        point: (3, R); its own surface does not hide it.
    """
    q = scene.kind.shape[1]
    things = (image[:, None] * q + torch.arange(q)).flatten()
    rays = point.repeat_interleave(q, dim=1)
    t, _, _ = _strike(scene, things, torch.zeros(3, 1), rays)
    near = (t < 1 - SLACK) & scene.there.flatten()[things]
    return near.view(-1, q).any(1)


def colours(scene: Scene, hits: Hits) -> Tensor:
    """(B, 3, size, size) in [0, 1]: Lambert's light, a highlight after Blinn, hard shadows."""
    (b, q), p = scene.kind.shape, hits.size**2
    surface = hits.what + (torch.arange(b) * (q + 2)).repeat_interleave(p)
    base, gloss = _painted(scene, surface, hits.place)
    n, rays = hits.normal.view(3, b, p), hits.direction[:, None]
    light, shine = scene.light.T[:, :, None], scene.shine.T[:, :, None]
    lit = dot(n, light).clamp(min=0)
    lit = lit * ~_shadowed(scene, rays * hits.depth.view(b, p) + n * LIFT, lit)
    half = light - rays / dot(rays, rays).sqrt()
    shiny = dot(half, n).clamp(min=0) / dot(half, half).sqrt()
    for _ in range(HIGHLIGHT):
        shiny = shiny * shiny
    shiny = shiny * gloss.view(b, p) * (lit > 0)
    ambient = scene.ambient[:, None] * (0.8 + 0.2 * n[1])
    colour = base.view(3, b, p) * (ambient + lit * shine) + shiny * shine
    colour = colour.clamp(0, 1)
    colour = colour * (1.4 - 0.4 * colour)  # as a film does: more light in what is dark
    return colour.view(3, b, hits.size, hits.size).transpose(0, 1)


def _shadowed(scene: Scene, point: Tensor, lit: Tensor) -> Tensor:
    """(B, P) bool: which lit points (3, B, P) lie in the shadow of a solid; cards throw none."""
    (b, q), p = scene.kind.shape, point.shape[2]
    light = scene.light.T[:, :, None]
    dark = torch.zeros(b * p, dtype=torch.bool)
    for m in range(scene.solids):
        away = scene.centre[:, m].T[:, :, None] - point
        t = dot(away, light)
        reach = scene.size[:, m, None] * scene.there[:, m, None] * REACH
        near = (dot(away, away) - t * t < reach * reach) & (t > -reach) & (lit > 0)
        rows = near.flatten().nonzero().flatten()
        image = torch.div(rows, p, rounding_mode="floor")
        start, toward = pick(point.flatten(1), rows), pick(scene.light.T.contiguous(), image)
        t, _, _ = _strike(scene, image * q + m, start, toward)
        dark[rows] |= t.isfinite()
    return dark.view(b, p)


def _painted(scene: Scene, surface: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The colour (3, N) of points (3, N) on surfaces (N,) without light, and their gloss (N,)."""
    parts = [scene.axes.flatten(2), scene.phase, scene.colours.flatten(2), scene.gloss[..., None]]
    table = torch.cat(parts, dim=2).flatten(0, 1).T.contiguous()
    rows = pick(table, surface)
    a, b, c = (dot(rows[3 * i : 3 * i + 3], place) + rows[9 + i] for i in range(3))
    pattern = pick(scene.pattern.flatten(), surface)
    sines = a.sin(), b.sin(), c.sin()
    choices = (
        0.12 * sines[0],  # nearly plain
        sines[0],  # stripes
        sines[0] * sines[1] * sines[2] * 4,  # checks
        (sines[0] + sines[1] + sines[2]).abs() - 1.2,  # spots
        (a + 2.2 * (0.7 * b + sines[2]).sin()).sin(),  # marble
        (1.7 * a + sines[1]).sin() * 0.6 + (0.6 * b + 2 * sines[2]).sin() * 0.6,  # clouds
    )
    mix = choices[0]
    for i in range(1, len(choices)):
        mix = torch.where(pattern == i, choices[i], mix)
    mix = (0.5 + 2.5 * mix).clamp(0, 1)
    return rows[12:15] + (rows[15:18] - rows[12:15]) * mix, rows[18]


def picture(scene: Scene, size: int, finer: int = 2) -> Tensor:
    """Images (B, 3, size, size) uint8, every pixel the mean of finer x finer rays."""
    fine = F.avg_pool2d(colours(scene, trace(scene, size * finer)), finer)
    return (fine * 255).round().to(torch.uint8)
