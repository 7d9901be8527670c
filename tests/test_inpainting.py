"""Context encoders: their holes, losses and the adversary."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from processes import on_processes, value_and_gradient
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from test_papers import batch_of
from torch import nn
from torch.nn.grad import conv2d_input

from unlabeled.augment.holes import Holes, pattern, shrunk, windows
from unlabeled.augment.views import Views
from unlabeled.batch import denormalize, normalize
from unlabeled.dist import mine
from unlabeled.draws import Draws
from unlabeled.optim import Optim
from unlabeled.parts import inpainting
from unlabeled.parts.adversary import (
    Turns,
    discriminate,
    discriminator_loss,
    generator_loss,
    judged,
    with_old_outputs,
)
from unlabeled.parts.decoder import last_map
from unlabeled.parts.discriminator import Discriminator
from unlabeled.parts.inpainting import hole_loss
from unlabeled.parts.pixels import explained, pixels

KINDS = ("region", "blocks", "centre")


def crops(count=8, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, side, side)
    return {"crops": [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)]}


def made(count=8, side=32, key=0, **settings):
    """A batch with holes, and the images that they were cut out of."""
    given = crops(count, side)
    module = Holes(Views([[]]), **settings)
    return module(given, Draws(0, key, rows=count)), normalize(given["crops"][0])


# Holes.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", [0, 1])
def test_outside_the_hole_nothing_changes_and_inside_is_the_mean(kind, overlap):
    batch, x = made(kind=kind, overlap=overlap)
    (view,), mask, target = batch["views"], batch["mask"], batch["target"]
    hidden = target["hidden"]
    assert torch.equal(target["image"], x)
    assert mask.shape == hidden.shape == (8, 1, 32, 32)
    assert set(mask.unique().tolist()) == set(hidden.unique().tolist()) == {0.0, 1.0}
    blank = hidden.expand_as(x) > 0
    assert torch.equal(view[~blank], x[~blank])  # bit for bit
    assert (view[blank] == 0).all()
    torch.testing.assert_close(
        denormalize(view)[blank].view(-1).mean(), torch.tensor(0.449), atol=0.01, rtol=0
    )
    assert (hidden <= mask).all()
    assert torch.equal(hidden, mask) == (overlap == 0)


def test_a_hole_takes_the_colour_it_is_given():
    official = [0.459, 0.408, 0.482]
    batch, _ = made(kind="centre", fill=official)
    inside = denormalize(batch["views"][0])[:, :, 12:20, 12:20]
    torch.testing.assert_close(
        inside, torch.tensor(official).view(3, 1, 1).expand_as(inside), atol=1e-6, rtol=0
    )


def test_the_centres_square_has_a_visible_band():
    batch, _ = made(side=128, kind="centre", overlap=7)
    expected = torch.zeros(128, 128)
    expected[32:96, 32:96] = 1
    assert torch.equal(batch["mask"], expected.expand(8, 1, -1, -1))
    expected[32:96, 32:96] = 0
    expected[39:89, 39:89] = 1
    assert torch.equal(batch["target"]["hidden"], expected.expand(8, 1, -1, -1))
    holes = Holes(Views([[]]), kind="centre", size=0.4)
    assert [holes.hole_side(side) for side in (32, 31, 10)] == [12, 13, 4]


def test_a_region_is_shrunk_by_every_pixel_near_its_border_but_not_the_images():
    mask = (torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.9).float()
    mask[0] = 1
    found = shrunk(mask, 2)
    assert torch.equal(found[0], mask[0])
    for b in range(4):
        for i in range(12):
            for j in range(12):
                near = mask[b, 0, max(0, i - 2) : i + 3, max(0, j - 2) : j + 3]
                assert found[b, 0, i, j] == near.min()


def test_regions_are_windows_of_the_pattern_with_the_area_asked_for():
    batch, _ = made(64, kind="region", area=0.25, tolerance=0.03)
    masks = batch["mask"]
    areas = masks.mean((1, 2, 3))
    assert ((areas - 0.25).abs() <= 0.03 + 1e-6).all()
    assert len({tuple(m.flatten().tolist()) for m in masks}) > 60  # every image has its own
    spots = pattern(512, 32 * 0.13, 0.25, 0)
    every = spots.unfold(0, 32, 1).unfold(1, 32, 1)
    for mask in masks[:1, 0] > 0:
        assert (every == mask).all(3).all(2).any()
    # irregular: neither squares nor single pixels
    edges = (masks[..., 1:] != masks[..., :-1]).float().mean()
    assert 0.02 < edges < 0.15
    other, _ = made(4, kind="region", seed=1)
    assert not torch.equal(other["mask"], made(4, kind="region")[0]["mask"])


def test_windows_are_those_that_counting_finds():
    spots = pattern(30, 4, 0.3, 0)
    expected = [
        top * 23 + left
        for top in range(23)
        for left in range(23)
        if abs(spots[top : top + 8, left : left + 8].float().mean().item() - 0.25) <= 0.05
    ]
    assert windows(spots, 8, 0.25, 0.05).tolist() == expected
    assert expected


def test_a_pattern_is_smooth_noise_below_a_threshold():
    for density in (0.1, 0.25, 0.4):
        fine, coarse = (pattern(400, cell, density, 0).float() for cell in (4, 16))
        assert abs(fine.mean() - density) < 0.1
        changes = [(p[:, 1:] != p[:, :-1]).float().mean().item() for p in (fine, coarse)]
        assert changes[0] > 2.5 * changes[1]  # larger cells, larger spots
    assert torch.equal(pattern(40, 4, 0.25, 3), pattern(40, 4, 0.25, 3))


def test_blocks_are_squares_that_may_overlap():
    batch, _ = made(64, kind="blocks", blocks=4, area=0.25)  # of 8 pixels
    masks = batch["mask"][:, 0]
    areas = masks.mean((1, 2))
    assert areas.max() <= 0.25
    assert areas.min() >= 0.25 / 4
    assert areas.min() < 0.24  # some do
    # every pixel of a hole lies in an 8 x 8 square of it
    opened = F.max_pool2d(-F.max_pool2d(-F.pad(masks[:, None], (7,) * 4), 8, 1), 8, 1)
    assert torch.equal(opened[:, 0], masks)
    assert masks.mean(0)[4:-4, 4:-4].min() > 0  # anywhere
    one, _ = made(16, kind="blocks", blocks=1, area=0.25)
    assert (one["mask"].sum((1, 2, 3)) == 256).all()


@pytest.mark.parametrize("kind", KINDS)
def test_holes_depend_on_the_key_alone(kind):
    module, given = Holes(Views([[]]), kind=kind), crops(6)["crops"][0]
    whole = module({"crops": [given]}, Draws(0, 1, rows=6))
    parts = [
        module({"crops": [given[2 * r : 2 * r + 2]]}, Draws(0, 1, rows=2, rank=r, world=3))
        for r in range(3)
    ]
    assert torch.equal(whole["mask"], torch.cat([p["mask"] for p in parts]))
    assert torch.equal(whole["views"][0], torch.cat([p["views"][0] for p in parts]))
    again = module({"crops": [given]}, Draws(0, 2, rows=6))
    assert torch.equal(whole["mask"], again["mask"]) == (kind == "centre")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "left"}, "kind must be region, blocks or centre, got 'left'"),
        ({"size": 1.0}, "size is a share between 0 and 1, got 1.0"),
        ({"area": 0.0}, "area is a share"),
        ({"cell": 2.0}, "cell is a share"),
        ({"density": -1.0}, "density is a share"),
        ({"tolerance": 2.0}, "tolerance is a probability"),
        ({"blocks": 0}, "got 0 and 0"),
        ({"overlap": -1}, "got 4 and -1"),
        ({"fill": [0.5]}, "fill is a colour"),
        ({"fill": [0.5, 0.5, 255]}, "fill is a colour"),
        ({"kind": "centre", "overlap": 8}, "overlap=8 leaves nothing of a hole of 16 pixels"),
        ({"kind": "blocks", "overlap": 4}, "blocks=4 of 8 pixels are too small for overlap=4"),
        ({"area": 0.9}, "no window of the pattern has area=0.9 within 0.05"),
    ],
)
def test_bad_holes_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        made(**settings)


def test_only_a_centre_has_a_side():
    with pytest.raises(ValueError, match="if its kind is centre, got 'region'"):
        Holes(Views([[]])).hole_side(32)
    with pytest.raises(ValueError, match="holes need square crops, got 32x30"):
        Holes(Views([[]]))({"crops": [crops()["crops"][0][..., :30]]}, Draws(0, rows=8))


# The reconstruction.


def example(count=6, side=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prediction, image = torch.randn(
        2, count, 3, side, side, generator=generator, dtype=torch.float64
    )
    mask = (torch.rand(count, 1, side, side, generator=generator) < 0.7).double()
    return prediction, image, mask, shrunk(mask, 1)


@pytest.mark.parametrize(("band", "context"), [(10.0, 0.0), (3.0, 0.0), (10.0, 1.0), (0.0, 10.0)])
def test_the_loss_is_its_formula(band, context):
    prediction, image, mask, hidden = example()
    total, count = 0.0, 0
    for b in range(6):
        for i in range(9):
            for j in range(9):
                seen, blank = mask[b, 0, i, j] == 1, hidden[b, 0, i, j] == 1
                weight = context if not seen else 1.0 if blank else band
                count += 3 if seen or context else 0
                for c in range(3):
                    error = (prediction[b, c, i, j] - image[b, c, i, j]).item()
                    total += weight * error**2
    weights = {"overlap_weight": band, "context_weight": context}
    found = hole_loss(prediction, image, mask, hidden, **weights)
    assert found.item() == pytest.approx(total / count, rel=1e-12)
    halves = [x.bfloat16() for x in (prediction, image)]
    low = hole_loss(*halves, mask.float(), hidden.float(), **weights)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(total / count, rel=1e-2)


def test_what_is_predicted_outside_the_region_changes_nothing():
    prediction, image, mask, hidden = example()
    prediction.requires_grad_()
    loss = hole_loss(prediction, image, mask, hidden)
    loss.backward()
    outside = mask.expand_as(image) == 0
    assert (prediction.grad[outside] == 0).all()
    assert (prediction.grad[~outside] != 0).all()
    other = torch.where(outside, torch.full_like(image, 1e3), prediction.detach())
    assert hole_loss(other, image, mask, hidden) == loss
    assert hole_loss(other, image, mask, hidden, context_weight=1.0) > 1e4


def test_the_truth_costs_nothing_and_the_mean_the_regions_variance():
    _, image, mask, _ = example()
    assert hole_loss(image, image, mask, mask) == 0
    inside = image[mask.expand_as(image) == 1]
    constant = torch.full_like(image, inside.mean().item())
    expected = inside.var(correction=0)
    torch.testing.assert_close(hole_loss(constant, image, mask, mask), expected)
    assert explained(torch.zeros_like(image), image, mask) == 0
    assert explained(image, image, mask) == 1


def test_the_visible_band_weighs_ten_times_as_much():
    _, image, mask, hidden = example()
    band = (mask - hidden).expand_as(image)
    count = 3 * mask.sum()
    assert band.sum() > 0
    off = hole_loss(image + band, image, mask, hidden)
    torch.testing.assert_close(off, 10 * band.sum() / count)
    off = hole_loss(image + hidden, image, mask, hidden)
    torch.testing.assert_close(off, 3 * hidden.sum() / count)


def shared():
    """Regions of different sizes in every process: their sums count, not the mean of means."""
    image, mask, hidden = (mine(x) for x in example()[1:])
    w = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {
        context: value_and_gradient(
            lambda w, context=context: hole_loss(
                torch.einsum("bchw,cd->bdhw", image, w), image, mask, hidden, context_weight=context
            ),
            w,
        )
        for context in (0.0, 1.0)
    }


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_are_one(world):
    alone = shared()
    for found in on_processes(world, shared):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


# The method.

CENTRE = ["augment@method.augment=inpainting_centre", "method.augment.overlap=2"]


def ready(tiny, name="inpainting", *more):
    method, *rest = tiny(name, *more)
    method.note = lambda *args: None  # there is no trainer
    return method, batch_of(method, *rest)


@pytest.mark.parametrize("augment", ["inpainting", "inpainting_blocks", "inpainting_centre"])
def test_what_is_hidden_reaches_no_prediction(tiny, augment):
    """Nor the loss of other places: neither by pixels nor by the statistics of batch norm."""
    own = [f"augment@method.augment={augment}", "method.augment.overlap=1"]
    method, batch = ready(tiny, "inpainting", *own)
    method.train()
    (x,), hidden = batch["views"], batch["target"]["hidden"]
    image = batch["target"]["image"]
    predictions = []
    for other in (image, torch.where(hidden > 0, image.flip(0) + 1, image)):
        view = torch.where(hidden > 0, torch.zeros_like(x), other)
        assert torch.equal(view, x)
        h = last_map(method.backbone, view)
        predictions.append(inpainting.predicted(method.decoder, h, x.shape[-1], method.hole))
    assert torch.equal(*predictions)


def test_the_loss_is_of_the_last_map_alone(tiny):
    method, batch = ready(tiny)
    method.eval()
    (x,), target = batch["views"], batch["target"]
    found = method.loss(batch)["reconstruction"]
    prediction = method.decoder(last_map(method.backbone, x), x.shape[-1])
    expected = hole_loss(prediction, target["image"], batch["mask"], target["hidden"])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(method.seen["features"], method.backbone(x))


@pytest.mark.parametrize("name", ["inpainting", "inpainting_adversarial"])
def test_pictures_show_the_hole_the_filling_and_the_truth(tiny, name):
    method, batch = ready(tiny, name)
    columns = method.eval().pictures(batch)
    assert list(columns) == ["with a hole", "filled in", "truth"]
    hole, filled, truth = columns.values()
    inside = batch["mask"].expand_as(truth) > 0
    torch.testing.assert_close(truth, denormalize(batch["target"]["image"]), atol=1e-5, rtol=0)
    assert torch.equal(filled[~inside], truth[~inside])
    assert not torch.equal(filled[inside], truth[inside])
    blank = batch["target"]["hidden"].expand_as(truth) > 0
    assert torch.equal(hole[~blank], truth[~blank])
    assert len(hole[:, 0][blank[:, 0]].unique()) == 1
    assert all(column.min() >= 0 and column.max() <= 1 for column in columns.values())


def test_a_hole_alone_is_predicted_where_it_is(tiny):
    method, batch = ready(tiny, "inpainting", *CENTRE, "method.predicts=hole")
    h = last_map(method.backbone, batch["views"][0])
    made = inpainting.predicted(method.decoder, h, 28, method.hole)
    assert made.shape == (16, 3, 28, 28)
    inside = batch["mask"].expand_as(made) > 0
    assert (made[~inside] == 0).all()
    assert (made[inside] != 0).all()
    assert method.hole(28) == 14
    torch.testing.assert_close(made[:, :, 7:21, 7:21], made[inside].view(16, 3, 14, 14))


def test_bad_settings_are_named(tiny):
    for name, more, said in (
        ("inpainting", ["method.predicts=hole"], "if its kind is centre, got 'region'"),
        ("inpainting", ["method.predicts=all"], "predicts must be image or hole, got 'all'"),
        ("inpainting", ["method.overlap_weight=-1"], "overlap_weight=-1"),
        (
            "inpainting",
            [*CENTRE, "method.predicts=hole", "method.context_weight=1"],
            "predicts=hole has no context for context_weight=1",
        ),
        ("inpainting_adversarial", ["method.lambda_adv=-1"], "lambda_adv must not be negative"),
        ("inpainting_adversarial", ["method.adversary=kind"], "non_saturating, got 'kind'"),
        ("inpainting_adversarial", ["method.judges=image"], "predicts=image, got 'image'"),
        ("inpainting_adversarial", ["method.generator_lr=0"], "generator_lr must be positive"),
        ("inpainting_adversarial", ["method.discriminator.side=4"], "side >= 8"),
    ):
        with pytest.raises(Exception, match=said):
            tiny(name, *more)


# The adversary.


def test_a_discriminator_that_knows_nothing_pays_2_log_2():
    zero = torch.zeros(5)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zero, "non_saturating").item() == pytest.approx(math.log(2))
    assert generator_loss(zero, "minimax").item() == pytest.approx(-math.log(2))
    net = Discriminator(side=16, width=8, norm="batch")
    nn.init.zeros_(net.layers[-1].weight)
    x = torch.randn(2, 6, 3, 16, 16)
    assert discriminate(net, x[0], x[1], None).item() == pytest.approx(2 * math.log(2))


def test_adversarial_losses_are_their_formulas():
    true, made = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).double() * 3
    d = [[1 / (1 + math.exp(-v)) for v in x.tolist()] for x in (true, made)]
    expected = -sum(map(math.log, d[0])) / 7 - sum(math.log(1 - p) for p in d[1]) / 7
    assert discriminator_loss(true, made).item() == pytest.approx(expected, rel=1e-10)
    wanted = {
        "minimax": sum(math.log(1 - p) for p in d[1]) / 7,
        "non_saturating": -sum(map(math.log, d[1])) / 7,
    }
    for kind, value in wanted.items():
        assert generator_loss(made, kind).item() == pytest.approx(value, rel=1e-10)
        low = generator_loss(made.bfloat16(), kind)
        assert low.dtype == torch.float32
        assert low.item() == pytest.approx(value, rel=2e-2)
        x = made.clone().requires_grad_()
        generator_loss(x, kind).backward()
        assert (x.grad < 0).all()  # both pull the logits up
    far = torch.tensor([-200.0, 200.0])
    assert discriminator_loss(far, far).item() == pytest.approx(200)
    with pytest.raises(ValueError, match="got 'wasserstein'"):
        generator_loss(made, "wasserstein")


def test_neither_sides_step_gives_the_other_gradients():
    torch.manual_seed(0)
    net = Discriminator(side=16, width=8, norm="batch")
    true, made = torch.randn(2, 6, 3, 16, 16)
    made.requires_grad_()
    before = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loss = discriminate(net, true, made, optimizer)
    assert made.grad is None
    assert not loss.requires_grad
    ours = [p.grad.clone() for p in net.parameters()]
    expected = discriminator_loss(before(true), before(made.detach()))
    torch.testing.assert_close(loss, expected.detach())
    for p, old, g in zip(
        net.parameters(),
        before.parameters(),
        torch.autograd.grad(expected, list(before.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(p, old - 0.1 * g)
    judged(net, made, "minimax").backward()
    assert made.grad.abs().sum() > 0
    for p, g in zip(net.parameters(), ours, strict=True):
        assert p.requires_grad
        assert torch.equal(p.grad, g)


def slope(x):
    return torch.where(x > 0, x.new_tensor(1), 0.2)


def test_old_outputs_go_back_through_new_weights():
    """DCGAN's Torch code: maps and losses of D before its step, its weights after it."""
    torch.manual_seed(0)
    net = Discriminator(side=16, width=4, norm="batch").double()
    true, made = torch.randn(2, 6, 3, 16, 16).double()
    made.requires_grad_()
    old, other = copy.deepcopy(net), copy.deepcopy(net)
    maps = [made.detach()]
    for layer in copy.deepcopy(old.layers):
        maps.append(layer(maps[-1].clone()).detach())  # ReLUs write in place
    said = maps[-1].flatten()
    told, fooled = with_old_outputs(
        net, true, made, torch.optim.SGD(net.parameters(), 5.0), "non_saturating"
    )
    expected = discriminate(other, true, made, torch.optim.SGD(other.parameters(), 5.0))
    torch.testing.assert_close(told, expected)
    torch.testing.assert_close(fooled.detach(), generator_loss(said, "non_saturating"))
    for p, q, before in zip(net.parameters(), other.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert (p - before).abs().max() > 0.01

    stepped = [p.grad.clone() for p in net.parameters()]
    fooled.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), stepped, strict=True))
    first, _, second, norm, _, last = net.layers
    x, a0, a1, a2, a3, a4, _ = maps
    g = (-1 / (1 + said.exp()) / 6).view(6, 1, 1, 1)
    g = conv2d_input(a4.shape, last.weight, g) * slope(a3)
    centred = a2 - a2.mean((0, 2, 3), keepdim=True)
    deviation = (centred.square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
    hat = centred / deviation
    means = [v.mean((0, 2, 3), keepdim=True) for v in (g, g * hat)]
    g = norm.weight.view(1, -1, 1, 1) / deviation * (g - means[0] - hat * means[1])
    g = conv2d_input(a1.shape, second.weight, g, stride=2, padding=1)
    g = conv2d_input(x.shape, first.weight, g * slope(a0), stride=2, padding=1)
    torch.testing.assert_close(made.grad, g)
    for d in (old, net):  # neither of the two alone
        (plain,) = torch.autograd.grad(judged(d, made, "non_saturating"), made)
        assert (plain - g).norm() > 0.05 * g.norm()


def test_the_generator_can_be_judged_by_old_outputs(tiny):
    found = {}
    for asked in (False, True):
        one = ["trainer.max_steps=1", "method.lambda_adv=0.5", "method.optim.warmup=0"]
        method, data, trainer = tiny("inpainting_adversarial", *one, f"method.old_outputs={asked}")
        trainer.fit(method, data)
        found[asked] = method.state_dict()
    differ = {
        name.split(".")[0]
        for name, x in found[False].items()
        if "running" not in name and "tracked" not in name and not torch.equal(x, found[True][name])
    }
    assert differ == {"backbone", "decoder"}  # D made the same step


def test_a_discriminators_layers():
    net = Discriminator(side=64, width=64, norm="batch")
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [
        (3, 64, 4, 2),
        (64, 128, 4, 2),
        (128, 256, 4, 2),
        (256, 512, 4, 2),
        (512, 1, 4, 1),
    ]
    assert all(c.bias is None for c in convs)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.num_features for m in norms] == [128, 256, 512]
    assert net(torch.randn(2, 3, 64, 64)).shape == (2,)
    with pytest.raises(ValueError, match="a discriminator for 64 pixels got 32x32"):
        net(torch.randn(2, 3, 32, 32))


def test_d_sees_the_hole_and_nothing_else(tiny):
    method, batch = ready(tiny, "inpainting_adversarial")
    image, mask = batch["target"]["image"], batch["mask"]
    assert torch.equal(method._judged(image, mask), image[..., 7:21, 7:21])
    own = ["augment@method.augment=inpainting", "method.augment.overlap=0"]
    for judges in ("hole", "image"):
        side = [*own, "method.predicts=image", "method.discriminator.side=28"]
        method, batch = ready(tiny, "inpainting_adversarial", *side, f"method.judges={judges}")
        image, mask = batch["target"]["image"], batch["mask"]
        other = torch.where(mask > 0, image, image + 1)
        seen = [method._judged(x, mask) for x in (image, other)]
        assert torch.equal(*seen) == (judges == "hole")
        assert torch.equal(seen[0] * mask, image * mask)


def test_two_optimizers_share_a_recipe_and_no_parameter():
    torch.manual_seed(0)
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.BatchNorm1d(2), "d": nn.Linear(3, 1)})
    recipe = Optim(
        lambda groups: torch.optim.SGD(groups), lr=0.1, scaling="none", norm_bias_lr=0.01
    )
    first, second = Turns(recipe, {"d": 1.0}, factor=10.0)(
        module, batch_size=8, steps=4, steps_per_epoch=2
    )
    held = [
        {p for g in made["optimizer"].param_groups for p in g["params"]} for made in (first, second)
    ]
    assert held[0] == {*module["a"].parameters(), *module["b"].parameters()}
    assert held[1] == set(module["d"].parameters())
    rates = [[g["initial_lr"] for g in m["optimizer"].param_groups] for m in (first, second)]
    assert rates[0] == pytest.approx([1.0, 0.1])
    assert rates[1] == pytest.approx([0.1, 0.01])
    assert recipe.lr == 0.1
    assert recipe.norm_bias_lr == 0.01


def test_a_step_is_ds_and_then_the_generators_against_the_new_d(tiny):
    method, data, trainer = tiny(
        "inpainting_adversarial",
        "trainer.max_steps=1",
        "method.lambda_adv=0.5",
        "method.optim.warmup=0",  # the first update would have no rate
    )
    kept = {}

    def on_train_batch_start(batch, batch_idx):
        kept["method"] = copy.deepcopy(method)
        kept["batch"] = copy.deepcopy(batch)

    method.on_train_batch_start = on_train_batch_start
    trainer.fit(method, data)

    old = kept["method"].train()
    batch = kept["batch"]
    batch = old.augment(batch, Draws(data.seed, "augment", 0, rows=16))
    (x,), target, mask = batch["views"], batch["target"], batch["mask"]
    fill = old.decoder(last_map(old.backbone, x), 14)
    image = target["image"][..., 7:21, 7:21]
    true, fake = 2 * pixels(image) - 1, 2 * pixels(fill) - 1
    adam = {"betas": (0.5, 0.999), "eps": 1e-8}
    lr_g, lr_d = (o.param_groups[0]["initial_lr"] for o in trainer.optimizers)
    assert lr_g == pytest.approx(10 * lr_d)
    d = torch.optim.Adam(old.discriminator.parameters(), lr=lr_d, **adam)
    discriminator_loss(old.discriminator(true), old.discriminator(fake.detach())).backward()
    d.step()
    weight = target["hidden"] + 10 * (mask - target["hidden"])
    rec = (weight[..., 7:21, 7:21] * (fake - true).square()).sum() / (3 * mask.sum())
    adv = generator_loss(old.discriminator(fake), "non_saturating")
    rest = [*old.backbone.parameters(), *old.decoder.parameters()]
    g = torch.optim.Adam(rest, lr=lr_g, **adam)
    g.zero_grad()
    (0.999 * rec + 0.5 * adv).backward()
    g.step()
    for (name, p), q in zip(method.named_parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_a_batch_is_one_update(tiny):
    method, data, trainer = tiny("inpainting_adversarial", "trainer.max_epochs=1")
    calls, shares = [], []
    method.after_step = lambda: calls.append(trainer.global_step)
    method.on_train_batch_start = lambda *_: shares.append(method.progress)
    trainer.fit(method, data)
    assert calls == [1, 2, 3, 4]
    assert shares == [0, 0.25, 0.5, 0.75]
    assert method.progress == 1
    assert [c.scheduler.last_epoch for c in trainer.lr_scheduler_configs] == [4, 4]
    steps = [next(iter(o.state_dict()["state"].values()))["step"] for o in trainer.optimizers]
    assert steps == [4, 4]
    method, data, trainer = tiny(
        "inpainting_adversarial", "trainer.max_epochs=-1", "trainer.max_steps=5"
    )
    trainer.fit(method, data)
    assert trainer.global_step == 5


@pytest.mark.parametrize(
    "asked", ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1.0"]
)
def test_what_lightning_cannot_do_for_two_optimizers_is_refused(tiny, asked):
    method, data, trainer = tiny("inpainting_adversarial", asked)
    with pytest.raises(MisconfigurationException, match="not supported for manual optimization"):
        trainer.fit(method, data)
    assert not method.started


def test_measuring_moves_neither_side(tiny):
    method, data, trainer = tiny("inpainting_adversarial", "trainer.max_epochs=1")
    trainer.fit(method, data)
    before = copy.deepcopy(method.state_dict())
    found = method.measure(method.augmented(next(iter(data.unseen(16))), 0), 0)
    assert set(found) == {"reconstruction", "adversarial", "explained", "discriminator"}
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["inpainting", "inpainting_adversarial"])
def test_it_learns_to_fill_in_images_that_it_has_not_seen(tiny, name):
    """The mean colour would explain nothing."""
    few = ["data.limit=512", "data.batch_size=32", "trainer.max_epochs=5"]
    method, data, trainer = tiny(name, *few)
    batch = next(iter(data.unseen(64)))
    assert method.measure(method.augmented(batch, 0), 0)["explained"] < 0.1
    trainer.fit(method, data)
    found = method.measure(method.augmented(batch, 0), 0)
    assert found["explained"] > 0.4
    if name == "inpainting_adversarial":  # neither side has won
        assert 0.5 < found["discriminator"] < 3
