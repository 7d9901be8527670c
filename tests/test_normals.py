"""`normals`: angles by a histogram, words, heads, and the whole evaluation on exact normals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evaluate import Net
from torch import nn

from unlabeled.backbones.resnet import ResNet
from unlabeled.data.decode import Center
from unlabeled.data.images import Images
from unlabeled.data.nyuv2 import NYUv2
from unlabeled.data.splits import Array
from unlabeled.evaluate.angles import Angles, degrees
from unlabeled.evaluate.annotated import Poly
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.dense import LinearMaps, PyramidPooling, dilate_to_eight
from unlabeled.evaluate.directions import Words, codebook, coloured
from unlabeled.evaluate.normals import Normals
from unlabeled.evaluate.normals_scored import predict, score
from unlabeled.evaluate.suite import evaluate
from unlabeled.truth import UNKNOWN, Kept


def directions(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)


def test_angles_of_known_pairs():
    x = torch.tensor([[1.0, 0, 0]])
    for true in (0, 1e-6, 0.01, 11.25, 45, 90, 179.99, 180):
        a = math.radians(true)
        y = 3 * torch.tensor([[math.cos(a), math.sin(a), 0]], dtype=torch.float64)
        assert degrees(x, y).item() == pytest.approx(true, abs=1e-9)
    a, b = directions(500, 3), directions(500, 3, seed=1)
    by_cosine = torch.rad2deg(torch.arccos((a * b).sum(1)))
    torch.testing.assert_close(degrees(a, b), by_cosine, atol=1e-5, rtol=0)
    maps = degrees(a.view(5, 100, 3).transpose(1, 2), b.view(5, 100, 3).transpose(1, 2))
    torch.testing.assert_close(maps.flatten(), degrees(a, b))


def test_the_histogram_says_what_all_angles_say():
    draws = np.random.default_rng(0)
    images = [draws.gamma(2, 12, size=draws.integers(0, 400)).clip(0, 180) for _ in range(150)]
    images[7] = np.array([])  # without a known pixel
    counted = Angles(len(images), 3, "x", resamples=200)
    for image in images:
        counted.add(torch.from_numpy(image))
    found = counted.scores()
    everything = np.concatenate(images)
    assert found["mean_degrees"][0] == pytest.approx(everything.mean(), abs=1e-9)
    assert found["median_degrees"][0] == pytest.approx(np.median(everything), abs=0.01)
    for limit in (11.25, 22.5, 30):
        assert found[f"within_{limit:g}"][0] == pytest.approx(
            (everything < limit).mean(), abs=1e-12
        )
    # The same resamples, by hand, over the pixels themselves.
    means, medians = [], []
    for times in counted.times[1:]:
        drawn = np.concatenate([np.repeat(x, int(t)) for x, t in zip(images, times, strict=True)])
        means.append(drawn.mean())
        medians.append(np.median(drawn))
    np.testing.assert_allclose(found["mean_degrees"][1], np.quantile(means, [0.025, 0.975]))
    expected = np.quantile(medians, [0.025, 0.975])
    np.testing.assert_allclose(found["median_degrees"][1], expected, atol=0.01)
    assert counted.times[1:].sum(1) == pytest.approx(150)


def test_bounds_of_bins_and_extremes():
    counted = Angles(1, resamples=0)
    counted.add(torch.tensor([0.0, 11.2499, 11.25, 180.0], dtype=torch.float64))
    found = counted.scores()
    assert found["within_11.25"][0] == 0.5  # less than, as the published code
    assert found["within_30"][0] == 0.75
    with pytest.raises(ValueError, match="no pixel of any test image has a known normal"):
        Angles(1, resamples=0).scores()


def test_words_are_the_nearest_directions():
    normals = directions(6, 3, 8, 9).float()
    normals[2, :, 3] = 0
    known = codebook(Kept(normals), torch.tensor([0, 2, 5]), 7, 1, lambda *_: None, "cpu")
    torch.testing.assert_close(known.centres.norm(dim=1), torch.ones(7))
    assert len(known.maps) == 3
    for image, words in zip(normals[[0, 2, 5]], known.maps, strict=True):
        for i in range(8):
            for j in range(9):
                n = image[:, i, j]
                away = [degrees(n[None], c[None]).item() for c in known.centres]
                expected = UNKNOWN if n.norm() == 0 else int(np.argmin(away))
                assert words[i, j] == expected
    with pytest.raises(ValueError, match="too few for words=9999"):
        codebook(Kept(normals), torch.arange(6), 9999, 1, lambda *_: None, "cpu")


def test_colours():
    picture = coloured(torch.tensor([[[1.0, 0]], [[-1.0, 0]], [[0.0, 0]]]))
    assert picture[0, 0].tolist() == [255, 0, 128]
    assert picture[0, 1].tolist() == [128, 128, 128]  # unknown


def test_predictions_are_sums_of_words_weighted_by_the_softmax():
    centres = directions(4, 3).float()
    logits = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    sizes = []

    def network(x, size):
        sizes.append((tuple(x.shape[2:]), size))
        return [F.interpolate(logits, size, mode="nearest")]

    image = torch.zeros(3, 6, 8, dtype=torch.uint8)
    found = predict(network, [image], centres, [None, 12])
    assert sizes == [((6, 8), (6, 8)), ((12, 16), (6, 8))]
    chance = logits[0].double().exp() / logits[0].double().exp().sum(0)
    by_hand = sum(chance[k] * centres[k].double()[:, None, None] for k in range(4))
    torch.testing.assert_close(found[0], by_hand / by_hand.norm(dim=0), atol=1e-6, rtol=0)
    assert found.dtype == torch.float64


def test_the_linear_head_is_a_hypercolumn():
    torch.manual_seed(0)
    head = LinearMaps({"a": 3, "b": 5}, 4).eval()
    for part in head.parts.values():
        nn.init.normal_(part.weight)
        nn.init.normal_(part.bias)
    maps = {"a": torch.randn(2, 3, 8, 8), "b": torch.randn(2, 5, 4, 4)}
    (found,) = head(maps, (16, 16))
    normed = [head.norms[s](maps[s]) / 8**0.5 for s in maps]
    enlarged = [F.interpolate(m, (16, 16), mode="bilinear") for m in normed]
    weight = torch.cat([part.weight for part in head.parts.values()], 1)
    bias = sum(part.bias for part in head.parts.values())
    by_hand = F.conv2d(torch.cat(enlarged, 1), weight, bias)
    torch.testing.assert_close(found, by_hand, atol=1e-5, rtol=1e-5)


def test_pyramid_pooling_and_its_auxiliary_head():
    torch.manual_seed(0)
    head = PyramidPooling({"x": 4, "early": 8, "late": 16}, 5, width=6)
    maps = {"early": torch.randn(2, 8, 12, 12), "late": torch.randn(2, 16, 12, 12)}
    answers = head(maps, (24, 20))
    assert [tuple(a.shape) for a in answers] == [(2, 5, 24, 20)] * 2
    assert len(head.eval()(maps, (24, 20))) == 1
    moved = {**maps, "late": maps["late"].clone()}
    moved["late"][:, :, 11, 11] += 50  # far away, and seen through the pools
    assert (head(moved, (24, 20))[0] - head(maps, (24, 20))[0])[..., 0, 0].abs().max() > 1e-4


def test_dilated_stages_see_as_far_and_keep_the_resolution():
    torch.manual_seed(0)
    net = ResNet(depth=50, width=8, stem="imagenet").eval()
    x = torch.randn(1, 3, 96, 128)
    before = net.stages(x)
    dilate_to_eight(net)
    after = net.stages(x)
    assert [after[s].shape[2:] for s in ("res3", "res4", "res5")] == [(12, 16)] * 3
    torch.testing.assert_close(after["res3"], before["res3"])
    # A strided convolution and the same one without stride agree where both look, up to the
    # stage's first block: later ones are dilated so that this stays true.
    torch.testing.assert_close(after["res4"][..., ::2, ::2], before["res4"], atol=1e-4, rtol=1e-4)
    rates = {m.dilation for m in net.layer4.modules() if isinstance(m, nn.Conv2d)}
    assert rates == {(1, 1), (2, 2), (4, 4)}


def test_the_rate_falls_to_zero():
    schedule = Poly(10, 2, 0.1, power=0.9)
    assert [schedule.factor(s) for s in (0, 5, 9)] == pytest.approx([1, 0.5**0.9, 0.1**0.9])
    assert schedule.said()["power"] == 0.9


class Layout:
    """Images that are their normals, coloured; in every one some are unknown."""

    def __init__(self, sizes=(40, 20), side=12):
        self.sizes, self.side = sizes, side

    def __call__(self, root, seed):
        made = {}
        for k, (name, n) in enumerate(zip(("train", "test"), self.sizes, strict=True)):
            small = directions(n, 3, 2, 2, seed=k).float()
            small[:, 2].abs_()
            normals = F.interpolate(small, (self.side, self.side), mode="nearest")
            pixels = ((normals + 1) * 127.5).round().to(torch.uint8)
            normals[:, :, 0] = 0
            made[name] = Array(pixels, None, (), {"normals": Kept(normals)})
        return made


def data(**settings):
    decode = Center(size=settings.get("side", 12))
    return Images(root="none", layout=Layout(**settings), decode=decode, eval_decode=decode)


def evaluation(**settings):
    small = {"words": 12, "steps": 60, "batch_size": 8, "lr": 2.0, "pictures": 3}
    return Normals(**{**small, **settings})


class Blind(nn.Module):
    """A backbone whose maps say nothing."""

    dim = 2

    def stages(self, x):
        return {"only": torch.zeros(len(x), 2, 4, 4)}

    def forward(self, x):
        return torch.zeros(len(x), 2)


@pytest.mark.filterwarnings("ignore")
def test_the_whole_evaluation_learns_what_can_be_seen(tmp_path):
    scores = evaluate(
        {"normals": evaluation()}, backbone=Blind(), data=data(), out=tmp_path, seed=0, pixels=True
    )
    names = ["mean_degrees", "median_degrees", "within_30", "within_22.5", "within_11.25"]
    assert [n for n in scores.values if n.startswith("normals/")] == [f"normals/{n}" for n in names]
    blind = scores.values["normals/median_degrees"]
    seen = scores.values["baseline/pixels/normals/median_degrees"]  # colours say it all
    details = scores.details["normals/median_degrees"]
    assert seen < 0.6 * blind
    assert blind == pytest.approx(details["constant"], rel=0.25)  # one answer for every pixel
    assert details["baselines"] == {"pixels": seen, "supervised": "not given"}
    assert details["n"] == 20
    assert details["better"] == "lower"
    assert scores.details["normals/within_30"]["better"] == "higher"
    low, high = details["ci95"]
    assert low < blind < high
    figure = scores.figures["normals/sheet"]
    assert figure["column0"].shape == (3, 12, 12, 3)
    assert (figure["column1"][:, 0] == 128).all()  # unknown in the first row
    again = evaluate(
        {"normals": evaluation()}, backbone=Blind(), data=data(), out=tmp_path, seed=0, pixels=True
    )
    assert again.values == scores.values


def subject(backbone, given=None):
    return Subject(backbone, given or data(), 3, torch.device("cpu"), lambda *_: None)


def test_what_is_scored_is_what_the_pixels_say():
    given = data(sizes=(4, 9))
    centres = directions(5, 3, seed=7).float()
    known = Words(centres, centres[0], [])
    logits = torch.randn(1, 5, 12, 12, generator=torch.Generator().manual_seed(1))
    made = score(
        lambda x, size: [logits.expand(len(x), -1, -1, -1)], subject(None, given), known, [None], 0
    )
    said = F.normalize(
        torch.einsum("khw,kd->dhw", logits[0].softmax(0).double(), centres.double()), dim=0
    )
    errors, constant = [], []
    for i in range(9):
        true = given.annotation("test", "normals")[i].double()
        for y in range(1, 12):  # the first row is unknown
            for x in range(12):
                errors.append(float(torch.rad2deg(torch.arccos(said[:, y, x].dot(true[:, y, x])))))
                constant.append(
                    float(torch.rad2deg(torch.arccos(centres[0].double().dot(true[:, y, x]))))
                )
    assert made.values["mean_degrees"] == pytest.approx(np.mean(errors), abs=1e-4)
    assert made.values["median_degrees"] == pytest.approx(np.median(errors), abs=0.011)
    assert made.values["within_30"] == pytest.approx(np.mean(np.array(errors) < 30))
    assert made.constant["mean_degrees"] == pytest.approx(np.mean(constant), abs=1e-4)


def weights(net):
    return {name: x.clone() for name, x in net.state_dict().items()}


def changed(before, net):
    return {k.split(".")[0] for k, x in net.state_dict().items() if not torch.equal(before[k], x)}


@pytest.mark.parametrize(("freeze_at", "moves"), [(5, set()), (4, {"layer4"})])
def test_frozen_parts_stay_as_they_are(freeze_at, moves):
    torch.manual_seed(0)
    net = ResNet(depth=18, width=8, stem="small")
    before = weights(net)
    small = {"steps": 2, "lr": 0.1, "head": "pyramid", "loss_stride": 2, "dilate": True}
    result = evaluation(freeze_at=freeze_at, sides=[16, 24], **small).tune(
        subject(net, data(side=16, sizes=(8, 4)))
    )
    assert changed(before, net) == moves
    assert result.details["mean_degrees"]["stage"] == "res5"


def test_images_of_two_sizes():
    given = data()
    tall = given.image
    given.image = lambda split, i: tall(split, i)[:, : 12 - 4 * (i % 2)]
    whole = given.annotation
    cut = {
        split: Kept(
            [n[:, : 12 - 4 * (i % 2)] for i, n in enumerate(whole(split, "normals").stacked())]
        )
        for split in ("train", "test")
    }
    given.annotation = lambda split, kind: cut[split]
    result = evaluation().tune(subject(Net(), given))
    assert result.scores["within_30"] > 0.2
    assert not result.figures  # pictures of one size only


def test_data_without_normals_are_an_obstacle(tmp_path):
    class Bare(Layout):
        def __call__(self, root, seed):
            return {k: Array(x.pixels, None, ()) for k, x in super().__call__(root, seed).items()}

    decode = Center(size=12)
    bare = Images(root="none", layout=Bare(), decode=decode, eval_decode=decode)
    found = evaluate({"normals": evaluation()}, backbone=Net(), data=bare, out=tmp_path, seed=0)
    assert found.skipped == {"normals": "the train images have no annotation 'normals'"}
    with pytest.raises(ValueError, match="'normals' cannot run: the train images have no"):
        evaluate(
            {"normals": evaluation()},
            backbone=Net(),
            data=bare,
            out=tmp_path,
            seed=0,
            explicit=True,
        )


def test_data_that_are_not_there_are_skipped_by_name(tmp_path):
    decode = Center(size=12)
    layout = NYUv2()
    missing = Images(root=str(tmp_path), layout=layout, decode=decode, eval_decode=decode)
    found = evaluate(
        {"normals": evaluation(data=missing)}, backbone=Net(), data=data(), out=tmp_path, seed=0
    )
    assert not found.values
    said = found.skipped["normals"]
    assert str(tmp_path / "nyu_depth_v2_labeled.mat") in said
    assert "get it from http" in said


@pytest.mark.parametrize(
    "wrong",
    [
        {"words": 1},
        {"head": "deep"},
        {"freeze_at": 6},
        {"sides": []},
        {"test_sides": [0]},
        {"loss_stride": 0},
        {"limit": 0},
        {"stages": "first"},
        {"stages": []},
        {"pictures": -1},
        {"power": -1.0},
        {"lr": 0.0},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        evaluation(**wrong)


def test_unknown_stages_are_named():
    with pytest.raises(ValueError, match=r"no stages \['res9'\]"):
        evaluation(stages=["res9"]).tune(subject(Net()))
