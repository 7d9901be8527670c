"""Scenes that move: the first solid of a scene goes its way, the others stay or go theirs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from unlabeled.draws import Draws
from unlabeled.scenes.world import DEPTH, LAYER, LEAN, ZOOM, Scene, World, turned

MOTIONS = ("across", "down", "circle", "bounce", "approach", "swing", "diagonal", "eight")
SPEEDS = (0.25, 0.5)  # of a way to and fro, in a second
NEAR = 0.15  # of its depth that a solid comes nearer and goes farther


class Moving:
    """A world in motion. All else about a recording is as in the `World`, and stays.

    Args:
        world: what there is to see.
        frames: pictures of a recording.
        rate: pictures in a second.
        motion: "random": the way says nothing about the class; "class": each class has its own,
            as far as there are enough; "none": nothing moves.
    """

    def __init__(
        self,
        world: World,
        *,
        frames: int,
        rate: float,
        motion: Literal["random", "class", "none"] = "random",
    ) -> None:
        if frames < 1 or rate <= 0:
            raise ValueError(f"frames and rate must be positive, got {frames} and {rate}")
        if motion not in ("random", "class", "none"):
            raise ValueError(f"motion must be random, class or none, got {motion!r}")
        self.world, self.frames, self.rate, self.motion = world, frames, rate, motion
        self.solids, self.seed = world.solids, world.seed

    def motions(self, split: str, positions: Sequence[int]) -> Tensor:
        """(B,) int64 into MOTIONS: the way of the first solid of each recording."""
        return self._drawn(split, positions)[0][:, 0]

    def scenes(self, split: str, positions: Sequence[int]) -> Scene:
        """The scene of the picture in the middle of each recording."""
        return self.at(split, positions, self.frames // 2)

    def at(self, split: str, positions: Sequence[int], frame: int) -> Scene:
        """The scene of one picture of each recording."""
        still = self.world.scenes(split, positions)
        if self.motion == "none":
            return still
        kind, start, speed = self._drawn(split, positions)
        phase = start + speed * frame / self.rate
        n = self.solids
        home, size = still.centre[:, :n], still.size[:, :n]
        depth = -home[..., 2]
        room = (0.96 - size / (depth * ZOOM)).clamp(min=0.1)  # of the view, to stay whole in it
        place = home[..., :2] / (depth * ZOOM * room)[..., None]  # in [-1, 1]
        offset, nearer, lean = way(phase, kind, place)
        depth = depth * (1 + NEAR * nearer)
        room = (0.96 - size / (depth * ZOOM)).clamp(min=0.1)
        screen = offset * room[..., None] * (depth * ZOOM)[..., None]
        centre = still.centre.clone()
        centre[:, :n] = torch.cat([screen, -depth[..., None]], dim=-1)
        turn = still.turn.clone()
        turned_by = turned(torch.stack([lean, 0 * lean, 0 * lean], dim=-1))
        swings = (kind == MOTIONS.index("swing"))[..., None, None]
        turn[:, :n] = torch.where(swings, turned_by, turn[:, :n])
        deepest = (DEPTH + LAYER * (n - 1)) * (1 + NEAR) * ZOOM
        floor = still.floor.clamp(min=deepest)  # below all that moves, in every picture
        return dataclasses.replace(still, centre=centre, turn=turn, floor=floor)

    def loudness(self, split: str, positions: Sequence[int], times: Tensor) -> Tensor:
        """(B, T) in [0, 1]: how fast the first solid goes, at times (T,) in seconds."""
        if self.motion == "none":
            return torch.ones(len(positions), len(times))
        kind, start, speed = self._drawn(split, positions)
        kind, start, speed = kind[:, :1], start[:, :1], speed[:, :1]
        home = torch.zeros(len(positions), 1, 2)

        def where(at: Tensor) -> Tensor:
            phase = start + speed * at
            places = [
                torch.cat([o, n[..., None], a[..., None] / LEAN], dim=-1)
                for o, n, a in (way(p, kind, home) for p in phase.split(1, dim=1))
            ]
            return torch.cat(places, dim=1)

        step = 0.01
        fast = (where(times[None] + step) - where(times[None] - step)).norm(dim=-1)
        return fast / fast.amax(1, keepdim=True).clamp(min=1e-6)

    def _drawn(self, split: str, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Kind (B, n) int64, phase at the start and ways in a second, of every solid."""
        n = self.solids
        key = ("scenes", self.seed, split, "motion")
        u = torch.stack([Draws(*key, int(i)).uniform(n, 3)[0] for i in positions])
        kind = (u[..., 0] * len(MOTIONS)).long()
        if self.motion == "class":
            kind[:, 0] = self.world.classes(positions) % len(MOTIONS)
        return kind, u[..., 1], SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * u[..., 2]


def way(phase: Tensor, kind: Tensor, home: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where solids are on their ways.

    Args:
        phase: (B, n), 1 is once to and fro.
        kind: (B, n) int64 into MOTIONS.
        home: (B, n, 2) in [-1, 1], where each stands without motion.

    Returns:
        Places (B, n, 2) in [-1, 1]; how far (B, n) each is from its depth, in [-1, 1]; and its
        yaw (B, n), which holds for the kind "swing".
    """
    x, y = home.unbind(-1)
    wave = 1 - 4 * ((phase % 1) - 0.5).abs()  # from -1 to 1 and back, evenly
    angle = 2 * math.pi * phase
    hop = 1 - 8 * ((2 * phase) % 1 - 0.5).square()  # two throws
    zero = torch.zeros_like(x)
    ways = {
        "across": (wave, y, zero),
        "down": (x, wave, zero),
        "circle": (angle.cos(), angle.sin(), zero),
        "bounce": (wave, hop, zero),
        "approach": (x, y, angle.sin()),
        "swing": (x, y, zero),
        "diagonal": (wave, -wave, zero),
        "eight": (angle.sin(), (2 * angle).sin(), zero),
    }
    stacked = torch.stack([torch.stack(ways[name], dim=-1) for name in MOTIONS])
    chosen = stacked.gather(0, kind[None, ..., None].expand(1, *kind.shape, 3))[0]
    return chosen[..., :2], chosen[..., 2], LEAN * angle.sin()
