"""Colourisation: Lab, bins, codes, rarity, decoding, both objectives, and processes against one."""

import importlib.util
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from processes import on_processes, value_and_gradient
from torch import nn

from unlabeled.augment.colors import Colors
from unlabeled.batch import denormalize
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.lab import AB, lab_to_rgb, rgb_to_lab
from unlabeled.methods.colorization import Colorization
from unlabeled.optim import Optim
from unlabeled.parts.colors import (
    FILE,
    ColorBins,
    annealed_mean,
    centres,
    rarity,
    regression_loss,
    soft_codes,
    soft_cross_entropy,
)
from unlabeled.parts.map_head import MapHead, channels

ROWS = {  # a of the published bins -> their least and largest b
    **{-90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100)},
    **{-40: (-40, 100), -30: (-50, 100), -20: (-50, 100), -10: (-60, 100), 0: (-70, 100)},
    **{10: (-80, 90), 20: (-80, 90), 30: (-90, 90), 40: (-100, 90), 50: (-100, 80)},
    **{60: (-110, 80), 70: (-110, 80), 80: (-110, 70), 90: (-110, 70), 100: (-90, 0)},
}


def uniform(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def colours(*shape, seed=0):
    return (uniform(*shape, seed=seed) - 0.5) * 120


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bins", ROOT / "scripts/make_color_bins.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bins"] = module
    spec.loader.exec_module(module)
    return module


# Lab.


def literal_lab(r, g, b):
    """One sRGB colour under D65, step by step."""
    lin = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in (r, g, b)]
    rows = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169]]
    rows.append([0.019334, 0.119193, 0.950227])
    f = []
    for row, white in zip(rows, (0.95047, 1.0, 1.08883), strict=True):
        t = sum(m * c for m, c in zip(row, lin, strict=True)) / white
        f.append(t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116)
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


def test_lab_is_its_formula():
    x = uniform(2, 3, 4, 5)
    x[0, :, 0] *= 0.03  # dark: where curves are lines
    found = rgb_to_lab(x)
    for i in range(2):
        for h in range(4):
            for w in range(5):
                truth = literal_lab(*x[i, :, h, w].tolist())
                assert found[i, :, h, w].tolist() == pytest.approx(truth, abs=1e-9)


def test_lab_is_scikit_images():
    color = pytest.importorskip("skimage.color", reason="an optional package")
    x = uniform(3, 9, 9, dtype=torch.float32)
    theirs = color.rgb2lab(x.permute(1, 2, 0).numpy())
    assert np.abs(rgb_to_lab(x).permute(1, 2, 0).numpy() - theirs).max() < 1e-3


def test_known_colours():
    x = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).double().T[:, :, None]
    known = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18]]
    known.append([32.30, 79.19, -107.86])
    torch.testing.assert_close(
        rgb_to_lab(x)[:, :, 0].T, torch.tensor(known).double(), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(dtype):
    x = uniform(4, 3, 32, 32, dtype=dtype)
    x[0] *= 0.02
    lab = rgb_to_lab(x)
    back = lab_to_rgb(lab)
    assert (back - x).abs().max() < 1e-4
    assert (rgb_to_lab(back) - lab).abs().max() < 1e-2


def test_every_colour_is_in_range_and_grey_has_none():
    v = torch.linspace(0, 1, 18)
    cube = torch.stack(torch.meshgrid(v, v, v, indexing="ij")).flatten(2)
    lab = rgb_to_lab(cube)
    assert 95 < lab[1:].abs().max() < AB
    assert lab[0].min() > -1e-3
    assert lab[0].max() < 100.01
    grey = rgb_to_lab(v.expand(3, 1, 18))
    assert grey[1:].abs().max() < 1e-2
    assert lab_to_rgb(torch.tensor([50.0, 100.0, -100.0]).view(3, 1, 1)).isfinite().all()
    beyond = lab_to_rgb(torch.tensor([[5.0], [0.0], [110.0]])[..., None])
    assert beyond.min() >= 0
    assert beyond.max() <= 1


def test_gradients_are_finite_at_the_ends():
    x = torch.tensor([[0.0, 1.0]]).expand(3, 2)[..., None].clone().requires_grad_()
    lab_to_rgb(rgb_to_lab(x)).sum().backward()
    assert x.grad.isfinite().all()


# Bins.


def test_the_bins_are_the_published_ones():
    found = {tuple(c) for c in centres(10).int().tolist()}
    assert found == {(a, b) for a, (low, high) in ROWS.items() for b in range(low, high + 1, 10)}
    assert len(found) == 313
    assert [len(centres(s)) for s in (5, 15, 20)] == [1083, 159, 101]


def test_the_file_is_what_the_script_makes(script):
    with np.load(FILE) as file:
        for step in (10, 15, 20):
            assert (script.bins(step) == file[f"bins{step}"]).all()


@pytest.mark.parametrize("step", [5, 10, 15, 20])
def test_bins_are_centres_and_every_colour_lies_among_four(step):
    bins = centres(step)
    assert (bins % step == 0).all()
    assert (bins == 0).all(1).any()  # grey is a centre, no edge
    lab = rgb_to_lab(uniform(3, 60, 60, dtype=torch.float32))
    ab = lab[1:].flatten(1).T
    known = {tuple(c) for c in bins.int().tolist()}
    corners = {
        tuple(c)
        for shift in ((0, 0), (0, 1), (1, 0), (1, 1))
        for c in ((ab.div(step).floor() + torch.tensor(shift)) * step).int().tolist()
    }
    assert corners <= known
    index, _ = soft_codes(lab[None, 1:], bins, 1, 5.0)
    away = (bins[index[0, ..., 0]].permute(2, 0, 1) - lab[1:]).abs().amax()
    assert away <= step / 2 + 1e-3


def test_a_square_meets_a_polygon_or_not(script):
    diamond = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    meets = lambda x, y, side=0.2: script.meets(diamond, np.array([x, y]), np.array([x, y]) + side)  # noqa: E731
    assert meets(0.0, 0.0)
    assert meets(0.45, 0.45)  # cut by an edge
    assert not meets(0.55, 0.55)  # in the bounding box, outside the diamond
    assert not meets(2.0, 0.0)
    assert meets(-3.0, -3.0, 6.0)  # around it


@pytest.mark.parametrize(
    ("name", "said"), [(None, "holds no images"), ("half.png", "half.png cannot be read")]
)
def test_a_folder_that_cannot_be_counted_is_named(
    script, tmp_path, monkeypatch, capsys, name, said
):
    if name is not None:
        (tmp_path / name).write_bytes(b"\x89PNG\r\n")
    out = tmp_path / "new/prior.npy"
    monkeypatch.setattr(sys, "argv", ["x", "--images", str(tmp_path), "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_frequencies_of_a_folder(script, tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8), (128, 128, 128)).save(tmp_path / "a/grey.png")
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "red.png")
    out = tmp_path / "new/prior.npy"
    command = ["x", "--images", str(tmp_path), "--out", str(out), "--bin-size", "20"]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    counts = torch.from_numpy(np.load(out))
    found = {tuple(centres(20)[i].int().tolist()): int(counts[i]) for i in counts.nonzero()[:, 0]}
    assert found == {(0, 0): 4, (80, 60): 2}
    fixed = ColorBins(bin_size=20, prior=str(out))
    before = fixed.frequencies()
    torch.testing.assert_close(before, counts / counts.sum(), atol=1e-6, rtol=1e-6)
    fixed.count(torch.zeros(3, dtype=torch.int64))
    assert torch.equal(fixed.frequencies(), before)
    with pytest.raises(ValueError, match="no frequencies of 313 bins"):
        ColorBins(prior=str(out))
    with pytest.raises(ValueError, match="no file of colour frequencies"):
        ColorBins(prior=str(tmp_path / "none.npy"))


# Soft codes.


def test_soft_codes_are_their_formula():
    bins, ab = centres(10).double(), colours(2, 2, 3, 2)
    index, codes = soft_codes(ab, bins, 10, 5.0)
    for i in range(2):
        for h in range(3):
            for w in range(2):
                d2 = [(ab[i, 0, h, w] - a) ** 2 + (ab[i, 1, h, w] - b) ** 2 for a, b in bins]
                near = sorted(range(len(d2)), key=lambda q: d2[q])[:10]
                weights = [math.exp(-d2[q] / 50) for q in near]
                found = dict(zip(index[i, h, w].tolist(), codes[i, h, w].tolist(), strict=True))
                truth = {q: v / sum(weights) for q, v in zip(near, weights, strict=True)}
                # the 10th nearest may be tied with the 11th on a regular grid
                assert index[i, h, w, 0] == near[0]
                assert sum(abs(found.get(q, 0) - v) for q, v in truth.items()) < 1e-3


def test_a_soft_code_is_a_distribution_with_its_peak_at_the_colour():
    bins = ColorBins()
    ab = bins.bins.T[None, :, :, None]  # every colour on a centre
    index, codes = bins.encode(ab)
    assert codes.shape == (1, 313, 1, 10)
    torch.testing.assert_close(codes.sum(-1), torch.ones(1, 313, 1))
    assert torch.equal(index[0, :, 0, 0], torch.arange(313))
    assert (codes[..., 0] > codes[..., 1]).all()
    assert all(len(set(row)) == 10 for row in index[0, :, 0].tolist())
    assert torch.equal(bins.encode(ab.bfloat16())[0][..., 0], index[..., 0])  # centres are exact


@pytest.mark.parametrize("step", [5, 10, 15, 20])
def test_the_nearest_bin_is_found_on_the_grid_too(step):
    bins = ColorBins(bin_size=step)
    ab = rgb_to_lab(uniform(2, 3, 40, 40, dtype=torch.float32))[:, 1:]
    ab = torch.cat([ab, bins.bins.T[None, :, :40, None].expand(2, 2, 40, 40)])
    assert torch.equal(bins.nearest(ab), bins.encode(ab)[0][..., 0])
    assert bins.nearest(torch.full((1, 2, 1, 1), 500.0)).shape == (1, 1, 1)  # beyond the grid


def test_colours_are_picked_never_averaged(tiny):
    """A checkerboard of two colours at stride 2: the average would be a third."""
    method, *_ = tiny("colorization", "method.stride=2")
    ab = torch.zeros(1, 2, 8, 8)
    ab[:, 0, ::2, ::2], ab[:, 0, 1::2, 1::2] = 60.0, -60.0
    method.train()
    method.log, method._trainer = (lambda *_, **__: None), SimpleNamespace(log_every_n_steps=0)
    method.loss({"views": [torch.zeros(4, 3, 8, 8)], "target": {"ab": ab.expand(4, 2, 8, 8)}})
    counted = method.colors.bins[method.colors.counts > 0]
    assert counted.tolist() == [[60, 0]]
    assert method.colors.counts.sum() == 4 * 16


# Rarity.


def test_weights_have_mean_one_and_are_their_formula():
    p = uniform(313) ** 4
    p[:40] = 0
    p = p / p.sum()
    for mix in (0.1, 0.5, 1.0):
        w = rarity(p, mix)
        raw = [1 / ((1 - mix) * v + mix / 313) for v in p.tolist()]
        mean = sum(v * r for v, r in zip(p.tolist(), raw, strict=True))
        torch.testing.assert_close(w, torch.tensor([r / mean for r in raw]).double())
        assert (p * w).sum().item() == pytest.approx(1)
        assert w.isfinite().all()
    torch.testing.assert_close(rarity(p, 1.0), torch.ones(313).double())
    w = rarity(p, 0.5)
    assert w[0] == w.max()  # what never occurs weighs most
    assert w[p.argmax()] == w.min()


def test_counts_smoothing_and_the_weights_of_a_run():
    bins = ColorBins(mix=0.5)
    torch.testing.assert_close(bins.frequencies(), torch.full((313,), 1 / 313))
    assert bins.weights().isfinite().all()
    nearest = torch.tensor([[5, 5, 7], [5, 5, 5]])
    bins.count(nearest)
    bins.count(nearest[:1])
    truth = torch.zeros(313)
    truth[5], truth[7] = 7 / 9, 2 / 9
    torch.testing.assert_close(bins.frequencies(), truth)
    smooth = torch.zeros(313)
    for q, share in ((5, 7 / 9), (7, 2 / 9)):
        d2 = ((bins.bins - bins.bins[q]) ** 2).sum(1)
        kernel = (-d2 / 50).exp()
        smooth += share * kernel / kernel.sum()
    torch.testing.assert_close(bins.weights(), rarity(smooth, 0.5))
    assert (smooth * bins.weights()).sum().item() == pytest.approx(1, rel=1e-5)


# Decoding.


def test_decoding_goes_from_the_mean_to_the_mode():
    bins, logits = centres(10).double(), uniform(2, 313, 1, 1, seed=1) * 8
    p = logits.softmax(1)[:, :, 0, 0]
    mean = annealed_mean(logits, bins, 1.0)[:, :, 0, 0]
    torch.testing.assert_close(mean, p @ bins)
    mode = annealed_mean(logits, bins, 1e-5)[:, :, 0, 0]
    torch.testing.assert_close(mode, bins[p.argmax(1)], atol=1e-3, rtol=0)
    powers = p ** (1 / 0.38)  # f_T(softmax(z)) = softmax(z / T)
    annealed = annealed_mean(logits, bins, 0.38)[:, :, 0, 0]
    torch.testing.assert_close(annealed, powers / powers.sum(1, keepdim=True) @ bins)


# The losses.


def test_cross_entropy_is_its_formula():
    logits, weight = uniform(2, 313, 2, 3) * 5, uniform(2, 2, 3, seed=2)
    bins, ab = centres(10).double(), colours(2, 2, 2, 3, seed=3)
    index, codes = soft_codes(ab, bins, 10, 5.0)
    total = 0.0
    for i in range(2):
        for h in range(2):
            for w in range(3):
                z = torch.zeros(313).double()
                for q, share in zip(index[i, h, w], codes[i, h, w], strict=True):
                    z[q] += share
                p = logits[i, :, h, w].exp() / logits[i, :, h, w].exp().sum()
                total -= weight[i, h, w] * sum(z[q] * p[q].log() for q in range(313) if z[q] > 0)
    found = soft_cross_entropy(logits, index, codes, weight)
    assert found.item() == pytest.approx(total.item() / 12, rel=1e-9)
    flat = soft_cross_entropy(torch.zeros_like(logits), index, codes, torch.ones_like(weight))
    assert flat.item() == pytest.approx(math.log(313))


def test_regression_is_its_formula():
    ab, truth, weight = uniform(2, 2, 3, 2), uniform(2, 2, 3, 2, seed=1), uniform(2, 3, 2, seed=2)
    total = sum(
        weight[i, h, w] * sum((ab[i, c, h, w] - truth[i, c, h, w]) ** 2 for c in (0, 1)) / 2
        for i in range(2)
        for h in range(3)
        for w in range(2)
    )
    assert regression_loss(ab, truth, weight).item() == pytest.approx(total.item() / 12)


def test_of_two_colours_regression_makes_grey_and_classes_keep_both():
    """The same grey image is red half of the time and green the other half."""
    red, green = (60.0, 0.0), (-60.0, 0.0)
    ab = torch.tensor([red, green]).view(2, 2, 1, 1)
    one = torch.ones(2, 1, 1)
    guess = nn.Parameter(torch.tensor([0.7, -0.3]).view(1, 2, 1, 1))
    optimizer = torch.optim.Adam([guess], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        regression_loss(guess.expand(2, 2, 1, 1), ab / AB, one).backward()
        optimizer.step()
    assert (guess * AB).abs().max() < 1  # grey

    bins = ColorBins(sigma=1.0)  # sharp codes: all but one bin each
    index, codes = bins.encode(ab)
    logits = nn.Parameter(torch.zeros(1, 313, 1, 1))
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        soft_cross_entropy(logits.expand(2, 313, 1, 1), index, codes, one).backward()
        optimizer.step()
    p = logits.softmax(1)[0, :, 0, 0]
    both = index[:, 0, 0, 0]
    assert bins.bins[both].tolist() == [list(red), list(green)]
    torch.testing.assert_close(p[both], torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)
    assert annealed_mean(logits, bins.bins, 1.0).abs().max() < 2  # their mean is grey again
    with torch.no_grad():
        logits[:, both[0]] += (
            0.5  # a hint of red: annealing commits to it where the mean stays dull
        )
    dull = annealed_mean(logits, bins.bins, 1.0)[0, 0, 0, 0]
    vivid = annealed_mean(logits, bins.bins, 0.38)[0, 0, 0, 0]
    assert vivid > 2 * dull > 0


# The method.


def views(crop, **options):
    ops = options.pop("ops", [])
    draws = Draws(0, "augment", 0, rows=len(crop))
    return Colors(ops)({"crops": [crop], "index": torch.arange(len(crop))}, draws)


def test_the_question_has_no_colour_and_the_answer_has_it():
    crop = (uniform(4, 3, 8, 8) * 255).to(torch.uint8)
    batch = views(crop)
    (x,), ab = batch["views"], batch["target"]["ab"]
    light = denormalize(x)
    lab = rgb_to_lab(crop.float() / 255)
    torch.testing.assert_close(light, (lab[:, :1] / 100).expand(4, 3, 8, 8), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ab, lab[:, 1:])
    back = lab_to_rgb(torch.cat([light[:, :1] * 100, ab], 1))
    torch.testing.assert_close(back, crop.float() / 255, atol=1e-3, rtol=0)
    turned = crop.flip(1)  # other colours of nearly the same light: the answer changes
    assert (views(turned)["target"]["ab"] - ab).abs().mean() > 1


def made(**options):
    torch.manual_seed(0)
    from unlabeled.backbones.resnet import ResNet

    method = Colorization(
        ResNet(depth=18, width=16, stem="small", stem_stride=2),
        Colors([]),
        Optim(torch.optim.SGD, lr=0.1),
        **{"width": 16, **options},
    )
    method.log, method._trainer = (lambda *_, **__: None), SimpleNamespace(log_every_n_steps=0)
    return method


def coloured(count=4, side=16, seed=0):
    return views((uniform(count, 3, side, side, seed=seed) * 255).to(torch.uint8))


def test_grey_images_count_nothing():
    method = made(grey=5.0).eval()
    batch = coloured()
    both = dict(batch)
    both["views"] = [batch["views"][0].repeat(2, 1, 1, 1)]
    ab = batch["target"]["ab"]
    both["target"] = {"ab": torch.cat([ab, ab.sign() * 4.9])}
    both["index"] = torch.arange(8)
    alone, mixed = method.loss(batch), method.loss(both)
    torch.testing.assert_close(mixed["classification"], alone["classification"] / 2)
    method.grey = None
    assert method.loss(both)["classification"] > 1.1 * mixed["classification"]
    method.grey = 5.0
    both["target"] = {"ab": torch.zeros_like(both["target"]["ab"])}
    assert method.loss(both)["classification"] == 0


def test_the_loss_of_a_batch_is_made_of_its_parts():
    method = made(bin_size=20, stride=4).train()
    batch = coloured()
    found = method.loss(batch)["classification"]
    method.train()
    ab = batch["target"]["ab"][:, :, [0, 4, 8, 12]][..., [0, 4, 8, 12]]
    logits = method.head(method.backbone.stages(batch["views"][0]), (4, 4))
    index, codes = soft_codes(ab, centres(20), 10, 5.0)
    counts = index[..., 0].flatten().bincount(minlength=101)
    assert torch.equal(method.colors.counts, counts)
    smooth = method.colors.smoothing @ (counts / counts.sum())
    weight = rarity(smooth, 0.5)[index[..., 0]]
    torch.testing.assert_close(found, soft_cross_entropy(logits, index, codes, weight))


def test_counting_stops_outside_of_training():
    method = made()
    method.loss(coloured())
    counts = method.colors.counts.clone()
    assert counts.sum() == 4 * 16
    method.measure(coloured(seed=1), 0)
    assert torch.equal(method.colors.counts, counts)
    method.loss(coloured(seed=1))
    assert method.colors.counts.sum() == 2 * counts.sum()


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_pictures(objective):
    method = made(objective=objective).eval()
    batch = coloured()
    with torch.no_grad():
        shown = method.pictures(batch)
    middle = (
        ["classes, T = 0.38", "classes, mean (T = 1)"]
        if objective == "classification"
        else ["regression"]
    )
    assert list(shown) == ["grey input", *middle, "truth"]
    for x in shown.values():
        assert x.shape == (4, 3, 16, 16)
        assert 0 <= x.min() <= x.max() <= 1
    grey, truth = shown["grey input"], shown["truth"]
    torch.testing.assert_close(grey[:, 0], grey[:, 1], atol=1e-3, rtol=0)
    assert (truth[:, 0] - truth[:, 1]).abs().mean() > 0.1


@pytest.mark.parametrize("objective", ["classification", "regression"])
def test_learns_two_scenes(objective):
    """Bright images are orange, dark ones blue: the answer is in the light."""
    torch.manual_seed(0)
    crop = torch.zeros(16, 3, 16, 16, dtype=torch.uint8)
    crop[:8] = torch.tensor([250, 160, 60], dtype=torch.uint8).view(3, 1, 1)
    crop[8:] = torch.tensor([20, 40, 110], dtype=torch.uint8).view(3, 1, 1)
    crop -= (uniform(16, 1, 16, 16) * 20).to(torch.uint8)
    batch = views(crop)
    method = made(objective=objective, width=32)
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        sum(method.loss(batch).values()).backward()
        optimizer.step()
    found = method.measure(batch, 0)
    assert found["error"] < 15  # grey would be at about 60
    if objective == "classification":
        assert found["accuracy"] > 0.3  # of 313; neighbours share their codes


def test_stages_for_the_head():
    backbone = made().backbone
    assert channels(backbone) == {"conv1": 16, "res2": 16, "res3": 32, "res4": 64, "res5": 128}
    assert backbone.training
    head = MapHead(backbone, 5, width=8, stages=["res3", "res5"])
    assert head(backbone.stages(torch.zeros(2, 3, 32, 32)), (7, 6)).shape == (2, 5, 7, 6)
    for stages, word in (("res9", r"some of \['conv1'"), ("res4", "lack the last, res5")):
        with pytest.raises(ValueError, match=word):
            MapHead(backbone, 5, stages=[stages])


@pytest.mark.parametrize(
    "bad",
    [
        {"objective": "l2"},
        {"bin_size": 7},
        {"neighbours": 0},
        {"neighbours": 314},
        {"sigma": 0.0},
        {"mix": 0.0},
        {"mix": 1.5},
        {"temperature": 0.0},
        {"stride": 0},
        {"width": 0},
        {"stages": []},
    ],
)
def test_bad_values_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        made(**bad)


# Processes.

N = 12


def step():
    """The weighted loss of this process's share, after two batches were counted."""
    rows = slice(rank() * N // world_size(), (rank() + 1) * N // world_size())
    colors = ColorBins(bin_size=20)
    values = []

    def loss(w):
        total = w.new_zeros(())
        for seed in (0, 1):
            ab = colours(N, 2, 3, 3, seed=seed)[rows]
            index, codes = colors.encode(ab)
            colors.count(index[..., 0])
            logits = torch.einsum("bchw,cq->bqhw", ab / 50, w)
            weight = colors.weights().double()[index[..., 0]]
            total = total + soft_cross_entropy(logits, index, codes, weight)
        return total

    values = value_and_gradient(loss, colours(2, 101, seed=9) / 50)
    return {**values, "counts": colors.counts}


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(world):
    alone = step()
    assert alone["counts"].sum() == 2 * N * 9
    for found in on_processes(world, step):
        assert torch.equal(found["counts"], alone["counts"])
        torch.testing.assert_close(found["value"], alone["value"])
        torch.testing.assert_close(found["gradient"], alone["gradient"])


# The backbone that sees no colours.


def test_a_grey_backbone_sees_no_colours_and_passes_grey_images():
    from unlabeled.backbones.grey import Grey
    from unlabeled.backbones.load import fresh
    from unlabeled.batch import normalize

    model = made().backbone.eval()
    grey = Grey(model)
    rgb = uniform(2, 3, 16, 16, dtype=torch.float32)
    luma = (rgb * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    expected = normalize(luma.expand(2, 3, 16, 16).contiguous())
    torch.testing.assert_close(grey.seen(normalize(rgb)), expected)
    torch.testing.assert_close(grey.seen(expected), expected)
    torch.testing.assert_close(grey(normalize(rgb)), model(expected), atol=1e-4, rtol=1e-4)
    assert channels(grey) == channels(model)
    assert grey.dim == model.dim
    again = fresh(grey.config)
    assert isinstance(again, Grey)
    assert again.state_dict().keys() == grey.state_dict().keys()
