"""What stands in a scene, drawn from (seed, split, index) alone.

The camera is at the origin and looks along -z, x to the right and y up; a pixel's ray has z = -1,
so that its parameter is depth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlabeled.draws import Draws
from unlabeled.scenes.solids import CARDS, CLASSES

ZOOM = 0.5  # half the height of the view at depth 1
DEPTH = 4.0  # of the first solid
LAYER = 1.4  # from one solid to the next one behind it
PATTERNS = 6
SIZES = (0.75, 1.25)  # radius of the ball about a solid
LEAN = math.radians(40)  # most that a solid is turned about each axis: less than a right angle's
# half, beyond which the key-points of a cube would have other names
# factor -> how many uniform numbers it takes for one solid, card, surface or scene
FACTORS = {
    "position": 2,
    "scale": 1,
    "rotation": 3,
    "colour": 6,
    "texture": 8,
    "light": 7,
    "room": 4,
    "clutter": 8,
}
FACTOR_NAMES = (
    *("x", "y", "size", "yaw", "pitch", "roll", "hue", "pattern", "frequency"),
    *("light_azimuth", "light_height", "ambient", "room_depth", "cards"),
)


@dataclass(frozen=True)
class Scene:
    """B scenes of Q things each, solids first, then cards; two surfaces, wall and floor, follow.

    Motion is another `centre` and `turn` of the same scene (`dataclasses.replace`).
    """

    kind: Tensor  # (B, Q) int64 into SOLIDS
    there: Tensor  # (B, Q) bool
    centre: Tensor  # (B, Q, 3)
    turn: Tensor  # (B, Q, 3, 3): columns are the thing's axes
    size: Tensor  # (B, Q): of its unit
    wall: Tensor  # (B, 4): normal, distance
    floor: Tensor  # (B,): below the camera
    pattern: Tensor  # (B, Q + 2) int64
    axes: Tensor  # (B, Q + 2, 3, 3): rows are directions of the pattern, as long as it is fine
    phase: Tensor  # (B, Q + 2, 3)
    colours: Tensor  # (B, Q + 2, 2, 3) in [0, 1]
    gloss: Tensor  # (B, Q + 2)
    light: Tensor  # (B, 3): towards it
    shine: Tensor  # (B, 3): its colour
    ambient: Tensor  # (B,)
    factors: Tensor  # (B, F) float32, by FACTOR_NAMES, of the first solid and the scene
    solids: int  # the first so many of the Q may be solids


class World:
    """Draws scenes.

    Args:
        solids: most solids of one image; with more than one, each image has one to so many.
        cards: most flat things that clutter one image.
        vary: share of its range that a factor (`FACTORS`) varies in: 1 fully, 0 not at all.
            Factors that are not named vary fully.
        seed: of all scenes.

    Raises:
        ValueError: a setting is out of range, or no factor has that name.
    """

    def __init__(
        self,
        *,
        solids: int = 1,
        cards: int = 7,
        vary: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        if solids < 1 or cards < 0:
            raise ValueError(
                f"a scene needs at least 1 solid and 0 cards, got solids={solids}, cards={cards}"
            )
        self.vary = dict.fromkeys(FACTORS, 1.0)
        for name, share in (vary or {}).items():
            if name not in FACTORS:
                raise ValueError(f"vary: no factor is named {name!r}; there are {list(FACTORS)}")
            if not 0 <= share <= 1:
                raise ValueError(f"vary.{name} must be in [0, 1], got {share}")
            self.vary[name] = float(share)
        self.solids, self.cards, self.seed = solids, cards, seed

    def classes(self, positions: Sequence[int]) -> Tensor:
        """(B,) int64: class of the first solid of each image; each class is as frequent."""
        return torch.as_tensor(positions) % len(CLASSES)

    def scenes(
        self, split: str, positions: Sequence[int], redraw: Mapping[str, int] | None = None
    ) -> Scene:
        """Scenes of a split.

        Args:
            split: any name.
            positions: which images.
            redraw: factors to draw anew, by a number that names the draw: all else stays.

        Raises:
            ValueError: `redraw` names no factor.
        """
        if unknown := set(redraw or ()) - FACTORS.keys():
            raise ValueError(f"redraw: no factor is named {sorted(unknown)[0]!r}")
        q, b = self.solids + self.cards, len(positions)
        u = {}
        for name, width in FACTORS.items():
            key = ("scenes", self.seed, split, name, (redraw or {}).get(name, 0))
            drawn = [Draws(*key, int(i)).uniform(q + 2, width)[0] for i in positions]
            u[name] = 0.5 + (torch.stack(drawn) - 0.5) * self.vary[name]
        more = torch.stack(
            [Draws("scenes", self.seed, split, int(i)).uniform(q)[0] for i in positions]
        )
        kind, there = self._things(more, u["clutter"], positions)
        centre, size, turn, angles = self._poses(u, more)
        wall, floor = _room(
            u["room"][:, 0], centre[:, : self.solids], size[:, : self.solids], there
        )
        pattern, axes, phase, gloss = _texture(u["texture"])
        colours, hue = _colours(u["colour"])
        light, shine, ambient, aim = _light(u["light"][:, 0])
        screen = centre[:, 0, :2] / (-centre[:, 0, 2:] * ZOOM)
        known = [screen, size[:, :1], angles[:, 0], hue[:, :1], pattern[:, :1]]
        known += [axes[:, 0].norm(dim=-1)[:, :1], aim, ambient[:, None], wall[:, 3:]]
        known += [there[:, self.solids :].sum(1, keepdim=True)]
        factors = torch.cat([x.float().view(b, -1) for x in known], dim=1)
        return Scene(
            **{"kind": kind, "there": there, "centre": centre, "turn": turn, "size": size},
            **{"wall": wall, "floor": floor, "pattern": pattern, "axes": axes, "phase": phase},
            **{"colours": colours, "gloss": gloss, "light": light, "shine": shine},
            **{"ambient": ambient, "factors": factors, "solids": self.solids},
        )

    def _things(
        self, more: Tensor, clutter: Tensor, positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What each thing is (B, Q) and whether it is there."""
        n, b = self.solids, len(more)
        kind = (more * len(CLASSES)).long()
        kind[:, 0] = self.classes(positions)
        kind[:, n:] = len(CLASSES) + (clutter[:, n:-2, 0] * len(CARDS)).long()
        solids = 1 + (clutter[:, 0, 1] * n).long()
        cards = (clutter[:, 0, 2] * (self.cards + 1)).long()
        there = torch.ones(b, n + self.cards, dtype=torch.bool)
        there[:, :n] = torch.arange(n) < solids[:, None]
        there[:, n:] = torch.arange(self.cards) < cards[:, None]
        return kind, there

    def _poses(
        self, u: Mapping[str, Tensor], more: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Centre (B, Q, 3), size (B, Q), turn (B, Q, 3, 3) and its three angles (B, Q, 3)."""
        n = self.solids
        size = SIZES[0] + (SIZES[1] - SIZES[0]) * u["scale"][:, :-2, 0]
        depth = DEPTH + LAYER * torch.arange(n + self.cards).expand_as(size)
        if n > 1:
            size = size * 0.62 * (depth / DEPTH).sqrt()
        room = 0.96 - size / (depth * ZOOM)  # of the view, either way, for a solid to be whole
        screen = (2 * u["position"][:, :-2] - 1) * room.clamp(min=0.1)[..., None]
        angles = (2 * u["rotation"][:, :-2] - 1) * LEAN
        # cards stand anywhere: two of three behind the solids, the third small and before them
        c = u["clutter"][:, n:-2]
        before = torch.arange(self.cards) % 3 == 2
        far = torch.where(before, 2.2 + 0.6 * c[..., 1], 4.9 + 2.6 * c[..., 1])
        large = torch.where(before, 0.1 + 0.2 * c[..., 2], 0.25 + 0.75 * c[..., 2])
        depth = torch.cat([depth[:, :n], far], dim=1)
        size = torch.cat([size[:, :n], large], dim=1)
        screen = torch.cat([screen[:, :n], 2.2 * c[..., 3:5] - 1.1], dim=1)
        lean = (2 * c[..., 5:8] - 1) * torch.tensor([1.1, 1.1, math.pi])
        angles = torch.cat([angles[:, :n], lean], dim=1)
        centre = torch.cat([screen * (depth * ZOOM)[..., None], -depth[..., None]], dim=-1)
        return centre, size, turned(angles), angles


def turned(angles: Tensor) -> Tensor:
    """Rotations (..., 3, 3) by yaw about y, then pitch about x, then roll about z (..., 3)."""
    (cy, cp, cr), (sy, sp, sr) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    entries = [
        *(cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy),
        *(sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy),
        *(-cp * sy, sp, cp * cy),
    ]
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def _room(u: Tensor, centre: Tensor, size: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Wall (B, 4) and floor (B,), which lies below all solids."""
    yaw, pitch = (u[:, 0] - 0.5) * 1.0, (u[:, 1] - 0.5) * 0.3
    normal = [yaw.sin() * pitch.cos(), pitch.sin(), yaw.cos() * pitch.cos()]
    far = 6.0 + 3.0 * u[:, 2] + LAYER * (size.shape[1] - 1)
    wall = torch.stack([*normal, far], dim=1)
    lowest = (centre[..., 1] - size).masked_fill(~there[:, : size.shape[1]], 0.0).amin(1)
    return wall, (-lowest).clamp(min=0.9) + 0.9 * u[:, 3]


def _texture(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pattern = (u[..., 0] * PATTERNS).long().clamp(max=PATTERNS - 1)
    fine = 3.0 * (9.0 / 3.0) ** u[..., 1]  # radians in a unit
    axes = turned((u[..., 2:5] - 0.5) * 2 * math.pi) * fine[..., None, None]
    return pattern, axes, u[..., 5:] * 2 * math.pi, (1.5 * u[..., 2] - 0.75).clamp(min=0)


def _colours(u: Tensor) -> tuple[Tensor, Tensor]:
    """Two colours (B, Q + 2, 2, 3) of everything, and the first one's hue."""
    start = u[..., 0] + 0.382 * torch.arange(u.shape[1])  # without variation they still differ
    hue = torch.stack([start, start + 0.15 + 0.7 * u[..., 1]], dim=-1) % 1
    strong, bright = u[..., 2:4] ** 0.7, 0.25 + 0.75 * u[..., 4:6]
    channel = torch.tensor([0.0, 2 / 3, 1 / 3])
    wheel = ((hue[..., None] + channel) % 1 * 6 - 3).abs() - 1
    colours = bright[..., None] * (1 - strong[..., None] * (1 - wheel.clamp(0, 1)))
    first, second = colours.unbind(2)
    # half as far apart as they were drawn, so that shapes are seen through their textures
    return torch.stack([first, (first + second) / 2], dim=2), hue[..., 0]


def _light(u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Direction (B, 3), colour (B, 3), ambient (B,) and the angles (B, 2) of the direction."""
    azimuth, height = (u[:, 0] - 0.5) * 2.6, 0.25 + 0.8 * u[:, 1]
    across = height.cos()
    light = torch.stack([azimuth.sin() * across, height.sin(), azimuth.cos() * across], dim=1)
    shine = (0.75 + 0.45 * u[:, 2:3]) * (0.85 + 0.3 * u[:, 4:7])
    return light, shine, 0.32 + 0.26 * u[:, 3], torch.stack([azimuth, height], dim=1)
