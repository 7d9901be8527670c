"""MAE: its loss as loops, its masks, what the encoder is spared, positions, and its pictures."""

import math

import pytest
import torch
from conftest import CONF
from omegaconf import OmegaConf
from processes import on_processes, value_and_gradient
from test_papers import batch_of
from torch import nn

from unlabeled.augment.views import Views
from unlabeled.backbones import load
from unlabeled.backbones.library import timm
from unlabeled.batch import denormalize
from unlabeled.dist import mine, rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods.mae import MAE
from unlabeled.parts.masked import masked_error, standardized
from unlabeled.parts.patch_decoder import PatchDecoder, initialize
from unlabeled.parts.patchify import patchify, sine_positions, unpatchify

SMALL = {"dim": 16, "depth": 1, "heads": 2}


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def vit(depth=2):
    net = timm("vit_tiny_patch16_224", image_size=16, patch_size=4, dynamic=True)
    del net.model.blocks[depth:]
    return net


def mae(**changes):
    torch.manual_seed(0)
    return MAE(vit(), nn.Identity(), None, **{**SMALL, **changes})


# Patches


def test_patches_are_the_images_squares_row_by_row():
    x = normals(2, 3, 8, 12)
    patches = patchify(x, (4, 6))
    assert patches.shape == (2, 4, 72)
    for b in range(2):
        for k in range(4):
            r, c = divmod(k, 2)
            square = x[b, :, 4 * r : 4 * r + 4, 6 * c : 6 * c + 6]
            assert torch.equal(patches[b, k], square.permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, (4, 6), 2), x)
    with pytest.raises(ValueError, match="patches of 5x4 pixels do not fill an image of 8x12"):
        patchify(x, (5, 4))


def test_patches_are_in_the_backbones_order():
    net = vit()
    x = torch.zeros(1, 3, 16, 16)
    x[:, :, 4:8, 8:12] = 1  # patch 6 of 4 x 4
    tokens = net.model.patch_embed(x).flatten(1, 2)[0]
    (odd,) = (tokens - tokens[0]).abs().sum(1).nonzero().flatten().tolist()
    assert odd == 6
    assert patchify(x, net.patch)[0].sum(1).nonzero().flatten().tolist() == [6]


def test_positions_are_sines_and_cosines_of_rows_and_columns():
    table = sine_positions(3, 5, 12)
    for r in range(3):
        for c in range(5):
            omega = [10000 ** (-i / 3) for i in range(3)]
            parts = [f(n * w) for n in (r, c) for f in (math.sin, math.cos) for w in omega]
            torch.testing.assert_close(table[5 * r + c], torch.tensor(parts))
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sine_positions(3, 5, 6)


# The loss


def literal(predicted, images, mask, patch):
    """L of predictions by loops over masked patches and their pixels."""
    errors = []
    for b, k in mask.nonzero().tolist():
        r, c = divmod(k, images.shape[3] // patch)
        square = images[b, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
        numbers = [
            square[ch, i, j].item() for i in range(patch) for j in range(patch) for ch in range(3)
        ]
        mean = sum(numbers) / len(numbers)
        var = sum((v - mean) ** 2 for v in numbers) / len(numbers)
        target = [(v - mean) / math.sqrt(var + 1e-6) for v in numbers]
        found = predicted[b, k].tolist()
        errors.append(sum((y - t) ** 2 for y, t in zip(found, target, strict=True)) / len(numbers))
    return sum(errors) / len(errors)


def some_mask():
    mask = torch.zeros(2, 4, dtype=torch.float64)
    mask[0, [0, 2, 3]] = 1
    mask[1, [0, 1, 2]] = 1
    return mask


def test_is_its_formula():
    images, predicted, mask = normals(2, 3, 8, 8), normals(2, 4, 48, seed=1), some_mask()
    target = standardized(patchify(images, (4, 4)))[0]
    expected = literal(predicted, images, mask, 4)
    assert masked_error(predicted, target, mask).item() == pytest.approx(expected, rel=1e-12)


def test_only_masked_patches_count():
    images, predicted, mask = normals(2, 3, 8, 8), normals(2, 4, 48, seed=1), some_mask()
    target = standardized(patchify(images, (4, 4)))[0]
    predicted.requires_grad_()
    loss = masked_error(predicted, target, mask)
    loss.backward()
    assert (predicted.grad.abs().sum(2) > 0).equal(mask.bool())
    other = torch.where(mask[..., None].bool(), predicted, 100 * predicted)
    assert torch.equal(masked_error(other, target, mask), loss)


def test_predicting_the_mean_of_every_patch_costs_one():
    """With the variance of n - 1 it is 47 / 48."""
    patches = 3 + 5 * patchify(normals(2, 3, 8, 8), (4, 4))
    target, mean, std = standardized(patches)
    loss = masked_error(torch.zeros_like(target), target, some_mask())
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(target * std + mean, patches)
    target, mean, std = standardized(patches, unbiased=True)  # the official code
    loss = masked_error(torch.zeros_like(target), target, some_mask())
    assert loss.item() == pytest.approx(47 / 48, abs=1e-6)
    torch.testing.assert_close(target * std + mean, patches)
    flat = standardized(torch.full((1, 1, 48), 0.7))[0]
    assert flat.abs().max() < 1e-3  # a patch of one colour


def test_half_precision_is_raised():
    target = standardized(patchify(normals(2, 3, 8, 8).float(), (4, 4)))[0]
    predicted = normals(2, 4, 48, seed=1).bfloat16()
    found = masked_error(predicted, target, some_mask().float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, masked_error(predicted.float(), target, some_mask().float()))


# Masks


@pytest.mark.parametrize(("ratio", "masked"), [(0.75, 12), (0.5, 8), (0.6, 10), (0.9, 14)])
def test_exactly_the_share_of_every_images_patches_is_masked_differently(ratio, masked):
    method = mae(ratio=ratio)
    _, _, mask, _ = method.fill_in({"views": [torch.randn(6, 3, 16, 16)]})
    assert mask.unique().tolist() == [0.0, 1.0]
    assert mask.sum(1).tolist() == [masked] * 6
    assert len(mask.unique(dim=0)) > 1
    again = method.fill_in({"views": [torch.randn(6, 3, 16, 16)]})[2]
    assert torch.equal(mask, again)  # a function of seed and step
    method.step = 1
    assert not torch.equal(mask, method.fill_in({"views": [torch.randn(6, 3, 16, 16)]})[2])


def test_every_patch_is_masked_as_often():
    method, shares = mae(), torch.zeros(16)
    for step in range(40):
        method.step = step
        order = method.draws("mask", 16).permutations(16)
        shares += torch.ones(16, 16).scatter(1, order[:, :4], 0).mean(0) / 40
    assert (shares - 0.75).abs().max() < 0.06


class Recorder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x.detach())
        return self.inner(x)


def test_the_encoder_computes_visible_tokens_only():
    method = mae()
    model = method.backbone.model
    model.blocks[0] = recorder = Recorder(model.blocks[0])
    x = torch.randn(3, 3, 16, 16)
    _, _, mask, _ = method.fill_in({"views": [x]})
    (tokens,) = recorder.seen
    assert tokens.shape == (3, 1 + 4, 192)
    own = method.backbone.to_own(x)
    whole = model.patch_embed(own).flatten(1, 2) + sine_positions(4, 4, 192)
    kept = method.draws("mask", 3).permutations(16)[:, :4]
    for b in range(3):
        torch.testing.assert_close(tokens[b, 1:], whole[b, kept[b]])
        assert mask[b, kept[b]].sum() == 0
    torch.testing.assert_close(tokens[:, :1], model.cls_token.expand(3, -1, -1))
    assert not model.patch_drop._forward_hooks  # and evaluations see all patches
    method.backbone(x)
    assert recorder.seen[-1].shape[1] == 17


def test_nothing_of_masked_patches_reaches_predictions():
    method = mae().eval()
    x = torch.randn(2, 3, 16, 16)
    patches, predicted, mask, features = method.fill_in({"views": [x]})
    other = torch.where(mask[..., None].bool(), torch.randn_like(patches), patches)
    y = unpatchify(other, (4, 4), 4)
    assert not torch.equal(x, y)
    _, same, _, h = method.fill_in({"views": [y]})
    assert torch.equal(predicted, same)
    assert torch.equal(features, h)


def test_the_decoder_puts_tokens_back_and_knows_where_patches_are():
    torch.manual_seed(0)
    decoder = PatchDecoder(8, 1, dim=16, depth=1, heads=2, outputs=5)
    seen = []
    decoder.blocks = Recorder(decoder.blocks)
    tokens, order = torch.randn(3, 1 + 2, 8), Draws(0, rows=3).permutations(6)
    out = decoder(tokens, order, 2)
    assert out.shape == (3, 6, 5)
    (seen,) = decoder.blocks.seen
    for b in range(3):
        for k in range(6):
            place = order[b].tolist().index(k)
            own = decoder.embed(tokens[b, 1 + place]) if place < 2 else decoder.mask_token[0, 0]
            torch.testing.assert_close(seen[b, 1 + k], own + sine_positions(2, 3, 16)[k])
    # Without positions masked patches of an image would all be predicted alike.
    hidden = out[0, order[0, 2:]]
    assert (hidden - hidden[0]).abs().amax(1)[1:].min() > 1e-4


def test_a_sparse_image_trains_all_weights_of_both_networks():
    method = mae()
    method.loss({"views": [torch.randn(2, 3, 16, 16)]})["reconstruction"].backward()
    assert all(p.grad is not None for p in method.parameters())
    assert method.seen["features"].shape == (2, 192)


# Encoder and decoder as the paper has them


def test_fixed_positions_are_constants_and_own_ones_learn():
    fixed, own = mae(), mae(positions="own")
    assert "model.pos_embed" not in dict(fixed.backbone.named_parameters())
    assert "model.pos_embed" in dict(own.backbone.named_parameters())
    table = fixed.backbone.model.pos_embed
    assert torch.equal(table[0, 1:], sine_positions(4, 4, 192))
    assert not table[0, 0].any()
    # A backbone that is built anew takes these weights.
    other = timm("vit_tiny_patch16_224", image_size=16, patch_size=4, dynamic=True)
    del other.model.blocks[2:]
    other.load_state_dict(fixed.backbone.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(other.eval()(x), fixed.backbone.eval()(x))
    assert fixed.backbone.stages(x)["stage2"].shape == (2, 192, 4, 4)


def test_glorots_weights_are_drawn_for_patch_embeddings_as_linear_layers():
    net, kept = mae().backbone.model, mae(glorot=False).backbone.model
    for layer, fan in ((net.patch_embed.proj, 48 + 192), (net.blocks[0].mlp.fc1, 5 * 192)):
        bound = math.sqrt(6 / fan)
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert not layer.bias.any()
    assert kept.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    layer = nn.Conv2d(2, 3, 4)
    initialize(layer)
    assert layer.weight.shape == (3, 2, 4, 4)


@pytest.mark.parametrize("name", ["vit_base", "vit_small", "vit_tiny_small_image"])
def test_fits_the_vision_transformers_of_the_tree(name):
    node = OmegaConf.to_container(OmegaConf.load(CONF / f"backbone/{name}.yaml"))
    with torch.device("meta"):
        net = load.fresh(node)
        method = MAE(net, nn.Identity(), None, depth=1)
        side = 32 if "small_image" in name else 224
        patch = 4 if side == 32 else 16
        x = torch.zeros(2, 3, side, side)
        patches, predicted, _, features = method.fill_in({"views": [x]})
    count = (side // patch) ** 2
    assert patches.shape == predicted.shape == (2, count, 3 * patch**2)
    assert features.shape == (2, net.dim)
    assert method.decoder.embed.out_features == 512


def test_other_sizes_than_the_backbones_own_are_filled_in():
    method = mae()
    patches, predicted, mask, _ = method.fill_in({"views": [torch.randn(2, 3, 24, 20)]})
    assert patches.shape == predicted.shape == (2, 30, 48)
    assert mask.sum(1).tolist() == [22, 22]  # round(22.5) is even


def test_learns_to_fill_in_what_can_be_known():
    """Images of one orientation of stripes: what is masked follows from what is not."""
    method = mae(dim=32)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3, betas=(0.9, 0.95))

    def batch(step):
        method.step = step
        draws = Draws(step, "stripes", rows=32)
        phase, turned = draws.uniform()[:, None] * 6.28, draws.chance(0.5)
        wave = (torch.arange(16) * 1.6 + phase).sin()[:, None, None, :].expand(-1, 3, 16, -1)
        x = torch.where(turned[:, None, None, None], wave.mT, wave)
        return {"views": [x.contiguous()], "index": torch.arange(32)}

    for step in range(150):
        loss = method.loss(batch(step))["reconstruction"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = method.measure(batch(1000), 0)["reconstruction"].item()
    assert held_out < 0.5  # 1: patches' means; one orientation for all: about 1 too


# Pictures, values, recipe


def test_pictures_paste_visible_patches_and_undo_the_normalisation(tiny):
    method, *rest = tiny("mae")
    batch = batch_of(method, *rest)
    columns = method.pictures(batch)
    assert list(columns) == ["masked", "filled in", "image"]
    truth = denormalize(batch["views"][0])
    torch.testing.assert_close(columns["image"], truth)
    patches, predicted, mask, _ = method.fill_in(batch)
    masked, filled, shown = (patchify(x, method.patch) for x in columns.values())
    hidden = mask.bool()
    for b in range(len(truth)):
        torch.testing.assert_close(filled[b, ~hidden[b]], shown[b, ~hidden[b]])
        torch.testing.assert_close(masked[b, ~hidden[b]], shown[b, ~hidden[b]])
        assert len(masked[b, hidden[b]].unique()) <= 3  # one colour
    k = int(hidden[0].nonzero()[0])
    own = patches[0, k]
    expected = predicted[0, k] * own.std(correction=0) + own.mean()
    again = patchify(columns["filled in"][:1], method.patch)[0, k].view(-1, 3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(again, expected.view(-1, 3) * std + mean, rtol=1e-3, atol=1e-3)
    method.normalize = False
    plain = patchify(method.pictures(batch)["filled in"][:1], method.patch)[0, k].view(-1, 3)
    torch.testing.assert_close(plain, predicted[0, k].view(-1, 3) * std + mean)


def test_plain_pixels_are_an_option():
    method = mae(normalize=False)
    batch = {"views": [torch.randn(2, 3, 16, 16)]}
    patches, predicted, mask, _ = method.fill_in(batch)
    expected = masked_error(predicted, patches, mask)
    torch.testing.assert_close(method.loss(batch)["reconstruction"], expected)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"ratio": 1.0}, r"in \(0, 1\), got 1.0"),
        ({"positions": "learned"}, "positions must be fixed or own, got 'learned'"),
        ({"dim": 18, "heads": 4}, "dim=18 is not a multiple of heads=4"),
    ],
)
def test_bad_values_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        mae(**options)


def test_other_backbones_and_pretrained_weights_are_refused():
    net = nn.Linear(3, 4)
    net.dim = 4
    with pytest.raises(ValueError, match=r"Linear is no vision transformer.*backbone=vit_base"):
        MAE(net, nn.Identity(), None)
    net = vit()
    net.config = {**net.config, "pretrained": True}
    with pytest.raises(ValueError, match=r"glorot=false method.positions=own"):
        MAE(net, nn.Identity(), None, **SMALL)
    before = net.model.blocks[0].mlp.fc1.weight.clone()
    MAE(net, nn.Identity(), None, **SMALL, glorot=False, positions="own")
    assert torch.equal(net.model.blocks[0].mlp.fc1.weight, before)
    with pytest.raises(ValueError, match=r"ratio=0.01 masks 0 of 16 patches"):
        mae(ratio=0.01).loss({"views": [torch.zeros(1, 3, 16, 16)]})


def test_the_official_codes_variance_is_a_setting():
    batch = {"views": [normals(2, 3, 16, 16).float()]}
    for unbiased in (False, True):
        method = mae(unbiased=unbiased)
        patches, predicted, mask, _ = method.fill_in(batch)
        expected = masked_error(predicted, standardized(patches, unbiased)[0], mask)
        assert torch.equal(method.loss(batch)["reconstruction"], expected)


def test_the_recipe_is_the_papers(compose):
    cfg = compose("experiment=imagenet/mae")
    method, optim = cfg.method, cfg.method.optim
    assert (method.ratio, method.dim, method.depth, method.normalize) == (0.75, 512, 8, True)
    assert (optim.lr, optim.scaling, optim.reference_batch) == (1.5e-4, "linear", 256)
    assert (optim.weight_decay, list(optim.optimizer.betas)) == (0.05, [0.9, 0.95])
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (4096, 800)
    assert optim.warmup * cfg.trainer.max_epochs == 40
    assert list(cfg.decode.scale) == [0.2, 1.0]
    assert cfg.decode.count == 1
    assert list(cfg.method.augment.chains.view) == ["flip"]
    assert cfg.method.augment._target_.endswith(Views.__name__)


# Processes


class Eight(MAE):
    def __init__(self):
        super().__init__(vit(depth=1), nn.Identity(), None, **SMALL)


def measured():
    """The loss of this process's rows of 12, and its gradient."""
    torch.manual_seed(0)
    method = Eight().double()
    x = mine(normals(12, 3, 16, 16))
    assert len(x) * world_size() == 12
    assert rank() < world_size()
    weight = method.backbone.model.patch_embed.proj

    def loss(w):
        del weight.weight
        weight.weight = w
        return method.loss({"views": [x]})["reconstruction"]

    return value_and_gradient(loss, weight.weight.detach().clone())


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_are_one(world):
    alone = measured()
    for found in on_processes(world, measured):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)
