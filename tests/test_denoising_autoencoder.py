"""Denoising autoencoders: their noise, corruptions, decoders and losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_papers import batch_of
from torch import nn

from unlabeled.augment.corruption import Corrupted, Gaussian, Masking, SaltAndPepper
from unlabeled.augment.noise import normal, splitmix, uniform
from unlabeled.augment.views import Views
from unlabeled.batch import MEAN, STD, denormalize, normalize
from unlabeled.draws import Draws
from unlabeled.methods.denoising_autoencoder import reconstruction_loss
from unlabeled.parts.bottleneck import Channelwise, bottleneck
from unlabeled.parts.decoder import Decoder, last_map
from unlabeled.parts.pixels import explained, normalized, pixels

CPU = torch.device("cpu")


def pictures(count=6, side=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=generator).to(dtype)


def crops(count=6, side=16):
    return {"crops": [(pictures(count, side) * 255).round().to(torch.uint8)]}


# Noise.


def literal(seed, count):
    """SplitMix64 in Python's integers, as its authors write it."""
    state, found = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


def test_the_generator_is_splitmix():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert literal(1234567, 3) == known
    keys = [1234567, 0, 2**63 - 1]
    found = splitmix(torch.tensor(keys), 50)
    for row, key in zip(found.tolist(), keys, strict=True):
        assert [x % 2**64 for x in row] == literal(key, 50)


def test_noise_has_its_distribution_and_no_two_images_share_it():
    u = uniform(Draws(0, "x", rows=8), CPU, 3, 100, 100)
    assert u.shape == (8, 3, 100, 100)
    assert u.dtype == torch.float32
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    shares = torch.histc(u, 20, 0, 1) / u.numel()
    assert (shares - 0.05).abs().max() < 1.8e-3  # four standard deviations
    n = normal(Draws(0, "x", rows=8), CPU, 3, 100, 101)
    for power, expected in enumerate((0.0, 1.0, 0.0, 3.0), 1):
        assert n.pow(power).mean().item() == pytest.approx(expected, abs=0.05)
    for x in (u - 0.5, n):
        rows = F.normalize(x.flatten(1), dim=1)
        assert ((rows @ rows.T).fill_diagonal_(0).abs() < 0.03).all()  # images
        near = torch.corrcoef(torch.stack([x[..., 1:].flatten(), x[..., :-1].flatten()]))
        assert near[0, 1].abs() < 0.01  # neighbours
    assert normal(Draws(0, rows=2), CPU, 5).shape == (2, 5)


@pytest.mark.parametrize("make", [uniform, normal])
def test_noise_depends_on_the_key_alone(make):
    whole = make(Draws(0, "x", 3, rows=6), CPU, 7)
    parts = [make(Draws(0, "x", 3, rows=2, rank=r, world=3), CPU, 7) for r in range(3)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, make(Draws(0, "x", 4, rows=6), CPU, 7))


# Corruptions.


def per_channel(values):
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def test_the_identity_network_pays_the_variance_of_the_noise():
    """And nothing if the target is, wrongly, the noisy image."""
    module = Corrupted(Views([[]]), Gaussian(sigma=0.25))
    batch = module(crops(32, 32), Draws(0, rows=32))
    (noisy,), clean = batch["views"], batch["target"]
    paid = (noisy.double() - clean).square().mean((0, 2, 3))
    torch.testing.assert_close(
        paid, 0.25**2 / per_channel(STD).flatten().square(), rtol=0.02, atol=0
    )
    assert reconstruction_loss(noisy, clean, "l2").item() == pytest.approx(paid.mean().item())
    assert reconstruction_loss(noisy, noisy, "l2") == 0
    assert torch.equal(clean, normalize(crops(32, 32)["crops"][0]))


@pytest.mark.parametrize("nothing", [Gaussian(sigma=0), Masking(p=0), SaltAndPepper(p=0)])
def test_no_corruption_leaves_an_autoencoder(nothing):
    x = normalize(pictures())
    assert torch.equal(nothing(x, Draws(0, rows=len(x))), x)


@pytest.mark.parametrize("corruption", [Gaussian(), Masking(p=0.5), SaltAndPepper(p=0.5)])
def test_a_corruption_leaves_the_clean_image_alone(corruption):
    x = normalize(pictures())
    before = x.clone()
    assert not torch.equal(corruption(x, Draws(0, rows=len(x))), x)
    assert torch.equal(x, before)


def test_pixels_and_patches_are_hidden_as_a_whole():
    x = normalize(pictures(64, 22))
    for patch, share in ((1, 0.25), (4, 0.5)):
        hidden = Masking(p=share, patch=patch)(x, Draws(0, rows=64)) != x
        assert torch.equal(hidden[:, :1].expand_as(hidden), hidden)  # all channels
        assert hidden.float().mean().item() == pytest.approx(share, abs=0.05)
        for top in range(0, 22, patch):  # the last row of patches is cut
            for left in range(0, 22, patch):
                cell = hidden[:, 0, top : top + patch, left : left + patch].flatten(1)
                assert torch.equal(cell.all(1), cell.any(1))
    assert (Masking(p=1.0)(x, Draws(0, rows=64)) != x).all()


def test_what_hides_is_black_the_mean_or_noise():
    x = normalize(pictures(8, 20) * 0.5 + 0.25)
    made = {
        fill: Masking(p=0.5, fill=fill)(x, Draws(0, rows=8)) for fill in ("black", "mean", "noise")
    }
    hidden = made["mean"] != x
    assert all(torch.equal(y[~hidden], x[~hidden]) for y in made.values())
    assert denormalize(made["black"])[hidden].abs().max() < 1e-6
    assert (made["mean"][hidden] == 0).all()
    assert (made["black"][hidden] != 0).all()  # not what padding with zeros looks like
    noise = denormalize(made["noise"])[hidden]
    assert noise.min() > -1e-6
    assert noise.max() < 1 + 1e-6
    assert noise.mean().item() == pytest.approx(0.5, abs=0.02)
    assert len(noise.unique()) > 1000


def test_salt_and_pepper_are_as_frequent():
    x = normalize(pictures(32, 32) * 0.5 + 0.25)
    y = denormalize(SaltAndPepper(p=0.3)(x, Draws(0, rows=32)))
    white, black = ((y - value).abs().amax(1) < 1e-5 for value in (1, 0))
    assert white.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert black.float().mean().item() == pytest.approx(0.15, abs=0.01)
    kept = ~(white | black)[:, None].expand_as(y)
    torch.testing.assert_close(y[kept], denormalize(x)[kept])


def test_a_corruption_takes_one_view():
    with pytest.raises(ValueError, match="takes one view, `base` gave 2"):
        Corrupted(Views([[]], repeat=[2]), Gaussian())(
            {"crops": crops()["crops"] * 2}, Draws(0, rows=6)
        )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Gaussian(sigma=-1), "sigma must not be negative, got -1"),
        (lambda: Masking(p=1.5), "p is a probability"),
        (lambda: Masking(patch=0), "patch must be at least 1 pixel, got 0"),
        (lambda: Masking(fill="grey"), "fill must be black, mean or noise, got 'grey'"),
        (lambda: SaltAndPepper(p=-0.1), "p is a probability"),
        (lambda: Decoder(8, widths=[]), "widths must be positive"),
        (lambda: Decoder(8, widths=[4], up="crop"), "up must be resize or transposed, got 'crop'"),
        (lambda: Decoder(8, widths=[4], output="x"), "output must be linear or tanh, got 'x'"),
        (lambda: Decoder(8, widths=[4], norm="x"), "norm must be batch, sync or none, got 'x'"),
        (lambda: Decoder(8, widths=[4], bottleneck="x"), "bottleneck must be map, .*got 'x'"),
        (lambda: Decoder(8, widths=[4], bottleneck="pooled", side=0), "got 0 and 256"),
    ],
)
def test_bad_values_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_bad_distances_are_named(tiny):
    with pytest.raises(Exception, match="distance must be l2 or bce, got 'l1'"):
        tiny("denoising_autoencoder", "method.distance=l1")
    with pytest.raises(Exception, match="distance=bce reads logits"):
        tiny("denoising_autoencoder", "method.distance=bce", "method.decoder.output=tanh")


# Losses.


def test_losses_are_their_formulas():
    x = normalize(pictures(2, 4, dtype=torch.float64))
    made = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    squares, entropies = [], []
    for index, value in enumerate(x.flatten().tolist()):
        y = made.flatten()[index].item()
        squares.append((y - value) ** 2)
        channel = index // 16 % 3
        p, s = value * STD[channel] + MEAN[channel], 1 / (1 + math.exp(-y))
        entropies.append(-p * math.log(s) - (1 - p) * math.log(1 - s))
    for kind, values in (("l2", squares), ("bce", entropies)):
        expected = sum(values) / len(values)
        assert reconstruction_loss(made, x, kind).item() == pytest.approx(expected, rel=1e-9)
        low = reconstruction_loss(made.bfloat16(), x.float(), kind)
        assert low.dtype == torch.float32
        assert low.item() == pytest.approx(expected, rel=1e-2)


def test_bce_is_least_where_the_sigmoid_is_the_pixel():
    """Targets that are normalised, beyond [0, 1], would push the sigmoid to its ends."""
    x = normalize(torch.tensor([0.02, 0.5, 0.98]).view(3, 1, 1, 1).expand(3, 3, 2, 2))
    logits = torch.zeros(3, 3, 2, 2, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=400.0)
    for _ in range(300):
        optimizer.zero_grad()
        reconstruction_loss(logits, x, "bce").backward()
        optimizer.step()
    torch.testing.assert_close(logits.detach().sigmoid(), pixels(x), rtol=0, atol=2e-3)


def test_the_best_network_is_the_mean_of_what_may_have_been():
    a, b = -0.4, 0.8
    clean = torch.where(torch.rand(2**16, generator=torch.Generator().manual_seed(0)) < 0.5, a, b)
    clean = clean.double().view(16, 1, 64, 64).expand(16, 3, 64, 64)
    noise = Gaussian(sigma=0.1)

    def loss(network, scale):
        noise.sigma = scale
        made = noise(clean, Draws(0, rows=16))
        return reconstruction_loss(network(made), clean, "l2").item()

    # huge sigma: nothing better than the constant
    best = loss(lambda x: torch.full_like(x, (a + b) / 2), 1e3)
    assert best == pytest.approx((a - b) ** 2 / 4, rel=1e-6)
    assert all(loss(lambda x, c=c: torch.full_like(x, c), 1e3) > best for c in (0.1, 0.3))

    def posterior(scale, bent=1.0):
        variance = (scale / per_channel(STD)) ** 2

        def network(x):
            odds = bent * ((x - a) ** 2 - (x - b) ** 2) / (2 * variance)
            return a + (b - a) * odds.sigmoid()

        return network

    for scale in (0.05, 0.2):
        least = loss(posterior(scale), scale)
        assert least < loss(lambda x: x, scale)
        assert least < loss(posterior(scale, 0.5), scale)
        assert least < loss(posterior(scale, 2.0), scale)


def test_what_is_explained_is_1_for_the_truth_and_0_for_the_mean():
    x = normalize(pictures())
    mask = torch.ones(1)
    assert explained(x, x, mask) == 1
    assert explained(torch.zeros_like(x), x, mask) == 0
    assert explained(x / 2, x, mask).item() == pytest.approx(0.75)


def test_pixels_and_back():
    x = pictures(dtype=torch.float64)
    torch.testing.assert_close(normalized(x), normalize(x))
    torch.testing.assert_close(pixels(normalize(x)), x)


# Decoders.


@pytest.mark.parametrize("up", ["resize", "transposed"])
@pytest.mark.parametrize("kind", ["map", "pooled", "channelwise", "dense"])
def test_a_decoder_reaches_the_images_size(up, kind):
    h = torch.randn(2, 12, 3, 3)
    decoder = Decoder(12, widths=[8, 4], up=up, bottleneck=kind, side=3, units=5)
    assert decoder.last(decoder.blocks(decoder.bottleneck(h))).shape == (2, 3, 24, 24)
    for size in (24, 27):
        assert decoder(h, size).shape == (2, 3, size, size)
    decoder(h, 24).sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_a_pooled_bottleneck_passes_what_evaluations_read_and_no_more():
    h = torch.randn(4, 12, 3, 3)
    decoder = Decoder(12, widths=[8], bottleneck="pooled", side=2, units=5).eval()
    turned = h.flatten(2)[..., torch.randperm(9)].view(h.shape)
    torch.testing.assert_close(decoder(h, 8), decoder(turned, 8))
    assert not torch.allclose(decoder(h, 8), decoder(h + 1, 8))


def test_a_channelwise_layer_connects_positions_and_no_channels():
    layer = Channelwise(3, 2).double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    out = layer(x)
    for b in range(2):
        for c in range(3):
            for i in range(4):
                at = sum(
                    layer.weight[c, i, j].item() * x[b, c].flatten()[j].item() for j in range(4)
                )
                expected = max(0.0, at + layer.bias[c, i].item())
                assert out[b, c].flatten()[i].item() == pytest.approx(expected, abs=1e-12)
    other = x.clone()
    other[:, 0] += 1
    assert torch.equal(layer(other)[:, 1:], out[:, 1:])
    assert sum(p.numel() for p in layer.parameters()) == 3 * 4 * 5


def test_a_bottleneck_brings_larger_maps_to_its_side():
    module, channels = bottleneck("channelwise", 4, side=6, units=1, norm="batch")
    assert channels == 4
    assert module(torch.randn(2, 4, 13, 13)).shape == (2, 4, 6, 6)
    pooled = module[0](torch.arange(169.0).view(1, 1, 13, 13))
    assert torch.equal(pooled, F.max_pool2d(torch.arange(169.0).view(1, 1, 13, 13), 3, 2))  # pool5


def test_tanh_spans_the_pixels_and_nothing_else():
    decoder = Decoder(12, widths=[8], output="tanh")
    with torch.no_grad():
        decoder.last[-1].weight.mul_(50)
        made = denormalize(decoder(torch.randn(4, 12, 2, 2), 8))
    assert -1e-6 < made.min() < 0.01
    assert 0.99 < made.max() < 1 + 1e-6


def test_dcgans_start():
    torch.manual_seed(0)
    decoder = Decoder(64, widths=[64, 64], bottleneck="dense", side=4, units=100, init_std=0.02)
    convs = [m for m in decoder.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convs) == 5
    for conv in convs:
        assert conv.bias is None
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    norms = [m for m in decoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(abs(m.weight.mean().item() - 1) < 0.01 and not m.bias.any() for m in norms)


# The method.


@pytest.mark.parametrize("distance", ["l2", "bce"])
def test_the_loss_is_of_the_last_map_alone_against_the_clean_image(tiny, distance):
    method, *rest = tiny("denoising_autoencoder", f"method.distance={distance}")
    batch = batch_of(method, *rest)
    method.note = lambda *args: None  # there is no trainer
    (x,), clean = batch["views"], batch["target"]
    assert not torch.equal(x, clean)
    method.eval()
    found = method.loss(batch)["reconstruction"]
    h = last_map(method.backbone, x)
    assert h.shape[1:] == (method.backbone.dim, 2, 2)
    torch.testing.assert_close(
        found, reconstruction_loss(method.decoder(h, x.shape[-1]), clean, distance)
    )
    torch.testing.assert_close(method.seen["features"], method.backbone(x))
    columns = method.pictures(batch)
    assert list(columns) == ["corrupted", "restored", "truth"]
    for column in columns.values():
        assert column.shape == x.shape
        assert column.min() >= 0
        assert column.max() <= 1
    torch.testing.assert_close(columns["truth"], denormalize(clean).clamp(0, 1))


def test_without_noise_the_loss_is_an_autoencoders(tiny):
    method, *rest = tiny("denoising_autoencoder", "method.augment.corruption.p=0")
    batch = batch_of(method, *rest)
    method.note = lambda *args: None  # there is no trainer
    method.eval()
    x = batch["target"]
    expected = F.mse_loss(method.decoder(last_map(method.backbone, x), x.shape[-1]), x)
    torch.testing.assert_close(method.loss(batch)["reconstruction"], expected)


def test_what_is_explained_is_noted(tiny):
    method, data, trainer = tiny("denoising_autoencoder")
    trainer.fit(method, data)
    batch = method.augmented(next(iter(data.unseen(16))), 0)
    found = method.measure(batch, 0)
    assert set(found) == {"reconstruction", "explained"}
    error = found["reconstruction"] / batch["target"].square().mean()
    torch.testing.assert_close(found["explained"], 1 - error)


def test_it_learns_to_restore_images_that_it_has_not_seen(tiny):
    """The mean colour would explain nothing."""
    few = ["data.limit=512", "data.batch_size=32", "trainer.max_epochs=5"]
    method, data, trainer = tiny("denoising_autoencoder", *few)
    batch = next(iter(data.unseen(64)))
    assert method.measure(method.augmented(batch, 0), 0)["explained"] < 0.1
    trainer.fit(method, data)
    assert method.measure(method.augmented(batch, 0), 0)["explained"] > 0.4
