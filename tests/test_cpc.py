"""CPC: its loss as loops, who sees whom, patches on their own, and processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from processes import on_processes, value_and_gradient
from torch import nn

from unlabeled.augment.color import Grayscale
from unlabeled.augment.geometry import Flip
from unlabeled.augment.patches import ColorDrop, CropPad, PatchGrid, patches_of
from unlabeled.augment.warp import Affine, Elastic
from unlabeled.backbones.build import build
from unlabeled.backbones.norm import norm_layer
from unlabeled.backbones.patchwise import Patchwise
from unlabeled.backbones.resnet import ResNet
from unlabeled.batch import MEAN, denormalize
from unlabeled.dist import mine
from unlabeled.draws import Draws
from unlabeled.methods.cpc import CPC
from unlabeled.parts.choice import choice
from unlabeled.parts.grid import TURNS, Context, turned

B, G, D = 4, 5, 6
ALL = tuple(TURNS)


class Mean(nn.Module):
    """A backbone without norm: the colours of a patch, mixed."""

    dim = D

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, D)

    def forward(self, x):
        return self.layer(x.mean((2, 3))).tanh()


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cpc(backbone=None, **given):
    torch.manual_seed(0)
    settings = {"width": 8, "blocks": 2, "steps": 2, "skip": 1, **given}
    method = CPC(backbone or Mean(), nn.Identity(), None, **settings).double()
    method.note = lambda *args: None
    for side in method.sides.values():  # v1's small start would hide differences
        for layer in side.predict:
            nn.init.normal_(layer.weight)
    return method


def grid(seed=0, side=G):
    return {"views": [normals(B, side, side, 3, 2, 2, seed=seed)], "index": torch.arange(B)}


def accuracy(method, batch):
    noted = {}
    method.note = noted.__setitem__
    method.loss(batch)
    return noted["accuracy"].item()


# The loss.


def literal(method, z, *, negatives=0):
    """Mean over k of the mean over terms, downwards; z (B, R, C, D)."""
    (side,) = method.sides.values()
    c, t = side.context(z), side.target(z)
    b, rows, columns = z.shape[:3]
    everything = [t[i, r, x] for i in range(b) for r in range(rows) for x in range(columns)]
    found, terms = [], []
    for k in range(1, len(side.predict) + 1):
        d, total, count = k + method.skip, 0.0, 0
        drawn = None
        if negatives:
            shape = ((rows - d) * columns, negatives)
            drawn = Draws(0, f"negatives down {k}", 0, rows=b).integers(len(everything) - 1, *shape)
        for i in range(b):
            for r in range(rows - d):
                for x in range(columns):
                    p = method.scale * side.predict[k - 1](c[i, r, x])
                    own = i * rows * columns + (r + d) * columns + x
                    others = [j for j in range(len(everything)) if j != own]
                    if drawn is not None:
                        others = [others[j] for j in drawn[i, r * columns + x]]
                    s = (p @ t[i, r + d, x]).item()
                    odds = sum(math.exp((p @ everything[j]).item() - s) for j in others)
                    total, count = total + math.log1p(odds), count + 1
        found.append(total / count)
        terms.append(count // b)
    return sum(found) / len(found), terms


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"context": "row", "dim": 3, "scale": 0.1},
        {"context": "none", "skip": 0, "steps": 4},
        {"negatives": 7},
        {"negatives": 7, "dim": 3, "chunk": 11},
        {"chunk": 7},
    ],
)
def test_the_loss_is_its_formula(given):
    method, batch = cpc(**given), grid()
    z = method.backbone(batch["views"][0].flatten(0, 2)).view(B, G, G, D)
    with torch.no_grad():
        expected, terms = literal(method, z, negatives=given.get("negatives", 0))
    assert method.loss(batch)["down"].item() == pytest.approx(expected, rel=1e-10)
    distances = [k + method.skip for k in range(1, len(terms) + 1)]
    assert terms == [G * (G - d) for d in distances]


def test_the_own_key_is_the_patch_below_in_row_major_order(monkeypatch):
    method, seen = cpc(steps=2, skip=1), []

    def spy(queries, keys, own, others, chunk):
        seen.append((len(queries), own))
        return choice(queries, keys, own, others, chunk)

    monkeypatch.setattr("unlabeled.methods.cpc.choice", spy)
    method.loss(grid())
    for (count, own), d in zip(seen, (2, 3), strict=True):
        places = [(b, r, c) for b in range(B) for r in range(G - d) for c in range(G)]
        assert count == len(places) == B * G * (G - d)
        assert own.tolist() == [b * G * G + (r + d) * G + c for b, r, c in places]


@pytest.mark.parametrize(("negatives", "candidates"), [(0, B * G * G), (16, 17)])
@pytest.mark.parametrize("dim", [None, 3])
def test_without_weights_it_costs_the_log_of_the_candidates(negatives, candidates, dim):
    method = cpc(negatives=negatives, dim=dim, directions=ALL)
    for side in method.sides.values():
        for parameter in side.predict.parameters():
            nn.init.zeros_(parameter)
    terms = method.loss(grid())
    assert list(terms) == list(ALL)
    for value in terms.values():
        assert value.item() == pytest.approx(math.log(candidates), rel=1e-12)
    assert accuracy(method, grid()) == 0  # a tie is no win


def test_a_perfect_score_wins():
    keys = 9 * torch.eye(8, dtype=torch.float64)
    own = torch.arange(8)
    loss, wins = choice(keys, keys, own, None)
    assert loss < 1e-9
    assert wins == 1
    assert choice(keys, keys, own.roll(1), None)[1] == 0


def test_the_positive_is_never_among_the_drawn():
    method, b = cpc(negatives=50), 3
    own = torch.tensor([0, 5, 8] * 4).repeat(b)
    drawn = method.drawn("test", b, own, 9)
    assert drawn.shape == (len(own), 50)
    assert not (drawn == own[:, None]).any()
    for target in (0, 5, 8):
        counts = drawn[own == target].flatten().bincount(minlength=9)
        assert counts[target] == 0
        others = counts[torch.arange(9) != target]
        assert others.min() > 0.6 * 600 / 8  # all others, alike
    again = method.drawn("test", b, own, 9)
    assert torch.equal(again, drawn)
    assert not torch.equal(method.drawn("else", b, own, 9), drawn)


def test_the_positive_may_be_among_the_drawn_where_that_is_asked_for():
    """GreedyInfoMax's code: every key is as likely, the positive too."""
    method, own = cpc(negatives=50, reappear=True), torch.tensor([0, 5, 8] * 4).repeat(3)
    drawn = method.drawn("test", 3, own, 9)
    for target in (0, 5, 8):
        assert drawn[own == target].flatten().bincount(minlength=9).min() > 0.6 * 600 / 9
    method, batch = cpc(negatives=7, reappear=True), grid()
    never = cpc(negatives=7).loss(batch)["down"]
    assert method.loss(batch)["down"].isfinite()
    assert not torch.equal(method.loss(batch)["down"], never)


@pytest.mark.parametrize("negatives", [0, 5])
def test_chunks_change_nothing(negatives):
    found = []
    for chunk in (None, 7, 1000):
        method = cpc(negatives=negatives, chunk=chunk)
        loss = method.loss(grid())["down"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in method.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


def test_half_precision_is_summed_in_full():
    q, k = 30 * normals(9, 5).bfloat16(), 30 * normals(12, 5, seed=1).bfloat16()
    own = torch.arange(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = choice(q, k, own, None)
    assert value.dtype == torch.float32
    exact = choice(q.double(), k.double(), own, None)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert (q.half() @ k.half().T).isinf().sum() == 0
    assert choice(300 * q, 300 * k, own, None).isfinite().all()  # exp and half's range overflow


# Who sees whom.


@pytest.mark.parametrize("sight", ["pixel", "row"])
def test_rows_below_are_not_seen_to_the_last_bit(sight):
    torch.manual_seed(0)
    backbone = ResNet(depth=18, width=16, stem="small", stem_stride=2)  # with batch norm
    context = Context(backbone.dim, sight, width=16, blocks=3).eval()
    with torch.no_grad():
        for p in context.parameters():
            p.normal_(std=0.2)
    x = torch.randn(2, 4, 4, 3, 8, 8)
    other = x.clone()
    other[:, 2:] = torch.randn(2, 2, 4, 3, 8, 8)

    @torch.no_grad()
    def seen(x):
        return context(backbone(x.flatten(0, 2)).view(2, 4, 4, -1))

    backbone.eval()
    first, second = seen(x), seen(other)
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.isclose(first[:, 2:], second[:, 2:]).all(-1).any()
    backbone.train()  # batch norm lets patches see one another
    assert not torch.equal(seen(x)[:, :2], seen(other)[:, :2])


@pytest.mark.parametrize("sight", ["pixel", "row", "none"])
def test_what_a_place_sees(sight):
    torch.manual_seed(0)
    context = Context(D, sight, width=8, blocks=1).double()
    with torch.no_grad():
        for p in context.parameters():  # positive: no ReLU closes
            p.abs_().add_(0.1)
    x = normals(1, G, G, D).abs().requires_grad_()
    (grad,) = torch.autograd.grad(context(x)[0, 2, 2].sum(), x)
    seen = {tuple(p) for p in grad[0].abs().sum(-1).nonzero().tolist()}
    above = {(1, 1), (1, 2), (1, 3)}
    expected = {
        "pixel": above | {(2, 1), (2, 2)},
        "row": above | {(2, 1), (2, 2), (2, 3)},
        "none": {(2, 2)},
    }
    assert seen == expected[sight]


def test_blocks_reach_further_up():
    context = Context(D, "row", width=8, blocks=3).double()
    with torch.no_grad():
        for p in context.parameters():
            p.abs_().add_(0.1)
    x = normals(1, G, G, D).abs().requires_grad_()
    (grad,) = torch.autograd.grad(context(x)[0, 4, 2].sum(), x)
    assert grad[0].abs().sum((1, 2)).ne(0).tolist() == [False, True, True, True, True]


def test_turns_bring_a_direction_below():
    z = torch.arange(9.0).view(1, 3, 3, 1)
    beside = {"down": 7, "up": 1, "left": 3, "right": 5}
    for direction, value in beside.items():
        t = turned(z, direction)
        r, c = (t[0, :, :, 0] == 4).nonzero()[0].tolist()
        assert t[0, r + 1, c, 0] == value


def test_tied_directions_are_one_loss_of_a_turned_grid():
    method = cpc(directions=ALL, context="row", dim=3)
    for side in method.sides.values():
        side.load_state_dict(method.sides["down"].state_dict())
    (x,) = grid()["views"]
    plain = method.loss({"views": [x]})
    assert len({round(v.item(), 9) for v in plain.values()}) == 4
    upside_down = method.loss({"views": [torch.rot90(x, 2, (1, 2))]})
    for one, other in (("down", "up"), ("left", "right")):
        torch.testing.assert_close(plain[one], upside_down[other], rtol=1e-12, atol=0)
        torch.testing.assert_close(plain[other], upside_down[one], rtol=1e-12, atol=0)
    quarter = method.loss({"views": [torch.rot90(x, 1, (1, 2))]})
    torch.testing.assert_close(quarter["down"], plain["left"], rtol=1e-12, atol=0)


def test_directions_have_weights_of_their_own():
    method = cpc(directions=("down", "up"), dim=3)
    method.loss(grid())["up"].backward()
    assert all(p.grad is None for p in method.sides["down"].parameters())
    assert all(p.grad is not None for p in method.sides["up"].parameters())
    assert len(method.sides["down"].predict) == 2


@pytest.mark.parametrize(("norm", "alone"), [("layer", True), ("batch", False)])
def test_layer_norm_keeps_patches_apart(norm, alone):
    torch.manual_seed(0)
    net = ResNet(depth=18, width=16, stem="small", stem_stride=2, norm=norm)
    assert net.config["norm"] == norm
    x = torch.randn(6, 3, 16, 16)
    other = torch.cat([x[:2], 5 * torch.randn(4, 3, 16, 16)])
    with torch.no_grad():
        assert torch.equal(net(x)[:2], net(other)[:2]) == alone


def test_layer_norm_is_over_channels_and_places():
    layer = norm_layer("layer")(6)
    x = 3 * normals(2, 6, 4, 5).float() + torch.arange(6.0).view(6, 1, 1)
    torch.testing.assert_close(layer(x), F.layer_norm(x, (6, 4, 5)))
    assert layer.weight.shape == (6,)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0))
    torch.testing.assert_close(layer(x)[:, 0], torch.zeros(2, 4, 5))


# Patches.


def test_patches_are_row_major_and_put_the_image_together_again():
    x = torch.arange(2 * 3 * 16 * 16).float().view(2, 3, 16, 16)
    patches = patches_of(x, 8, 4)
    assert patches.shape == (2, 3, 3, 3, 8, 8)
    for r in range(3):
        for c in range(3):
            assert torch.equal(patches[:, r, c], x[:, :, 4 * r : 4 * r + 8, 4 * c : 4 * c + 8])
    apart = patches[:, ::2, ::2]  # those that share no pixel
    assert torch.equal(apart.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16), x)
    assert patches_of(torch.zeros(1, 3, 256, 256), 64, 32).shape[1:3] == (7, 7)
    assert patches_of(torch.zeros(1, 3, 260, 260), 80, 36).shape[1:3] == (6, 6)


def crops(count=3, side=16):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return {"crops": [pixels], "index": torch.arange(count)}


def test_each_patch_has_draws_of_its_own():
    batch = crops(12)
    augment = PatchGrid([], [Flip(p=0.5), Grayscale(p=0.25)], size=8, stride=4)
    (x,) = augment(batch, Draws(1, rows=12))["views"]
    plain = patches_of(batch["crops"][0].float() / 255, 8, 4)
    x = denormalize(x)
    assert x.shape == plain.shape == (12, 3, 3, 3, 8, 8)
    grey = torch.isclose(x[..., 0, :, :], x[..., 1, :, :], atol=1e-5).flatten(3).all(3)
    luma = x.mean(3)
    target = (plain * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(3)
    same = torch.where(
        grey, (luma - target).abs().amax((-2, -1)), (x - plain).abs().amax((3, 4, 5))
    )
    unflipped = same < 1e-4
    for flags, p in ((grey, 0.25), (unflipped, 0.5)):
        assert abs(flags.float().mean().item() - p) < 0.15
        per_image = flags.flatten(1).float().mean(1)
        assert ((per_image > 0) & (per_image < 1)).sum() > 6  # within one image, not per image


def test_an_image_has_the_same_patches_in_any_process():
    batch, augment = crops(4), PatchGrid([], [CropPad(margin=2), Flip()], size=8, stride=4)
    (whole,) = augment(batch, Draws(1, rows=4))["views"]
    for rank in range(2):
        part = {"crops": [batch["crops"][0][2 * rank : 2 * rank + 2]]}
        (x,) = augment(part, Draws(1, rows=2, rank=rank, world=2))["views"]
        torch.testing.assert_close(x, whole[2 * rank : 2 * rank + 2])


def test_a_patch_is_cropped_and_padded():
    x = torch.rand(200, 3, 8, 8) + 2  # unlike the colour that pads
    out = CropPad(margin=4)(x.clone(), Draws(0, rows=200))
    assert out.shape == x.shape
    inner = out[:, :, 2:6, 2:6]
    pads = out.clone()
    pads[:, :, 2:6, 2:6] = torch.tensor(MEAN).view(3, 1, 1)
    assert torch.equal(pads, torch.tensor(MEAN).view(3, 1, 1).expand_as(pads))
    found = set()
    for image, crop in zip(x, inner, strict=True):
        places = [(i, j) for i in range(5) for j in range(5)]
        (place,) = [
            p for p in places if torch.equal(crop, image[:, p[0] : p[0] + 4, p[1] :][..., :4])
        ]
        found.add(place)
    assert found == {(i, j) for i in range(5) for j in range(5)}
    assert torch.equal(CropPad(margin=0)(x.clone(), Draws(0, rows=200)), x)


def test_one_channel_of_a_dropped_patch_keeps_its_values():
    x = torch.rand(300, 3, 4, 4)
    out = ColorDrop(p=0.7)(x.clone(), Draws(0, rows=300))
    kept = (out == x).flatten(2).all(2)  # (300, 3)
    counts = kept.sum(1)
    assert set(counts.tolist()) == {1, 3}
    assert abs((counts == 1).float().mean().item() - 0.7) < 0.1
    dropped = kept[counts == 1]
    assert (dropped.sum(0) > 40).all()  # each of the three, alike
    gone = out[counts == 1].flatten(2)[~dropped].view(-1, 2, 16)
    means = torch.tensor(MEAN).expand(len(dropped), 3)[~dropped].view(-1, 2, 1)
    assert torch.equal(gone, means.expand_as(gone))


def test_colours_are_no_shortcut_where_patches_change_one_by_one():
    """Noise with a tint for each image: only the tint tells which patches belong together."""
    tint = torch.rand(64, 3, 1, 1)
    pixels = ((0.7 * tint + 0.3 * torch.rand(64, 1, 16, 16)) * 255).to(torch.uint8)

    def told(*ops):
        """How often a patch's mean colour finds a patch of its own image, out of 64."""
        (x,) = PatchGrid([], ops, size=8, stride=8)({"crops": [pixels]}, Draws(0, rows=64))["views"]
        colour = x[:, 0, 0].mean((2, 3)), x[:, 1, 1].mean((2, 3))
        return (torch.cdist(*colour).argmin(1) == torch.arange(64)).float().mean().item()

    assert told() > 0.7
    assert told(ColorDrop(p=1.0)) < 0.3


def test_warps_bend_rows_by_draws_of_their_own():
    x = torch.rand(40, 3, 12, 12)
    for op in (Affine(p=0.5), Elastic(p=0.5)):
        out = op(x.clone(), Draws(0, rows=40))
        changed = (out != x).flatten(1).any(1)
        assert 8 < changed.sum() < 32
        assert out.min() >= 0
        assert out.max() <= 1 + 1e-6
    for op in (Affine(p=1, degrees=0, shear=0, shift=0), Elastic(p=1, strength=0)):
        torch.testing.assert_close(op(x.clone(), Draws(0, rows=40)), x, rtol=0, atol=1e-5)


def test_an_affine_map_turns_shears_and_shifts():
    u = torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, -1]])
    turn, across, along, shift = Affine(p=1, degrees=90, shear=0.5, shift=0.25).matrices(u)
    torch.testing.assert_close(turn[:, :2], torch.tensor([[0.0, -1], [1, 0]]), atol=1e-6, rtol=0)
    assert across.tolist() == [[1, 0.5, 0], [0, 1, 0]]
    assert along.tolist() == [[1, 0, 0], [0.5, 1, 0]]
    assert shift.tolist() == [[1, 0, 0.5], [0, 1, -0.5]]  # a quarter of a side of length 2
    x = torch.rand(3, 1, 9, 9)
    half = Affine(p=1, degrees=180, shear=0, shift=0)
    half.matrices = lambda u: torch.tensor([[-1.0, 0, 0], [0, -1, 0]]).expand(3, 2, 3)
    torch.testing.assert_close(half(x.clone(), Draws(0, rows=3)), x.flip(2, 3))


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cpc(directions=["sideways"]), r"directions.*sideways"),
        (lambda: cpc(directions=[]), "directions"),
        (lambda: cpc(context="all"), "context must be pixel, row or none, got 'all'"),
        (lambda: cpc(steps=0), "steps must be at least 1, got 0"),
        (lambda: cpc(skip=-1), "skip must be at least 0, got -1"),
        (lambda: cpc(negatives=-1), "negatives must be at least 0, got -1"),
        (lambda: cpc(reappear=True), "reappear=true is about negatives that are drawn"),
        (lambda: cpc(chunk=0), "chunk must be at least 1, got 0"),
        (lambda: cpc(dim=0), "dim must be at least 1, got 0"),
        (lambda: cpc(width=0), "width and blocks must be at least 1, got 0 and 2"),
        (lambda: cpc(steps=3).loss(grid(side=4)), r"steps=3 with skip=1 need .* more than 4 .* 4"),
        (lambda: PatchGrid([], [], size=0), "size and stride must be at least 1, got 0"),
        (lambda: patches_of(torch.zeros(1, 3, 17, 17), 8, 4), "size=8 with stride=4 .* 17 pixels"),
        (lambda: patches_of(torch.zeros(1, 3, 7, 7), 8, 4), "7 pixels"),
        (lambda: CropPad(margin=-1), "margin must not be negative, got -1"),
        (lambda: CropPad(margin=8)(torch.zeros(1, 3, 8, 8), Draws(0)), "margin=8 leaves nothing"),
        (lambda: ColorDrop(p=2), "p is a probability"),
        (lambda: Affine(shear=-1), "must not be negative"),
        (lambda: Elastic(points=1), "points"),
        (lambda: ResNet(last="res3"), "last must be res4 or res5, got 'res3'"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The whole.


def test_the_encoder_may_end_a_stage_earlier():
    whole = ResNet(depth=18, width=16, stem="small")
    short = ResNet(depth=18, width=16, stem="small", last="res4")
    assert (short.dim, whole.dim) == (64, 128)
    assert short.config["last"] == "res4"
    missing, extra = short.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    assert {name.split(".")[0] for name in extra} == {"layer4"}
    x = torch.randn(2, 3, 16, 16)
    whole.eval(), short.eval()
    assert list(short.stages(x)) == ["conv1", "res2", "res3", "res4"]
    torch.testing.assert_close(short(x), whole.stages(x)["res4"].mean((2, 3)))
    assert ResNet(depth=101, width=64, last="res4").dim == 1024  # the paper's


def test_scores_of_wide_features_start_small():
    wide = Mean()
    wide.dim, wide.layer = 1024, nn.Linear(3, 1024)
    method = CPC(wide, nn.Identity(), None, width=8, blocks=1)
    z = torch.randn(2, 7, 7, 1024)
    for predict in method.sides["down"].predict:
        assert 0.3 < (predict(z) * z.roll(1, 1)).sum(-1).std() < 3


@pytest.mark.parametrize("name", ["cpc", "cpc_v2"])
def test_the_papers_numbers(compose, name):
    cfg = compose(f"experiment=imagenet/{name}")
    side = (cfg.decode.size - cfg.method.augment.size) // cfg.method.augment.stride + 1
    assert side == {"cpc": 7, "cpc_v2": 6}[name]
    assert cfg.method.steps + cfg.method.skip < side
    assert cfg.backbone.norm == "layer"
    assert len(cfg.method.directions) == {"cpc": 1, "cpc_v2": 4}[name]
    if name == "cpc_v2":  # no pixel is in a patch and in its target
        nearest = (cfg.method.skip + 1) * cfg.method.augment.stride
        assert nearest >= cfg.method.augment.size > nearest - cfg.method.augment.stride


def trained(**given):
    """Loss and gradient for weights of the backbone, on this process's share of 6 images."""
    method, x = cpc(**given), normals(6, 4, 4, 3, 2, 2)
    w = method.backbone.layer.weight.detach().clone()
    own = mine(x)
    method.note = lambda *args: None

    def loss(w):
        h = (own.flatten(0, 2).mean((2, 3)) @ w.T).tanh().unflatten(0, own.shape[:3])
        return sum(method.predicted(name, turned(h, name))[0] for name in method.sides)

    return value_and_gradient(loss, w)


def measured():
    settings = {"directions": ALL, "context": "row", "dim": 3}
    return [trained(**settings), trained(negatives=5), trained(chunk=5)]


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_are_one(world):
    alone = measured()
    for found in on_processes(world, measured):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


# Evaluated patch by patch.


def test_patch_by_patch_is_the_mean_over_patches():
    torch.manual_seed(0)
    net = ResNet(depth=18, width=16, stem="small", stem_stride=2, norm="layer")
    model, x = Patchwise(net, size=8, stride=4), torch.randn(2, 3, 16, 16)
    patches = patches_of(x, 8, 4)
    with torch.no_grad():
        expected = sum(net(patches[:, r, c]) for r in range(3) for c in range(3)) / 9
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        maps = model.stages(x)
        torch.testing.assert_close(maps["res5"].mean((2, 3)), model(x), rtol=1e-4, atol=1e-5)
        assert (model(x) - net(x)).abs().max() > 0.01
    assert list(maps) == ["conv1", "res2", "res3", "res4", "res5"]
    built = build(model.config)
    built.load_state_dict(model.state_dict())
    assert (built.dim, built.size, built.stride) == (net.dim, 8, 4)
    with pytest.raises(ValueError, match=r"size=8 with stride=4 .* 18 pixels"):
        model(torch.zeros(1, 3, 18, 18))
    with pytest.raises(ValueError, match="size and stride must be at least 1, got 8 and 0"):
        Patchwise(net, size=8, stride=0)
