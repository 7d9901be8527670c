"""Relative position: labels, patches, measures against shortcuts, loss, processes against one."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes
from torch import nn

from unlabeled.augment.aberration import DropColors, Pixelate, ProjectColors, projection, through
from unlabeled.augment.geometry import Flip
from unlabeled.augment.relative_position import RelativePosition as Patches
from unlabeled.augment.relative_position import label, neighbours
from unlabeled.augment.tiles import SpacedTiles, Tiles
from unlabeled.backbones.contrast import Contrast
from unlabeled.backbones.resnet import ResNet
from unlabeled.batch import MEAN, STD, denormalize
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods.relative_position import RelativePosition, position_loss
from unlabeled.parts.dense import Dense

OFFSETS = [(-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1)]  # dx, dy
MIRRORED = [2, 1, 0, 4, 3, 7, 6, 5]


def alone(made):
    """A method without a trainer, which logs nothing."""
    own = made.note
    made.note = lambda name, value: own(name, value) if made._noted is not None else None
    return made


def near(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def numbered(count, side):
    """uint8 images whose channels say the row and the column of a pixel."""
    row = torch.arange(side, dtype=torch.uint8)[:, None].expand(side, side)
    return torch.stack([row, row.T, torch.zeros_like(row)]).expand(count, 3, side, side).clone()


def corners(patches):
    """Top and left of patches of `numbered` images (..., 2)."""
    values = denormalize(patches).mul(255).round().long()
    return torch.stack([values[..., 0, 0, 0], values[..., 1, 0, 0]], -1)


# Labels and pairs.


def test_the_labels_are_the_official_codes():
    assert [label(dx, dy) for dx, dy in OFFSETS] == list(range(8))
    for dx, dy in OFFSETS:
        assert label(-dx, -dy) == 7 - label(dx, dy)
        assert label(-dx, dy) == MIRRORED[label(dx, dy)]
    for wrong in ((0, 0), (2, 0), (0, -2)):
        with pytest.raises(ValueError, match="not one of the eight"):
            label(*wrong)


@pytest.mark.parametrize("grid", [2, 3, 4])
def test_all_neighbours_are_pairs_in_both_orders(grid):
    pairs = {(a, q): y for a, q, y in neighbours(grid, "all").tolist()}
    expected = {
        (a, q)
        for a in range(grid**2)
        for q in range(grid**2)
        if a != q and max(abs(a // grid - q // grid), abs(a % grid - q % grid)) == 1
    }
    assert set(pairs) == expected
    assert len(pairs) == {2: 12, 3: 40, 4: 84}[grid] == len(neighbours(grid, "all"))
    assert all(pairs[q, a] == 7 - y for (a, q), y in pairs.items())
    assert set(pairs.values()) == set(range(8))


def test_the_middle_has_each_class_once():
    assert neighbours(3, "center").tolist() == [
        [4, q, y] for y, q in enumerate([0, 1, 2, 3, 5, 6, 7, 8])
    ]


@pytest.mark.parametrize(
    "cut", [SpacedTiles(grid=3, size=8, gap=4, jitter=2), Tiles(grid=3, size=8)]
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_query_lies_where_its_label_says(cut, mirrored):
    module = Patches([Flip(p=float(mirrored))], [], cut=cut)
    out = module({"crops": [numbered(5, 44), numbered(5, 44)]}, Draws(0, rows=5))
    (patches,), target = out["views"], out["target"]
    assert patches.shape == (10, 9, 3, 8, 8)
    assert target.shape == (10, 40)
    top, left = corners(patches)[:, module.pairs].unbind(-1)  # images, pairs, anchor and query
    right = torch.tensor(OFFSETS)[target]  # dx, dy
    for places, side in ((left, 0), (top, 1)):
        moved = places[..., 1] - places[..., 0]
        moved = -moved if mirrored and side == 0 else moved  # the numbers were mirrored too
        near(torch.where(moved.abs() > 7, moved.sign(), 0), right[..., side], 0)


def test_the_patches_of_an_images_crops_follow_one_another():
    module = Patches([], [], cut=SpacedTiles(grid=2, size=8, gap=4, jitter=0))
    crops = [torch.full((3, 3, 24, 24), v, dtype=torch.uint8) for v in (10, 20)]
    (patches,) = module({"crops": crops}, Draws(0, rows=3))["views"]
    values = denormalize(patches).mul(255).round()[:, 0, 0, 0, 0]
    assert values.tolist() == [10, 20] * 3
    one = numbered(3, 24)
    (patches,) = module({"crops": [one, one]}, Draws(0, rows=3))["views"]
    places = corners(patches)[:, 0]
    assert not torch.equal(places[::2], places[1::2])  # each crop has a grid of its own


# Where patches lie.


def test_spaced_tiles_keep_their_gaps():
    cut = SpacedTiles(grid=3, size=10, gap=6, jitter=2)
    found = cut.corners(Draws(0, rows=4000), 60, 70).view(-1, 3, 3, 2)
    assert found.amin((0, 1, 2)).tolist() == [0, 0]
    assert found.amax((0, 1, 2)).tolist() == [50, 60]  # the border holds what would leave
    for axis, dim in ((0, 1), (1, 2)):
        moved = found[..., axis].diff(dim=dim)
        assert moved.min() == 16 - 4
        assert moved.max() == 16 + 4
    inner = found[:, 1, 1]  # nothing holds the middle
    pitch = inner - found[:, 1, 0]
    assert pitch[:, 0].unique().tolist() == list(range(-4, 5))  # jitter is per patch and axis
    start = SpacedTiles(grid=3, size=10, gap=6, jitter=0).corners(Draws(0, rows=4000), 60, 70)
    counts = start[:, 0, 1].bincount()  # a grid of 42 pixels at any of 29 places
    assert len(counts) == 29
    assert counts.min() > 4000 / 29 * 0.6
    assert (start - start[:, :1] == start[:1] - start[:1, :1]).all()
    assert torch.corrcoef(start[:, 0].T.double())[0, 1].abs() < 0.06


def test_both_ways_of_cutting_give_the_pixels_of_their_corners():
    x = pixels(4, 3, 40, 40)
    spaced, cells = SpacedTiles(grid=2, size=9, gap=5, jitter=3), Tiles(grid=2, size=9, shift=2)
    order = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3], [2, 3, 1, 0], [1, 0, 3, 2]])
    place, channels = (
        spaced.corners(Draws(7, rows=4), 40, 40),
        cells.corners(Draws(7, rows=4), 40, 40),
    )
    first, second = spaced(x, Draws(7, rows=4)), cells(x, order, Draws(7, rows=4))
    for b in range(4):
        for i in range(4):
            top, left = place[b, i].tolist()
            assert torch.equal(first[b, i], x[b, :, top : top + 9, left : left + 9])
            for c in range(3):
                top, left = channels[b, order[b, i], c].tolist()
                assert torch.equal(second[b, i, c], x[b, c, top : top + 9, left : left + 9])


def test_channels_of_a_tile_move_apart_within_their_cell():
    found = Tiles(grid=3, size=8, shift=2).corners(Draws(0, rows=3000), 39, 39).view(-1, 3, 3, 3, 2)
    cell = torch.arange(3) * 13
    inside = torch.stack([found[..., 0] - cell[:, None, None], found[..., 1] - cell[:, None]], -1)
    assert inside.amin() == 0
    assert inside.amax() == 13 - 8
    apart = inside - inside[..., :1, :]
    assert apart.unique().tolist() == [-2, -1, 0, 1, 2]
    assert (apart[..., 1, :] == 0).float().mean() == pytest.approx(1 / 3, abs=0.02)
    near_ones = (apart[:, 0, 0] - apart[:, 0, 1]).flatten(1).any(1).float().mean()
    assert near_ones > 0.9  # every tile has draws of its own


# Colours and sharpness.


def test_the_projection_takes_one_axis_away():
    b, a = projection(), torch.tensor([-1.0, 2.0, -1.0])
    right = [[5 / 6, 1 / 3, -1 / 6], [1 / 3, 1 / 3, 1 / 3], [-1 / 6, 1 / 3, 5 / 6]]
    near(b, torch.tensor(right))
    near(b @ a, torch.zeros(3))
    near(b @ b, b)
    near(b @ torch.ones(3), torch.ones(3))
    x = pixels(64, 3, 5, 4)
    out = ProjectColors(p=0.5)(x.clone(), Draws(0, rows=64))
    expected = torch.stack([(b @ image.flatten(1)).view(3, 5, 4) for image in x])
    changed = (out != x).flatten(1).any(1)
    assert 0.25 < changed.float().mean() < 0.75
    near(out[changed], expected[changed])
    near(torch.einsum("i,bihw->bhw", a, out[changed]), torch.zeros(int(changed.sum()), 5, 4))


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_one_channel_of_each_patch_is_kept(noise):
    x = pixels(600, 3, 12, 12) * torch.linspace(0.2, 1, 600).view(-1, 1, 1, 1)
    out = DropColors(noise=noise)(x.clone(), Draws(0, rows=600))
    centred = out - torch.tensor(MEAN).view(3, 1, 1)
    expected = x - x.mean((2, 3), keepdim=True)
    kept = (centred - expected).abs().amax((2, 3)) < 1e-6
    assert kept.sum(1).tolist() == [1] * 600
    assert kept.sum(0).min() > 150
    dropped = centred[~kept].view(600, 2, 12, 12)
    deviation = expected[kept].std((1, 2), correction=0)
    if noise == "gaussian":
        relative = dropped / deviation.view(-1, 1, 1, 1)
        assert relative.std() == pytest.approx(0.01, rel=0.02)
        assert relative.abs().max() > 0.04
    else:
        assert dropped.abs().max() <= 0.5 / 255 + 1e-6
        assert dropped.std() == pytest.approx(1 / 255 / math.sqrt(12), rel=0.02)
    assert dropped.mean().abs() < 1e-4
    flat = dropped.flatten(2)
    assert (flat[:, 0] * flat[:, 1]).mean().abs() < 0.02 * flat.var()  # independent noise
    assert (flat[:-1] * flat[1:]).mean().abs() < 0.02 * flat.var()


def test_colours_are_dropped_per_patch_and_the_frames_of_a_clip_share_them():
    module = Patches([], [DropColors()], cut=SpacedTiles(grid=3, size=8, gap=2, jitter=0))
    crop = (pixels(50, 3, 30, 30) * 255).byte()
    (patches,) = module({"crops": [crop]}, Draws(0, rows=50))["views"]
    kept = patches.std((-2, -1)).argmax(-1)  # images, patches
    assert (kept != kept[:, :1]).any(1).float().mean() > 0.95
    assert kept.flatten().bincount().min() > 50 * 9 / 3 * 0.75
    clip = pixels(6, 4, 3, 8, 8)
    out = DropColors()(clip.clone(), Draws(0, rows=6))
    still = DropColors()(clip[:, 1].clone(), Draws(0, rows=6))
    near(out[:, 1], still)


@pytest.mark.parametrize(("side", "small"), [(96, 10), (96, 95), (16, 4), (16, 15), (31, 7)])
def test_pixelation_is_two_resizes(side, small):
    x = pixels(2, 3, side, side)
    m = through(torch.tensor([small]), side)[0]
    resize = partial(F.interpolate, mode="bilinear", antialias=True)
    expected = resize(resize(x, size=(small, small)), size=(side, side))
    near(m @ x @ m.T, expected, 1e-4)


def test_sizes_of_pixelation_are_uniform_in_pixels(monkeypatch):
    given = {}

    def record(small, side):
        given.update(small=small, side=side)
        return torch.eye(side).expand(len(small), -1, -1)

    monkeypatch.setattr("unlabeled.augment.aberration.through", record)
    Pixelate()(torch.zeros(9000, 1, 96, 96).expand(-1, 3, -1, -1)[:, :1], Draws(0, rows=9000))
    small = given["small"]
    assert len(small) / 9000 == pytest.approx(0.33, abs=0.02)
    assert small.min() < 14  # 100 pixels are 10 a side
    assert small.max() == 94
    share = (small < 68).float().mean()  # half of 100 to 9025 pixels
    assert share == pytest.approx((68**2 - 100) / 8925, abs=0.03)


def test_contrast_is_fixed_and_in_front_of_every_stage():
    net = Contrast(ResNet(depth=18, width=16, stem="small"), rms=0.87).eval()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = net.seen(x * 7 + torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1))
    near(seen, net.seen(x), 1e-5)
    near(seen.mean((2, 3)), torch.zeros(4, 3))
    near(seen.square().mean((1, 2, 3)).sqrt(), torch.full((4,), 0.87), 1e-5)
    near(net(x), net.model(seen), 1e-5)
    near(net.stages(x)["res3"], net.model.stages(seen)["res3"], 1e-4)
    assert net.seen(torch.ones(1, 3, 4, 4)).abs().max() == 0
    alone = seen[:1].clone()
    alone[:, 1:] *= 0.01  # a patch that lost two colours has the same energy
    assert net.seen(alone).square().mean().sqrt() == pytest.approx(0.87, rel=1e-4)
    assert 50 / 255 / (sum(STD) / 3) == pytest.approx(0.87, abs=0.01)


# Shortcuts: images on which nothing but the shortcut tells, and a guesser that uses it.


def accuracy(guess, module, crops, classes):
    """The share of pairs of some classes whose class a function of (anchors, queries) finds."""
    out = module({"crops": [crops]}, Draws(0, "shortcut", rows=len(crops)))
    patches, target = denormalize(out["views"][0]), out["target"]
    both = patches[:, module.pairs]  # images, pairs, two, 3 h w
    told = torch.isin(target, torch.tensor(classes))
    return (guess(both[told][:, 0], both[told][:, 1]) == target[told]).float().mean().item()


def continues(anchor, query):
    """Where the query's facing border goes on with what the anchor's border shows."""
    borders = {
        1: (anchor[..., 0, :], query[..., -1, :]),
        3: (anchor[..., :, 0], query[..., :, -1]),
        4: (anchor[..., :, -1], query[..., :, 0]),
        6: (anchor[..., -1, :], query[..., 0, :]),
    }
    apart = torch.stack([(a - b).square().mean((1, 2)) for a, b in borders.values()], 1)
    return torch.tensor(list(borders))[apart.argmin(1)]


def test_a_gap_closes_the_shortcut_of_borders():
    noise = pixels(60, 3, 80, 80)
    smooth = F.avg_pool2d(noise, 3, stride=1)[..., :72, :72]  # pixels resemble their neighbours
    crops = (smooth * 255).byte()

    def found(gap, jitter):
        cut = SpacedTiles(grid=3, size=16, gap=gap, jitter=jitter)
        return accuracy(continues, Patches([], [], cut=cut), crops, [1, 3, 4, 6])

    assert found(0, 0) > 0.95
    assert found(8, 0) == pytest.approx(1 / 4, abs=0.05)
    assert found(0, 4) < 0.6  # most borders no longer meet
    assert found(8, 3) == pytest.approx(1 / 4, abs=0.05)


def test_jitter_closes_the_shortcut_of_regular_textures():
    """Stripes of period 12 differ in their phase alone: by a quarter between patches 15 apart."""
    period, side = 12, 16 * 3 + 2 * 8
    shift = torch.arange(60).view(-1, 1, 1) * 1.7
    across = (torch.arange(side) + shift) * (2 * math.pi / period)
    crops = (across.sin().mul(0.5).add(0.5) * 255).byte()[:, :, None].expand(-1, 3, side, -1)

    def phase(x):
        wave = torch.polar(torch.ones(12), torch.arange(12) * (2 * math.pi / period))
        return ((x[:, 0, 0, :12] - 0.5) * wave.conj()).sum(-1)

    def guess(anchor, query):
        turn = (phase(query) * phase(anchor).conj()).angle()
        return torch.where(turn > 0, 4, 3)  # a quarter on: to the right

    def found(jitter):
        cut = SpacedTiles(grid=3, size=12, gap=3, jitter=jitter)
        return accuracy(guess, Patches([], [], cut=cut), crops, [3, 4])

    assert found(0) > 0.99
    assert found(7) == pytest.approx(1 / 2, abs=0.08)


def lens(count, side=72):
    """Grey noise whose green is enlarged: it lies apart by up to 2 pixels, outwards."""
    noise = F.avg_pool2d(pixels(count, 1, side + 2, side + 2), 3, stride=1)
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    places = torch.stack([x, y], -1).expand(count, -1, -1, -1) * (1 - 4 / side)
    green = F.grid_sample(noise, places, padding_mode="border", align_corners=False)
    return (torch.cat([noise, green, noise], 1) * 255).byte()


def apart(x):
    """How far green lies from red and blue in patches (N, 3, h, w): (N, 2), right and down."""
    moves = [(dx, dy) for dy in range(-2, 3) for dx in range(-2, 3)]
    green, others = x[:, 1, 2:-2, 2:-2], (x[:, 0] + x[:, 2]) / 2
    h, w = green.shape[1:]
    errors = [
        (green - others[:, 2 - dy : 2 - dy + h, 2 - dx : 2 - dx + w]).square().mean((1, 2))
        for dx, dy in moves
    ]
    share = (-torch.stack(errors, 1) * 400).softmax(1)
    return share @ torch.tensor(moves, dtype=torch.float32)


def by_the_lens(anchor, query):
    moved = apart(query) - apart(anchor)
    angle = torch.atan2(moved[:, 1], moved[:, 0])  # of the query, seen from the anchor
    eighth = (angle / (math.pi / 4)).round().long() % 8
    return torch.tensor([4, 7, 6, 5, 3, 0, 1, 2])[eighth]


def test_without_colours_a_lens_tells_nothing():
    crops = lens(60)

    def found(*ops):
        cut = SpacedTiles(grid=3, size=18, gap=6, jitter=2)
        return accuracy(by_the_lens, Patches([], list(ops), cut=cut), crops, list(range(8)))

    assert found() > 0.6
    assert found(DropColors()) == pytest.approx(1 / 8, abs=0.04)
    assert found(DropColors(noise="uniform")) == pytest.approx(1 / 8, abs=0.04)
    assert found(ProjectColors()) < 1 / 8 + 0.04


# The loss and the network.


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_is_its_formula(reduction):
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).double()
    target = torch.arange(20) % 8
    terms = []
    for row, y in zip(logits.tolist(), target.tolist(), strict=True):
        terms.append(math.log(sum(math.exp(v) for v in row)) - row[y])
    right = sum(terms) / (20 if reduction == "mean" else 1)
    assert position_loss(logits, target, reduction).item() == pytest.approx(right, rel=1e-12)
    chance = position_loss(logits * 0, target, reduction).item()
    assert chance == pytest.approx(math.log(8) * (1 if reduction == "mean" else 20), rel=1e-12)


def method(**options):
    torch.manual_seed(3)
    cut = SpacedTiles(grid=2, size=8, gap=2, jitter=1)
    augment = Patches([Flip()], [DropColors()], cut=cut)
    net = ResNet(depth=18, width=16, stem="small", stem_stride=2, norm="sync")
    settings = {"dim": 12, "hidden": [10, 10], "norm": "sync", **options}
    return alone(RelativePosition(net, augment, None, **settings).double())  # type: ignore[arg-type]


def batch_for(made, rows=6):
    crops = [(pixels(rows, 3, 22, 22, seed=i) * 255).byte() for i in range(2)]
    share = rows // world_size()
    mine = [x[rank() * share : (rank() + 1) * share] for x in crops]
    draws = Draws(0, "augment", 4, rows=share, rank=rank(), world=world_size())
    batch = made.augment({"crops": mine, "index": torch.arange(share)}, draws)
    made.step = 4
    return {**batch, "views": [x.double() for x in batch["views"]]}


def test_the_network_compares_anchors_with_queries():
    made = method(dropout=0.0, reduction="mean").eval()
    batch = batch_for(made, 3)
    found = made.loss(batch)["relative_position"]
    (patches,), total, right = batch["views"], 0.0, 0
    cells = [(0, 0), (1, 0), (0, 1), (1, 1)]  # x, y
    for one in patches:
        f = [made.fc6(made.backbone(patch[None]))[0] for patch in one]
        for a, q in ((a, q) for a in range(4) for q in range(4) if a != q):
            logits = made.head(made.hidden(torch.cat([f[a], f[q]])[None]))[0]
            y = label(cells[q][0] - cells[a][0], cells[q][1] - cells[a][1])
            total -= logits.log_softmax(0)[y] / (len(patches) * 12)
            right += int(logits.argmax() == y)
    near(found, total, 1e-9)
    with torch.no_grad():
        noted = made.measure(batch, 0)
    assert noted["accuracy"].item() == pytest.approx(right / (len(patches) * 12))
    h = made.backbone(patches.flatten(0, 1)).view(3, 2 * 4, -1).mean(1)
    made.loss(batch)
    near(made.seen["features"], h, 1e-9)


def test_norms_without_scale_have_nothing_to_silence_units_with():
    made = method()
    names = [n for n, _ in made.named_parameters() if n.startswith(("fc6.norms", "hidden.norms"))]
    assert names == []
    assert [type(n).__name__ for n in made.hidden.norms] == ["SyncBatchNorm", "Identity"]
    assert [layer.bias is None for layer in made.hidden.layers] == [True, False]
    assert made.fc6.norms[0].running_mean is not None
    assert [n for n, _ in method(affine=True).named_parameters() if "norms" in n]
    assert len(method(dim=None).fc6.layers) == 0
    assert method(dim=None).head.in_features == 10


@pytest.mark.parametrize("normed", [0, 1, None])
def test_dense_layers_are_linear_norm_relu_dropout(normed):
    torch.manual_seed(0)
    net = Dense(5, 6, 4, normed=normed, dropout=0.4).double()
    x = torch.randn(7, 5).double()
    draws = Draws(1, rows=7)
    out, h = net(x, draws), x
    for i in range(2):
        layer = net.layers[i]
        h = h @ layer.weight.T
        if normed is None or i < normed:
            assert layer.bias is None
            h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
        else:
            h = h + layer.bias
        h = h.clamp(min=0)
        kept = draws.fork(i).uniform(h.shape[1]) >= 0.4
        assert not kept.all()
        h = torch.where(kept, h / 0.6, 0.0)
    near(out, h, 1e-12)
    near(net.eval()(x), net(x), 0)


def gradients(reduction):
    made = method(reduction=reduction, dropout=0.3).train()
    value = made.loss(batch_for(made))["relative_position"]
    value.backward()
    grads = [mean(p.grad).flatten() for p in made.parameters() if p.grad is not None]
    return {"value": mean(value), "gradient": torch.cat(grads)}


def both_losses():
    return {reduction: gradients(reduction) for reduction in ("sum", "mean")}


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(world):
    one = both_losses()
    ratio = one["sum"]["value"] / one["mean"]["value"]
    assert ratio.item() == pytest.approx(6 * 2 * 12, rel=1e-9)  # pairs of all images
    for found in on_processes(world, both_losses):
        for reduction, right in one.items():
            for name, value in right.items():
                near(found[reduction][name], value, 1e-8)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: method(reduction="max"), "reduction must be sum or mean, got 'max'"),
        (lambda: method(norm="layer"), "norm must be batch, sync or none, got 'layer'"),
        (lambda: method(dim=0), "widths must be at least 1"),
        (lambda: method(dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: neighbours(4, "center"), "grid=4: anchors=center needs 3"),
        (lambda: neighbours(1, "all"), "grid=1"),
        (lambda: neighbours(3, "middle"), "anchors must be all or center, got 'middle'"),  # type: ignore[arg-type]
        (lambda: SpacedTiles(gap=-1), "gap and jitter must not be negative, got -1"),
        (lambda: SpacedTiles(size=0), "size must be at least 1"),
        (lambda: SpacedTiles()(torch.zeros(1, 3, 383, 400), Draws(0)), "needs 384 pixels"),
        (lambda: Tiles(grid=3, size=8, shift=-1), "shift must not be negative"),
        (
            lambda: Tiles(grid=3, size=8, shift=3).corners(Draws(0), 30, 30),
            "tile=8 with shift=3 is larger than a cell of a 30x30 crop",
        ),
        (lambda: DropColors(noise="none"), "noise must be gaussian or uniform, got 'none'"),  # type: ignore[arg-type]
        (lambda: ProjectColors(p=2.0), "p is a probability"),
        (lambda: Pixelate(least=0), "least is a number of pixels"),
        (lambda: Pixelate()(torch.zeros(1, 3, 10, 10), Draws(0)), "least=100 pixels, got 10x10"),
        (lambda: Pixelate()(torch.zeros(1, 3, 20, 30), Draws(0)), "got 20x30"),
        (lambda: Contrast(ResNet(depth=18, width=16), rms=0.0), "rms must be positive, got 0.0"),
        (lambda: Patches([], [], cut=SpacedTiles())({"crops": []}, Draws(0)), "for 0 crops"),
    ],
)
def test_bad_values_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_the_representation_is_that_of_the_paper():
    """fc6 of the official network: what evaluations see, and no scale from conv3 on."""
    from unlabeled.backbones.alexnet import AlexNet

    net = AlexNet(norm="batch", features="grid", side=2, hidden=[32], normed=3, affine=False)
    names = {n for n, _ in net.named_parameters()}
    assert {"features.0.bias", "features.3.bias", "classifier.1.weight"} <= names
    assert not any(n.startswith("norms") or n == "features.6.bias" for n in names)
    assert [isinstance(n, nn.Identity) for n in net.norms] == [True, True, *[False] * 4]
    assert net(torch.rand(2, 3, 96, 96)).shape == (2, net.dim) == (2, 32)


def test_pictures_show_the_question_and_the_answer(monkeypatch):
    made = method().eval()
    batch = batch_for(made)
    patches, target = batch["views"][0], batch["target"]  # two grids of an image
    pairs, answer = made.augment.pairs, target.clone()
    answer[10] = (answer[10] + 1) % 8  # the last image's pairs in its first grid
    logits = F.one_hot(answer[::2].flatten(), 8).double()
    monkeypatch.setattr(made, "_answer", lambda x: (None, logits))
    anchor, query, found, truth = made.pictures(batch).values()
    assert anchor.shape == query.shape == (6, 3, 8, 8)
    assert found.shape == truth.shape == (6, 3, 26, 26)  # 3 x 8 and two lines
    for b in range(6):
        a, q = pairs[b % len(pairs)].tolist()
        y = target[2 * b, b % len(pairs)].item()
        cell = y + (y >= 4)
        for which, place, alone in ((a, 4, anchor), (q, cell, query)):
            wanted = denormalize(patches[2 * b, which]).clamp(0, 1).double()
            torch.testing.assert_close(alone[b].double(), wanted, atol=1e-5, rtol=0)
            top, left = 9 * (place // 3), 9 * (place % 3)
            placed = truth[b, :, top : top + 8, left : left + 8]
            torch.testing.assert_close(placed.double(), wanted, atol=1e-5, rtol=0)
    inside = (..., slice(1, -1), slice(1, -1))
    assert torch.equal(found[:5][inside], truth[:5][inside])
    assert not torch.equal(found[5][inside], truth[5][inside])
    assert (found[:5, 1, 0] > found[:5, 0, 0]).all()  # green
    assert (found[5, 0, 0] > found[5, 1, 0]).all()  # red
