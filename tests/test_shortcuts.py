"""Networks that train on images with nothing but a shortcut: they learn it, or a measure closes it.

The images are noise: no part of them looks like any other part of a thing, so that only what
cutting or a lens leaves behind can tell the answer of a puzzle.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unlabeled.augment.aberration import DropColors, ProjectColors
from unlabeled.augment.jigsaw import Jigsaw as Tiles
from unlabeled.augment.relative_position import RelativePosition as Patches
from unlabeled.augment.tiles import SpacedTiles
from unlabeled.draws import Draws
from unlabeled.methods.jigsaw import Jigsaw
from unlabeled.methods.relative_position import RelativePosition


class Tiny(nn.Module):
    """Two convolutions and a linear layer that knows places, of patches (B, 3, side, side)."""

    def __init__(self, side, dim=32):
        super().__init__()
        self.dim = dim
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * (side // 2) ** 2, dim),
        )

    def forward(self, x):
        return self.layers(x)


def learned(method, images, steps, lr=3e-3, size=16):
    """The accuracy on a quarter of the images after training on the others."""
    own, count = method.note, len(images) * 3 // 4
    method.note = lambda name, value: own(name, value) if method._noted is not None else None
    optimizer = torch.optim.Adam(method.parameters(), lr=lr)
    for step in range(steps):
        index = torch.randperm(count, generator=torch.Generator().manual_seed(step))[:size]
        batch = {"crops": [images[index]], "index": index}
        batch = method.augment(batch, Draws(0, "augment", step, rows=len(index)))
        optimizer.zero_grad()
        sum(method.loss(batch).values()).backward()
        optimizer.step()
    held = images[count:]
    batch = {"crops": [held], "index": torch.arange(len(held))}
    return method.measure(method.augmented(batch, 0), 0)["accuracy"].item()


def position(images, size, steps, ops=(), **cut):
    torch.manual_seed(0)
    augment = Patches([], list(ops), cut=SpacedTiles(grid=3, size=size, **cut))
    method = RelativePosition(
        Tiny(size), augment, None, hidden=[128], norm="batch", affine=True, reduction="mean"
    )
    return learned(method, images, steps)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def grey(values):
    """Images (B, 3, H, W) uint8 of values (B, H, W) in about [0, 1]."""
    return (values.clamp(0, 1) * 255).byte()[:, None].repeat(1, 3, 1, 1)


CHANCE = 6 / 40  # always to say "to the right": it is so for 6 of the 40 pairs of a 3 x 3 grid


def closed(accuracy):
    return accuracy == pytest.approx(CHANCE, abs=0.05)


def test_borders_that_meet_are_learned_and_a_gap_closes_that():
    """Noise whose pixels resemble their neighbours, and nothing farther away than 9 pixels."""
    x = noise(400, 1, 80, 80)
    x = F.avg_pool2d(F.avg_pool2d(x, 5, stride=1), 5, stride=1)[:, 0]
    images = grey((x - x.mean()) / x.std() * 0.2 + 0.5)
    assert position(images, 12, 150, gap=0, jitter=0) > 0.6
    assert position(images, 12, 150, gap=0, jitter=3) < 0.4  # borders seldom meet
    assert closed(position(images, 12, 150, gap=8, jitter=3))


def test_distances_that_are_regular_are_learned_and_jitter_closes_that():
    """Crossed waves of period 12 tell by how much of it a patch lies farther on, gap or no gap."""
    phase = 2 * math.pi * noise(160, 2, 1, 1)
    at = torch.arange(64) * 2 * math.pi / 12
    images = grey(0.5 + ((at + phase[:, 0]).sin() + (at[:, None] + phase[:, 1]).sin()) / 4)
    assert position(images, 12, 80, gap=3, jitter=0) > 0.9
    assert closed(position(images, 12, 80, gap=3, jitter=7))


def through_a_lens(count, moved, side=80):
    """Grey waves in all directions, green enlarged so that borders lie `moved` pixels outwards.

    Computed, not resampled: the blur of pixels in between would tell the place as well.
    """
    direction, phase, length = noise(3, count, 16, 1, 1)
    k, angle = 2 * math.pi / (8 + 8 * length), 2 * math.pi * direction
    at = torch.arange(side) - (side - 1) / 2

    def seen(scale):
        along = angle.cos() * at * scale + angle.sin() * at[:, None] * scale
        return 0.5 + 0.7 * (k * along + 2 * math.pi * phase).sin().mean(1)

    grey, green = seen(1.0), seen(1 - moved / (side / 2))
    return (torch.stack([grey, green, grey], 1).clamp(0, 1) * 255).byte()


@pytest.mark.parametrize("measure", [DropColors(), ProjectColors()], ids=["drop", "project"])
def test_a_lens_is_learned_and_colours_that_go_close_that(measure):
    images, cut = through_a_lens(400, moved=2.0), {"gap": 12, "jitter": 4}
    if isinstance(measure, DropColors):  # once
        assert position(images, 16, 90, **cut) > 0.9
        assert closed(position(through_a_lens(400, moved=0.0), 16, 90, **cut))
    assert closed(position(images, 16, 90, [measure], **cut))


def test_brightness_is_learned_and_tiles_of_their_own_brightness_close_that():
    """Jigsaw: cells brighter the farther down and right, under noise."""
    cells = torch.linspace(0, 1, 9).view(1, 1, 3, 3)
    images = F.interpolate(cells, scale_factor=12) + noise(300, 3, 36, 36)
    images = (images / 2 * 255).byte()

    def found(*, per_tile_normalize):
        torch.manual_seed(0)
        options = dict(permutations=8, grid=3, tile=10, per_tile_normalize=per_tile_normalize)
        return learned(Jigsaw(Tiny(10), Tiles([], **options), None, dim=16), images, 60)

    assert found(per_tile_normalize=False) > 0.9
    assert found(per_tile_normalize=True) == pytest.approx(1 / 8, abs=0.12)  # of 75 images
