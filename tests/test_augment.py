import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torch.utils._pytree import tree_leaves

from unlabeled.augment import fuse
from unlabeled.augment.blur import GaussianBlur, gaussian_blur
from unlabeled.augment.color import ColorJitter, Grayscale, adjust_hue, jitter
from unlabeled.augment.geometry import Flip
from unlabeled.augment.jigsaw import Jigsaw
from unlabeled.augment.permutations import load_permutations, permutations
from unlabeled.augment.photometric import (
    Photometric,
    Solarize,
    adjust_sharpness,
    autocontrast,
    posterize,
    solarize,
)
from unlabeled.augment.pirl import PatchesOfImage, RotationOfImage
from unlabeled.augment.rotation import Rotations
from unlabeled.augment.tiles import Tiles
from unlabeled.augment.views import Views
from unlabeled.batch import denormalize, normalize
from unlabeled.draws import Draws

CONF = Path(__file__).parents[1] / "conf"
AUGMENTS = sorted(path.stem for path in (CONF / "augment").glob("*.yaml"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(count=24, side=20):
    """Floats in [0, 1] with greys, ties between channels, saturated and constant images."""
    x = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))
    x[0], x[1], x[2] = 0.5, 0.0, 1.0
    x[3, 1] = x[3, 0]
    x[4, 2] = x[4, 1]
    x[5] = (x[5] * 3).floor() / 2  # many exact ties, blacks and whites
    x[6] = x[6, :1]
    return x


def crops(count, side=36, number=1):
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, side, side)
    return [
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(number)
    ]


def assert_near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# Pixel ops equal torchvision's, image by image.


def test_hue_equals_torchvision():
    x = pictures()
    shift = torch.linspace(-0.5, 0.5, len(x))
    expected = torch.stack([TF.adjust_hue(i, s.item()) for i, s in zip(x, shift, strict=True)])
    assert_near(adjust_hue(x.clone(), shift), expected)
    assert expected.sub(x).abs().amax() > 0.5


def test_jitter_equals_torchvision_in_all_24_orders():
    x = pictures()
    order = torch.tensor(list(itertools.permutations(range(4))))
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(24, 4, generator=generator) * torch.tensor([1.8, 1.8, 1.8, 0.4])
    factors[:, 3] -= 0.2
    ops = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    expected = []
    for image, places, values in zip(x, order.tolist(), factors.tolist(), strict=True):
        for op in places:
            image = ops[op](image, values[op])
        expected.append(image)
    assert_near(jitter(x.clone(), order, factors), torch.stack(expected))


def test_jitter_changes_only_the_rows_it_is_told():
    x = pictures()
    order, factors = torch.arange(4).repeat(24, 1), torch.full((24, 4), 0.4)
    rows = torch.tensor([20, 3, 8])
    out = jitter(x.clone(), order, factors, rows)
    everyone = jitter(x.clone(), order, factors)
    assert torch.equal(out[rows], everyone[rows])
    others = [i for i in range(24) if i not in rows.tolist()]
    assert torch.equal(out[others], x[others])


@pytest.mark.parametrize(("side", "kernel"), [(20, 3), (20, 9), (40, 11), (32, 23)])
def test_blur_equals_torchvision(side, kernel):
    x = pictures(12, side)
    sigma = torch.linspace(0.1, 2.0, 12)
    expected = [TF.gaussian_blur(i, kernel, s.item()) for i, s in zip(x, sigma, strict=True)]
    assert_near(gaussian_blur(x, sigma, kernel), torch.stack(expected))


@pytest.mark.parametrize(("height", "kernel"), [(32, 3), (64, 7), (96, 9), (224, 23)])
def test_the_default_blur_is_a_tenth_of_the_height(height, kernel):
    x = torch.rand(1, 3, height, 32)
    out = GaussianBlur(p=1.0, sigma=(1.5, 1.5))(x.clone(), Draws(0, rows=1))
    assert_near(out, TF.gaussian_blur(x, [kernel, kernel], [1.5, 1.5]))


def test_the_other_ops_equal_torchvision():
    x = pictures()
    values = torch.linspace(0, 1, len(x))
    bits = torch.arange(len(x)) % 5 + 4
    pairs = [
        (solarize(x, values), [TF.solarize(i, v.item()) for i, v in zip(x, values, strict=True)]),
        (solarize(x, values * 0), [TF.solarize(i, 0.0) for i in x]),  # the threshold itself too
        (posterize(x, bits), [TF.posterize(i, int(b)) for i, b in zip(x, bits, strict=True)]),
        (autocontrast(x), [TF.autocontrast(i) for i in x]),
        (
            adjust_sharpness(x, values * 2),
            [TF.adjust_sharpness(i, 2 * v.item()) for i, v in zip(x, values, strict=True)],
        ),
        (
            Grayscale(p=1.0)(x.clone(), Draws(0, rows=len(x))),
            [TF.rgb_to_grayscale(i, num_output_channels=3) for i in x],
        ),
        (Flip(p=1.0)(x.clone(), Draws(0, rows=len(x))), [TF.horizontal_flip(i) for i in x]),
    ]
    for actual, expected in pairs:
        assert_near(actual, torch.stack(expected))


OPS = {
    "flip": Flip(p=0.5),
    "jitter": ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8),
    "grey": Grayscale(p=0.5),
    "blur": GaussianBlur(p=0.5, kernel=5),
    "solarize": Solarize(p=0.5),
    "photometric": Photometric(p=0.66),
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_draws_for_each_image(name):
    x = torch.rand(1, 3, 24, 24).repeat(64, 1, 1, 1)
    out = OPS[name](x.clone(), Draws(0, name, rows=64))
    kinds = len(out.flatten(1).unique(dim=0))
    unchanged = (out == x).flatten(1).all(1).float().mean().item()
    coin = name in ("flip", "grey", "solarize")
    assert kinds == 2 if coin else kinds > 20
    assert 1 - {"jitter": 0.8, "photometric": 0.66}.get(name, 0.5) == pytest.approx(
        unchanged, abs=0.17
    )
    assert out.isfinite().all()
    assert out.amin() >= 0
    assert out.amax() <= 1 + 1e-6


@pytest.mark.parametrize("name", OPS)
def test_the_frames_of_a_clip_share_a_draw(name):
    x = torch.rand(16, 3, 24, 24)
    clips = x[:, None].repeat(1, 4, 1, 1, 1)
    out = OPS[name](clips.clone(), Draws(0, name, rows=16))
    assert out.shape == clips.shape
    assert_near(out, out[:, :1].expand_as(out), 1e-6)
    assert_near(out[:, 0], OPS[name](x.clone(), Draws(0, name, rows=16)), 1e-6)


def test_orders_and_factors_cover_their_ranges(monkeypatch):
    given = {}

    def record(x, order, factors, rows):
        given.update(order=order, factors=factors, rows=rows)
        return x

    monkeypatch.setattr("unlabeled.augment.color.jitter", record)
    op = ColorJitter(brightness=1.5, contrast=0.4, hue=0.1, p=0.8)
    op(torch.rand(4096, 3, 1, 1), Draws(0, rows=4096))
    orders, counts = given["order"].unique(dim=0, return_counts=True)
    assert torch.equal(orders.sort(1).values, torch.arange(4).expand(24, 4))
    assert counts.min() > 4096 / 24 * 0.7
    assert_near(given["factors"].amin(0), torch.tensor([0.0, 0.6, 1.0, -0.1]), 1e-2)
    assert_near(given["factors"].amax(0), torch.tensor([2.5, 1.4, 1.0, 0.1]), 1e-2)
    correlations = torch.corrcoef(given["factors"][:, [0, 1, 3]].T) - torch.eye(3)
    assert correlations.abs().max() < 0.06
    assert len(given["rows"]) / 4096 == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Flip(p=1.5), "p is a probability"),
        (lambda: ColorJitter(hue=0.6), "hue is a share"),
        (lambda: ColorJitter(contrast=-0.1), "contrast must not be negative"),
        (lambda: GaussianBlur(sigma=(2.0, 0.1)), r"\[low, high\]"),
        (lambda: GaussianBlur(kernel=4), "odd"),
        (lambda: Rotations(Views([[]]), "some"), "copies must be all or one"),
        (lambda: Views([[], []], repeat=[1]), "repeat"),
        (lambda: Tiles(grid=3, size=0), "at least 1"),
        (lambda: permutations(25, grid=2), "4 tiles have 1 to 24 orders"),
        (lambda: permutations(9, criterion="far"), "max_min or max_mean"),  # type: ignore[arg-type]
        (lambda: Jigsaw([], permutations="nowhere.npy"), "no file of permutations"),
    ],
)
def test_wrong_values_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# Views.


def test_a_wrong_number_of_crops_is_refused():
    for chains, number in (([[]], 2), ([[], []], 1)):
        with pytest.raises(ValueError, match=f"{len(chains)} chains for {number} crops"):
            Views(chains)({"crops": crops(2, number=number)}, Draws(0, rows=2))
    with pytest.raises(ValueError, match="1 jigsaw for 2 crops"):
        Jigsaw([], permutations=2)({"crops": crops(2, number=2)}, Draws(0, rows=2))
    with pytest.raises(ValueError, match="for 1 crops"):
        PatchesOfImage([], [])({"crops": crops(2)}, Draws(0, rows=2))


def test_views_without_ops_are_the_normalised_crops_in_channels_last():
    given = crops(4, number=2)
    before = [x.clone() for x in given]
    out = Views({"large": [], "small": {}})({"crops": given, "step": 7}, Draws(0, rows=4))
    assert out["step"] == 7
    for x, crop, view in zip(before, given, out["views"], strict=True):
        assert torch.equal(x, crop)
        assert_near(view, normalize(crop), 0)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_crops_that_share_a_chain_get_draws_of_their_own():
    crop = crops(32)[0]
    (a, b, c) = Views([[Flip()], []], repeat=[2, 1])(
        {"crops": [crop, crop.clone(), crop]}, Draws(0, rows=32)
    )["views"]
    assert not torch.equal(a, b)
    assert torch.equal(c, normalize(crop))


def test_equal_ops_of_a_chain_draw_independently():
    crop = crops(64)[0]
    (x,) = Views([[Flip(), Flip()]])({"crops": [crop]}, Draws(0, rows=64))["views"]
    mirrored = (x != normalize(crop)).flatten(1).any(1).float().mean()
    assert 0.25 < mirrored < 0.75


def test_what_an_op_draws_does_not_depend_on_the_others():
    batch = {"crops": crops(32)}
    others = [[Solarize(p=0.0), Flip()], [Photometric(p=0.0), Flip(), Grayscale(p=0.0)]]
    a, b = (Views([chain])(batch, Draws(0, rows=32))["views"][0] for chain in others)
    assert torch.equal(a, b)


# Every augmentation of conf/augment.


def built(name):
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(f"augment/{name}").augment
    module = instantiate(cfg)
    number = sum(module.repeat) if isinstance(module, Views) else 1
    if isinstance(module, PatchesOfImage | RotationOfImage):
        number = 2
    large = {"relative_position": 400, "relative_position_cells": 255, "cpc": 256, "cpc_v2": 260}
    return module, number, large.get(name, 255 if cfg.get("tile") == 64 else 36)


def given(name, images):
    """A batch of crops, and what some take beside them."""
    rows = len(images[0])
    if name in ("frame_order", "odd_one_out"):
        count = 5 if name == "frame_order" else 8
        clip = torch.stack([images[0].roll(t, 3) for t in range(count)], 1)
        return {"crops": [clip], "frames": torch.arange(count).expand(rows, -1)}
    return {"crops": images, "audio": torch.ones(rows, 1000) / 2}


def flat(batch):
    return [*batch["views"], *tree_leaves(batch.get("target", []))]


@pytest.mark.parametrize("name", AUGMENTS)
def test_the_key_decides_the_views_whatever_the_number_of_processes(name):
    module, number, side = built(name)
    images = crops(6, side, number)

    def run(step, rows=6, rank=0, world=1):
        mine = [x[rank * rows : (rank + 1) * rows] for x in images]
        return flat(
            module(
                given(name, mine),
                Draws(0, "augment", step, rows=rows, rank=rank, world=world),
            )
        )

    whole, again, other = run(5), run(5), run(6)
    assert all(map(torch.equal, whole, again))
    assert name == "none" or not all(map(torch.equal, whole, other))
    assert all(x.isfinite().all() for x in whole)
    halves = zip(run(5, 3, 0, 2), run(5, 3, 1, 2), strict=True)
    for x, (first, second) in zip(whole, halves, strict=True):
        if name == "rotation":  # four blocks, one per turn
            parts = [t.unflatten(0, (4, -1)) for t in (first, second)]
            assert torch.equal(x.unflatten(0, (4, -1)), torch.cat(parts, 1))
        else:  # a rounding that differs may move a posterized or solarized pixel
            far = (x - torch.cat([first, second])).abs() > 2e-6 * x.abs().max().clamp(min=1)
            assert far.float().mean() < 1e-3


@pytest.mark.parametrize("name", AUGMENTS)
def test_pixels_stay_in_range(name):
    module, number, side = built(name)
    images = crops(4, side, number)
    for image in images:
        image[0], image[1], image[2, 0] = 0, 255, 0
    if name == "relative_position":  # whose patches are centred
        return
    views = module(given(name, images), Draws(0, rows=4))["views"]
    for view in views[:1] if name in ("picture_sound", "clip_sound") else views:
        assert view.dtype == torch.float32
        assert view.flatten(0, -4).is_contiguous(memory_format=torch.channels_last)
        if name == "denoising":  # noise is not clipped
            continue
        pixels = denormalize(view)
        assert pixels.amin() > -1e-5
        assert pixels.amax() < 1 + 1e-5


# Rotation.


def test_rotations_invert_and_their_target_is_the_turn():
    crop = crops(5)[0]
    out = Rotations(Views([[]]))({"crops": [crop]}, Draws(0, rows=5))
    (x,), target = out["views"], out["target"]
    assert target.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    upright = normalize(crop)
    for image, turns, i in zip(x, target.tolist(), list(range(5)) * 4, strict=True):
        assert torch.equal(torch.rot90(image, -turns, (-2, -1)), upright[i])
    assert not torch.equal(x[5:10], upright)
    assert torch.equal(x[5], torch.rot90(upright[0], 1, (-2, -1)))  # counter-clockwise


def test_one_random_rotation_of_every_image():
    crop = crops(64)[0]
    out = Rotations(Views([[]]), "one")({"crops": [crop]}, Draws(0, rows=64))
    (x,), target = out["views"], out["target"]
    assert x.shape == crop.shape
    assert (target.bincount(minlength=4) > 5).all()
    back = [torch.rot90(i, -t, (-2, -1)) for i, t in zip(x, target.tolist(), strict=True)]
    assert torch.equal(torch.stack(back), normalize(crop))


@pytest.mark.parametrize("copies", ["all", "one"])
def test_the_flip_comes_before_the_rotation(copies):
    crop = crops(8)[0]
    out = Rotations(Views([[Flip(p=1.0)]]), copies)({"crops": [crop]}, Draws(0, rows=8))
    (x,), target = out["views"], out["target"]
    flipped = normalize(crop).flip(-1)
    for i, (image, turns) in enumerate(zip(x, target.tolist(), strict=True)):
        assert torch.equal(image, torch.rot90(flipped[i % 8], turns, (-2, -1)))


def test_rectangles_are_not_rotated():
    batch = {"crops": [torch.zeros(2, 3, 32, 24, dtype=torch.uint8)]}
    with pytest.raises(ValueError, match="square"):
        Rotations(Views([[]]))(batch, Draws(0, rows=2))


# Tiles and permutations.


def coordinates(count, side):
    """Images whose first two channels say where a pixel is."""
    row = torch.arange(side, dtype=torch.uint8)[:, None].expand(side, side)
    return torch.stack([row, row.T, torch.zeros_like(row)]).expand(count, 3, side, side).clone()


def places(tiles):
    """Row and column of every tile's first pixel (B, T, 2), after checking that it is a square."""
    pixels = denormalize(tiles).mul(255).round().long()
    size = tiles.shape[-1]
    top, left = pixels[:, :, 0, :1, :1], pixels[:, :, 1, :1, :1]
    steps = torch.arange(size)
    assert torch.equal(pixels[:, :, 0], (top + steps[:, None]).expand(-1, -1, size, size))
    assert torch.equal(pixels[:, :, 1], (left + steps).expand(-1, -1, size, size))
    return torch.cat([top, left], 2)[..., 0]


@pytest.mark.parametrize(("side", "tile", "gap"), [(255, 64, 21), (36, 9, 3), (36, 12, 0)])
def test_tiles_lie_in_their_cells_and_the_permutation_inverts(side, tile, gap):
    count = 300 if side == 36 else 60
    module = Jigsaw([], permutations=20, tile=tile)
    out = module({"crops": [coordinates(count, side)]}, Draws(0, rows=count))
    (tiles,), target = out["views"], out["target"]
    assert tiles.shape == (count, 9, 3, tile, tile)
    order = module.permutations[target]
    assert target.unique().tolist() == list(range(20)) or count < 300
    found = places(tiles)
    upright = found.gather(1, order.argsort(1)[:, :, None].expand(-1, -1, 2))
    cell = side // 3
    corner = torch.tensor([(r * cell, c * cell) for r in range(3) for c in range(3)])  # row-major
    offset = upright - corner
    assert offset.min() == 0
    assert offset.max() == gap
    assert gap == 0 or len(offset.flatten(1).unique(dim=0)) == count  # a draw per tile
    assert gap == 0 or (offset != offset[:, :1]).any(1).float().mean(0).min() > 0.9  # both axes


def test_the_tiles_of_an_image_share_flip_and_grey():
    images = coordinates(40, 36)
    module = Jigsaw([Flip(p=0.5)], permutations=5, tile=9)
    out = module({"crops": [images]}, Draws(0, rows=40))
    columns = denormalize(out["views"][0]).mul(255).round()[:, :, 1]  # B T h w
    rising = columns[..., 0, 1] > columns[..., 0, 0]
    assert (rising == rising[:, :1]).all()
    assert rising[:, 0].unique().tolist() == [False, True]


def test_a_tile_larger_than_its_cell_is_refused():
    with pytest.raises(ValueError, match="tile=64 is larger than a cell of a 36x36 crop, 12x12"):
        Jigsaw([], permutations=5)({"crops": crops(2)}, Draws(0, rows=2))


def test_tiles_can_be_standardised_one_by_one():
    images = crops(4)
    images[0][0] = 17
    module = Jigsaw([], permutations=5, tile=9, per_tile_normalize=True)
    x = module({"crops": images}, Draws(0, rows=4))["views"][0]
    assert_near(x.mean((-2, -1)), torch.zeros(4, 9, 3), 1e-4)
    assert_near(x[1:].var((-2, -1), correction=0), torch.ones(3, 9, 3), 1e-3)
    assert torch.equal(x[0], torch.zeros_like(x[0]))


def distances(rows):
    between = (rows[:, None] != rows[None]).sum(-1)
    return between[~torch.eye(len(rows), dtype=torch.bool)]


def test_permutations_are_far_apart():
    near = permutations(100)
    assert (near[:9, None] != near[None, :9]).sum() == 9 * 8 * 9  # a Latin square
    assert distances(near).min() == 6
    assert distances(near).double().mean() == pytest.approx(8.02, abs=0.01)
    mean = permutations(100, criterion="max_mean")
    assert distances(mean).min() == 2
    assert distances(mean).double().mean() == pytest.approx(8.08, abs=0.005)
    for rows in (near, mean):
        assert len(rows.unique(dim=0)) == 100
        assert torch.equal(rows.sort(1).values, torch.arange(9).expand(100, 9))
    assert not torch.equal(near, permutations(100, seed=1))
    assert torch.equal(near[:10], permutations(10))


def test_permutations_of_other_grids():
    assert len(permutations(24, grid=2).unique(dim=0)) == math.factorial(4)
    rows = permutations(5, grid=4)
    assert torch.equal(rows.sort(1).values, torch.arange(16).expand(5, 16))
    assert distances(rows).min() == 16


def test_permutations_come_back_from_files_and_checkpoints(tmp_path):
    rows = permutations(30).numpy()
    for first in (0, 1):  # released files count tiles from 1
        np.save(tmp_path / "rows.npy", (rows + first).astype(np.uint8))
        assert torch.equal(load_permutations(tmp_path / "rows.npy", 9), permutations(30))
    np.save(tmp_path / "twice.npy", np.concatenate([rows, rows[:1]]))
    with pytest.raises(ValueError, match="different permutations"):
        load_permutations(tmp_path / "twice.npy", 9)
    saved = Jigsaw([], permutations=30, seed=4)
    other = Jigsaw([], permutations=30, seed=5)
    assert not torch.equal(saved.permutations, other.permutations)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(saved.permutations, other.permutations)


# PIRL.


def test_patches_come_in_random_orders_and_geometry_is_per_image():
    images = coordinates(64, 36)
    out = PatchesOfImage([], [], tile=12)({"crops": [images[:, :, :24], images]}, Draws(0, rows=64))
    image, patches = out["views"]
    assert image.shape == (64, 3, 24, 36)
    cells = places(patches) // 12
    number = cells[..., 0] * 3 + cells[..., 1]
    assert torch.equal(number.sort(1).values, torch.arange(9).expand(64, 9))
    assert len(number.unique(dim=0)) > 60
    some = PatchesOfImage([], [], tile=12, permutations=4)
    out = some({"crops": [images, images]}, Draws(0, rows=64))
    cells = places(out["views"][1]) // 12
    number = cells[..., 0] * 3 + cells[..., 1]
    assert number.unique(dim=0).tolist() == sorted(some.permutations.tolist())


def test_colours_and_flips_are_per_patch():
    images = coordinates(32, 36)
    module = PatchesOfImage([], [Flip(p=0.5)], tile=9)
    patches = module({"crops": [images, images]}, Draws(0, rows=32))["views"][1]
    columns = denormalize(patches)[:, :, 1, 0]
    rising = columns[..., 1] > columns[..., 0]
    assert (rising != rising[:, :1]).any(1).float().mean() > 0.9
    grey = torch.full((16, 3, 36, 36), 100, dtype=torch.uint8)
    module = PatchesOfImage([], [ColorJitter(brightness=0.5)], tile=9)
    patches = module({"crops": [grey, grey]}, Draws(0, rows=16))["views"][1]
    assert len(patches[..., 0, 0].flatten(0, 1).unique(dim=0)) == 16 * 9


def test_patches_of_a_rotated_image():
    images = coordinates(32, 36)
    before = images.clone()
    plain = PatchesOfImage([], [], tile=12, permutations=1)
    turned = PatchesOfImage([], [], tile=12, permutations=1, rotate=True)
    upright = plain({"crops": [images, images]}, Draws(0, rows=32))["views"][1]
    out = turned({"crops": [images, images]}, Draws(0, rows=32))
    assert torch.equal(images, before)
    assert_near(out["views"][0], normalize(images), 0)
    same = (out["views"][1] == upright).flatten(1).all(1).float().mean()
    assert 0.05 < same < 0.5  # a quarter is turned by 0 degrees


def test_the_rotated_partner_is_turned_by_each_angle():
    images = coordinates(64, 36)
    image, turned = RotationOfImage([], [])({"crops": [images, images]}, Draws(0, rows=64))["views"]
    assert torch.equal(image, normalize(images))
    turns = [torch.rot90(image[0], k, (-2, -1)) for k in range(4)]
    counts = [sum(torch.equal(x, turn) for x in turned) for turn in turns]
    assert sum(counts) == 64
    assert min(counts) > 5


def test_ops_of_a_chain_are_modules_of_the_method():
    module = nn.Sequential(Jigsaw({"flip": Flip()}, permutations=7, tile=9))
    assert [key for key in module.state_dict()] == ["0.permutations"]
    assert not list(module.parameters())


@pytest.fixture
def nothing_compiled():
    fuse.compiled.cache_clear()
    yield
    fuse.compiled.cache_clear()


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_views_run_the_same_functions(monkeypatch):
    made = []

    def compiled(function, *, dynamic):
        assert dynamic, "rows that are changed differ in number at every step"
        made.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    eager, asked = simclr_views(compile=False), simclr_views(compile=True)
    crops = [torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8) for _ in range(2)]
    plain = eager({"crops": list(crops)}, Draws(0, rows=8))["views"]
    assert not made
    for _ in range(2):
        views = asked({"crops": list(crops)}, Draws(0, rows=8))["views"]
        assert all(torch.equal(a, b) for a, b in zip(plain, views, strict=True))
    assert made == ["_mixed", "_turn", "_shifted", "_normalized"], "each is compiled once"
    eager({"crops": list(crops)}, Draws(1, rows=8))
    assert len(made) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_compiled_views_are_those_of_eager_ones():
    eager, compiled = simclr_views(compile=False), simclr_views(compile=True)
    for step, rows in enumerate((8, 13, 200)):  # the last in several parts
        crops = [torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8) for _ in range(2)]
        both = [v({"crops": list(crops)}, Draws(step, rows=rows)) for v in (eager, compiled)]
        for a, b in zip(*(batch["views"] for batch in both), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert b.is_contiguous(memory_format=torch.channels_last)
    assert fuse.compiled.cache_info().currsize == 4


def simclr_views(*, compile):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("augment/simclr")
    return instantiate(cfg.augment, compile=compile)
