"""Jigsaw: permutation sets, tiles one by one, measures against shortcuts, processes against one."""

import importlib.util
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes
from test_relative_position import alone, apart, lens, near, pixels

from unlabeled.augment.aberration import ProjectColors
from unlabeled.augment.color import Grayscale
from unlabeled.augment.geometry import Flip
from unlabeled.augment.jigsaw import Jigsaw as Tiles
from unlabeled.augment.permutations import permutations
from unlabeled.backbones.alexnet import AlexNet
from unlabeled.backbones.resnet import ResNet
from unlabeled.batch import denormalize
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods.jigsaw import Jigsaw

# Permutations.


def greedy(first, count, tiles, criterion):
    """Algorithm 1 as written: every order's distances to all chosen, the first of the farthest."""
    every = torch.cartesian_prod(*[torch.arange(tiles)] * tiles)
    every = every[(every.sort(1).values == torch.arange(tiles)).all(1)]
    chosen = [int((every == first).all(1).nonzero())]
    while len(chosen) < count:
        distance = (every[:, None] != every[chosen][None]).sum(2).double()
        score = distance.amin(1) if criterion == "max_min" else distance.mean(1)
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return every[chosen]


@pytest.mark.parametrize("criterion", ["max_min", "max_mean"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_sets_are_the_greedy_ones(criterion, seed):
    rows = permutations(24, 2, criterion, seed)
    assert torch.equal(rows, greedy(rows[0], 24, 4, criterion))


def test_a_set_of_nine_tiles_takes_the_farthest_first():
    seed = 5
    rows = permutations(1200, seed=seed).numpy()
    apart = (rows[:, None] != rows[None]).sum(2)
    nearest = [int(apart[i, :i].min()) for i in range(1, len(rows))]
    assert nearest == sorted(nearest, reverse=True)  # scores only fall
    assert nearest[7] == 9
    assert nearest[99] == 6
    assert nearest[-1] == 5
    # The same by comparing all orders with all chosen, in the order of their numbers.
    every = permutations(362880, seed=seed).numpy()
    every = every[np.lexsort(every.T[::-1])]
    score = np.full(len(every), 9)
    for i in range(150):
        at = int(score.argmax()) if i else int((every == rows[0]).all(1).argmax())
        assert (every[at] == rows[i]).all()
        score = np.minimum(score, (every != every[at]).sum(1))


def test_ten_thousand_take_less_than_a_minute_and_all_of_them_work():
    start = time.perf_counter()
    some = permutations(10_000, seed=11)
    mean = permutations(2_000, criterion="max_mean", seed=11)  # each takes equally long
    assert time.perf_counter() - start < 60
    every = permutations(math.factorial(9), seed=11)
    assert time.perf_counter() - start < 120
    assert torch.equal(every[:10_000], some)
    for rows, count in ((every, 362_880), (some, 10_000), (mean, 2_000)):
        codes = (rows * 9 ** torch.arange(9)).sum(1)
        assert len(codes.unique()) == count
        assert torch.equal(rows.sort(1).values, torch.arange(9).expand(count, 9))
    with pytest.raises(ValueError, match="1 to 362880 orders, not 362881"):
        permutations(362_881)


def test_more_tiles_have_as_many_candidates_as_nine():
    with pytest.raises(ValueError, match="orders of 16 tiles are chosen out of 3628"):
        permutations(400_000, 4)


def script():
    path = Path(__file__).parents[1] / "scripts/make_permutations.py"
    spec = importlib.util.spec_from_file_location("make_permutations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_script_keeps_a_set_in_a_file(tmp_path, capsys):
    file = tmp_path / "sets/ten.npy"
    script()(["10", "--criterion", "max_mean", "--seed", "4", "--out", str(file)])
    assert "10 orders of 9 tiles" in capsys.readouterr().out
    assert np.load(file).dtype == np.uint8
    expected = permutations(10, criterion="max_mean", seed=4)
    assert torch.equal(Tiles([], permutations=str(file)).permutations, expected)
    with pytest.raises(SystemExit):
        script()(["10", "--out", str(tmp_path / "ten.txt")])
    assert r"must end in .npy" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        script()(["25", "--grid", "2", "--out", str(tmp_path / "more.npy")])
    assert stop.value.code == 2
    assert "4 tiles have 1 to 24 orders, not 25" in capsys.readouterr().err


# Tiles of one image.


def test_grey_and_flip_are_per_image_and_offsets_and_channels_per_tile():
    crops = (pixels(80, 3, 39, 39) * 255).byte()
    module = Tiles([Flip(), Grayscale(p=0.5)], permutations=4, tile=8, shift=0)
    tiles = denormalize(module({"crops": [crops]}, Draws(0, rows=80))["views"][0])
    grey = (tiles - tiles[:, :, :1]).abs().amax((2, 3, 4)) < 1e-5
    assert (grey == grey[:, :1]).all()
    assert 20 < grey[:, 0].sum() < 60
    same = torch.arange(39, dtype=torch.uint8).expand(80, 3, 39, 39)  # a pixel is its column
    module = Tiles([], permutations=4, tile=8, shift=2)
    tiles = denormalize(module({"crops": [same]}, Draws(0, rows=80))["views"][0])
    left = tiles.mul(255).round()[..., 0, 0]  # images, tiles, channels
    moved = left - left.amin(2, keepdim=True)
    assert moved.unique().tolist() == [0, 1, 2]
    assert len(moved.flatten(0, 1).unique(dim=0)) == 19  # of 27 draws, those with a zero


def position(tiles, order):
    """How often the displacement of green tells a corner tile's place, of (N, T, 3, h, w)."""
    moved = apart(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
    right, down = moved[..., 0] > 0, moved[..., 1] > 0
    column, row = order % 3, order // 3
    corner = (column != 1) & (row != 1)
    found = (right == (column == 2)) & (down == (row == 2))
    return found[corner].float().mean().item()


def test_colour_measures_hide_where_a_lens_put_a_tile():
    crops = lens(60)

    def found(*ops, **options):
        module = Tiles(list(ops), permutations=50, tile=18, **options)
        out = module({"crops": [crops]}, Draws(0, rows=60))
        tiles = denormalize(out["views"][0])
        return position(tiles, module.permutations[out["target"]])

    assert found() > 0.85
    assert found(shift=2) < found() - 0.1  # this lens moves green by more than a pixel there
    assert found(shift=6) < 0.5  # by chance 1/4
    assert found(Grayscale(p=1.0)) < 1 / 4 + 0.1
    assert found(ProjectColors()) < 1 / 4 + 0.1


def test_a_gap_keeps_borders_of_neighbours_from_meeting():
    smooth = torch.nn.functional.avg_pool2d(pixels(50, 3, 74, 74), 3, stride=1)
    crops = (smooth * 255).byte()

    def found(tile):
        """How often the tile whose border goes on is the neighbour to the right."""
        module = Tiles([], permutations=50, tile=tile)
        out = module({"crops": [crops]}, Draws(0, rows=50))
        order = module.permutations[out["target"]].argsort(1)
        tiles = denormalize(out["views"][0])[torch.arange(50)[:, None], order]  # upright
        first, others = tiles[:, 0, ..., -1], tiles[:, 1:, ..., 0]
        return ((first[:, None] - others).square().mean((2, 3)).argmin(1) == 0).float().mean()

    assert found(24) > 0.95
    assert found(14) < 1 / 8 + 0.25  # offsets are drawn, so that few borders still meet


# The network.


def method(**options):
    torch.manual_seed(2)
    augment = Tiles([Flip(), Grayscale(p=0.5)], permutations=6, grid=2, tile=9, shift=1)
    net = ResNet(depth=18, width=16, stem="small", stem_stride=2, norm="sync")
    return alone(Jigsaw(net, augment, None, **{"dim": 7, "norm": "sync", **options}).double())


def batch_for(made, rows=6):
    share = rows // world_size()
    crops = (pixels(rows, 3, 24, 24) * 255).byte()[rank() * share : (rank() + 1) * share]
    draws = Draws(0, "augment", 4, rows=share, rank=rank(), world=world_size())
    batch = made.augment({"crops": [crops], "index": torch.arange(share)}, draws)
    return {**batch, "views": [x.double() for x in batch["views"]]}


@pytest.mark.parametrize("hidden", [[], [9]])
def test_the_loss_is_its_formula(hidden):
    made = method(hidden=hidden).eval()
    batch = batch_for(made, 4)
    total = torch.zeros(())
    for tiles, y in zip(batch["views"][0], batch["target"].tolist(), strict=True):
        g = torch.cat([made.tile_head(made.backbone(tile[None]))[0] for tile in tiles])  # slots
        if hidden:
            layer, norm = made.hidden.layers[0], made.hidden.norms[0]
            g = norm((layer.weight @ g)[None])[0].clamp(min=0)
        logits = made.head.weight @ g + made.head.bias
        total = total + (logits.exp().sum().log() - logits[y]) / 4
    near(made.loss(batch)["jigsaw"], total, 1e-9)


def test_tiles_are_seen_one_by_one():
    made = method(norm="none").eval()
    (tiles,) = batch_for(made, 3)["views"]

    def concatenated(x):
        return made.tile_head(made.backbone(x.flatten(0, 1))).view(len(x), -1)

    order = torch.tensor([2, 0, 3, 1])
    blocks = concatenated(tiles).view(3, 4, 7)
    near(concatenated(tiles[:, order]).view(3, 4, 7), blocks[:, order], 1e-9)
    x = tiles.clone().requires_grad_()
    concatenated(x).view(3, 4, 7)[:, 1].sum().backward()
    told = x.grad.abs().amax((2, 3, 4)) > 0
    assert told.tolist() == [[False, True, False, False]] * 3


def test_the_context_free_network_takes_tiles_of_64():
    net = AlexNet(features="grid", stride=2, side=2)
    augment = Tiles([], permutations=12, tile=64, shift=2)
    made = alone(Jigsaw(net, augment, None, dim=16, hidden=[8], norm="none"))
    crops = torch.randint(0, 256, (1, 3, 255, 255), dtype=torch.uint8)
    batch = made.augment({"crops": [crops], "index": torch.arange(1)}, Draws(0, rows=1))
    assert net.stages(batch["views"][0][0])["conv1"].shape[-2:] == (29, 29)  # stride 4 leaves 15
    assert made.loss(batch)["jigsaw"].isfinite()
    assert made.head.in_features == 8
    assert not [n for n, _ in made.named_buffers() if "norm" in n]


def gradients():
    made = method(hidden=[9]).train()
    value = made.loss(batch_for(made))["jigsaw"]
    value.backward()
    grads = [mean(p.grad).flatten() for p in made.parameters() if p.grad is not None]
    return {"value": mean(value), "gradient": torch.cat(grads)}


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(world):
    one = gradients()
    for found in on_processes(world, gradients):
        for name, value in one.items():
            near(found[name], value, 1e-8)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="norm must be batch, sync or none, got 'group'"):
        method(norm="group")
    with pytest.raises(ValueError, match=r"widths must be at least 1, got \[28, 0\]"):
        method(hidden=[0])
    with pytest.raises(ValueError, match="shift must not be negative, got -2"):
        Tiles([], permutations=2, shift=-2)


def test_pictures_show_the_question_and_the_answer(monkeypatch):
    made = method().eval()
    batch = batch_for(made)
    tiles, target = batch["views"][0], batch["target"]
    answer = target.clone()
    answer[-1] = (answer[-1] + 1) % 6
    monkeypatch.setattr(made, "_answer", lambda x: (None, F.one_hot(answer, 6).double()))
    shown = made.pictures(batch)
    seen, back, truth = shown.values()
    assert seen.shape == back.shape == truth.shape == (6, 3, 19, 19)  # 2 x 9 and a line
    line = seen[:, :, 9]
    assert (line == 1).all()
    for b in range(6):
        for slot, tile in enumerate(made.augment.permutations[target[b]].tolist()):
            top, left = 10 * (tile // 2), 10 * (tile % 2)
            found = truth[b, :, top : top + 9, left : left + 9]
            wanted = denormalize(tiles[b, slot]).clamp(0, 1)
            torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=0)
    inside = (..., slice(1, -1), slice(1, -1))
    assert torch.equal(back[:5][inside], truth[:5][inside])
    assert not torch.equal(back[5][inside], truth[5][inside])
    assert (back[:5, 1, 0] > back[:5, 0, 0]).all()  # green
    assert (back[5, 0, 0] > back[5, 1, 0]).all()  # red
