"""`keypoints`: PCK, crops there and back, and the whole evaluation on rendered points."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evaluate import Net
from torch import nn

from unlabeled.backbones.resnet import ResNet
from unlabeled.data.decode import Center
from unlabeled.data.images import Images
from unlabeled.data.splits import Array
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.keypoints import KeyPoints
from unlabeled.evaluate.keypoints_scored import Limits, predicted, scored
from unlabeled.evaluate.pck import areas, interval, pck, right
from unlabeled.evaluate.posed import (
    Cutter,
    Example,
    Objects,
    cut,
    flipped,
    inside,
    objects,
    outside,
    picture,
    square,
)
from unlabeled.evaluate.regressor import Regressor, loss, regressor
from unlabeled.evaluate.suite import evaluate
from unlabeled.truth import Kept, moved


def test_pck_by_loops():
    draws = np.random.default_rng(0)
    errors = draws.gamma(2, 4, (30, 5))
    counts = draws.random((30, 5)) < 0.7
    units = draws.uniform(20, 60, 30)
    for threshold in (0.1, 0.2, 0.5):
        hits = of = 0
        for i in range(30):
            for k in range(5):
                if counts[i, k]:
                    of += 1
                    hits += errors[i, k] / units[i] <= threshold
        given = (torch.tensor(x) for x in (errors, counts, units))
        assert pck(*given, threshold) == pytest.approx(hits / of)
    tensors = [torch.tensor(x) for x in (errors, counts, units)]
    curve = [pck(*tensors, t) for t in np.linspace(0, 0.5, 2001)]
    assert curve == sorted(curve)
    area = (areas(tensors[0], tensors[2], 0.5) * tensors[1]).sum() / tensors[1].sum()
    assert float(area) == pytest.approx(np.trapezoid(curve, dx=1 / 2000), abs=1e-3)
    nothing = torch.zeros(3, 2)
    assert pck(nothing, nothing == 0, torch.ones(3), 0.2) == 1
    assert areas(nothing, torch.ones(3), 0.2).min() == 1
    assert right(torch.tensor([[2.0]]), torch.tensor([10.0]), 0.2).item()  # so far is right


def test_the_interval_draws_objects_of_an_image_together():
    hits = torch.tensor([3.0, 0, 0, 0, 0, 0])
    counts = torch.full((6,), 3.0)
    together = interval(hits, counts, torch.zeros(6).long(), 1)
    assert together == pytest.approx((1 / 6, 1 / 6))  # one image: nothing varies
    apart = interval(hits, counts, torch.arange(6), 1)
    assert apart[0] == 0
    assert 0.3 < apart[1] <= 0.67
    many = interval(torch.ones(4000).bernoulli_(), torch.ones(4000), torch.arange(4000), 1)
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.5 / 4000**0.5, rel=0.15)


def test_a_crop_and_back():
    torch.manual_seed(0)
    for box, zoom in ((torch.tensor([10.0, 4, 30, 44]), 1.0), (None, 1.3)):
        place = square((50, 40), box, 1.25, torch.tensor([0.1, -0.2]), zoom)
        crop, window = cut(torch.zeros(3, 50, 40, dtype=torch.uint8), place, 24)
        assert crop.shape == (3, 24, 24)
        points = torch.cat([torch.rand(6, 2) * 40, torch.ones(6, 1)], 1)
        there = inside(points, window)
        torch.testing.assert_close(outside(there[:, :2], window), points[:, :2])
        assert (there[:, 2] == 1).all()  # visibility is that in the image


def test_a_crop_shows_what_its_window_says():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 12:16, 20:24] = 255  # its centre is (22, 14)
    for box in (torch.tensor([15.0, 8, 31, 24]), torch.tensor([-5.0, -5, 27, 27])):
        crop, window = cut(image, square((40, 60), box, 1.0, torch.zeros(2), 1.0), 64)
        bright = (crop[0] > 0.5).nonzero().double().mean(0).flip(0) + 0.5
        expected = inside(torch.tensor([[22.0, 14, 2]]), window)[0, :2] * 64
        torch.testing.assert_close(bright.float(), expected, atol=0.6, rtol=0)
    assert square((40, 60), None, 1.0, torch.zeros(2), 1.0) == (-10, 0, 60)  # the whole image


def test_a_mirror_swaps_left_and_right():
    crop = torch.arange(4.0).expand(3, 4, 4)
    points = torch.tensor([[0.1, 0.5, 2], [0.8, 0.2, 1], [0.5, 0.5, 0]])
    made = flipped(Example(crop, points), torch.tensor([1, 0, 2]))
    assert made.crop[0, 0].tolist() == [3, 2, 1, 0]
    expected = torch.tensor([[0.2, 0.2, 1], [0.9, 0.5, 2], [0.5, 0.5, 0]])
    torch.testing.assert_close(made.points, expected)
    again = flipped(made, torch.tensor([1, 0, 2]))
    torch.testing.assert_close(again.points, points)
    mirrored = KeyPoints(swap=[["left", "right"]])._mirrored(["top", "left", "right"])
    assert mirrored.tolist() == [0, 2, 1]


NAMES = ("spot", "corner", "never")


class Layout:
    """A bright square on noise: its centre and top left corner; the latter is often hidden."""

    def __init__(self, sizes=(60, 30), side=16):
        self.sizes, self.side = sizes, side

    def __call__(self, root, seed):
        made = {}
        for k, (name, n) in enumerate(zip(("train", "test"), self.sizes, strict=True)):
            draws = np.random.default_rng(k)
            pixels = draws.integers(0, 60, (n, 3, self.side, self.side), dtype=np.uint8)
            points, boxes = np.zeros((n, 1, 3, 3)), np.zeros((n, 1, 4))
            for i in range(n):
                x, y = draws.integers(0, self.side - 4, 2)
                pixels[i, :, y : y + 4, x : x + 4] = 255
                points[i, 0, 0] = (x + 2, y + 2, 2)
                points[i, 0, 1] = (x, y, 1 + i % 2)
                boxes[i, 0] = (x, y, x + 4, y + 4)
            known = {"keypoints": points, "boxes": boxes, "lengths": np.full((n, 1), 3.0)}
            known = {kind: Kept(torch.tensor(v).float()) for kind, v in known.items()}
            made[name] = Array(torch.from_numpy(pixels), None, (), known, {"keypoints": NAMES})
        return made


def data(layout=None, **settings):
    decode = Center(size=settings.get("side", 16))
    layout = layout or Layout(**settings)
    return Images(root="none", layout=layout, decode=decode, eval_decode=decode)


def evaluation(**settings):
    small = {"points": ["spot", "corner"], "steps": 120, "batch_size": 16, "lr": 0.5, "pictures": 3}
    return KeyPoints(**{**small, **settings})


def subject(backbone, given=None):
    return Subject(backbone, given or data(), 3, torch.device("cpu"), lambda *_: None)


class Maps(nn.Module):
    """A backbone that averages pixels: where it is bright."""

    dim = 1

    def __init__(self, *, blind=False):
        super().__init__()
        self.blind = blind

    def stages(self, x):
        return {"only": F.avg_pool2d(x.mean(1, keepdim=True), 4) * (not self.blind)}

    def forward(self, x):
        return self.stages(x)["only"].mean((2, 3))


def test_the_whole_evaluation_learns_what_can_be_seen(tmp_path):
    given = {"data": data(), "out": tmp_path, "seed": 0, "pixels": False}
    evals = {"keypoints": evaluation(threshold=0.5)}
    scores = evaluate(evals, backbone=Maps(), random_backbone=Maps(blind=True), **given)
    own = [n for n in scores.values if n.startswith("keypoints/")]
    assert own == [f"keypoints/{n}" for n in ("spot/pck@0.5", "corner/pck@0.5", "auc", "pck@0.5")]
    seen = scores.values["keypoints/pck@0.5"]
    blind = scores.values["baseline/random/keypoints/pck@0.5"]
    details = scores.details["keypoints/pck@0.5"]
    assert seen > 0.9
    assert blind < 0.4
    assert details["constant"] == pytest.approx(blind, abs=0.05)  # the mean place, for all
    assert details["baselines"]["random"] == blind
    assert details["n"] == details["objects"] == 30
    assert details["ci95"][0] <= seen <= details["ci95"][1]
    assert scores.figures["keypoints/sheet"]["column0"].shape[0] == 3
    assert evaluate(evals, backbone=Maps(), **given).values["keypoints/pck@0.5"] == seen


def test_raw_pixels_are_scored_too(tmp_path):
    scores = evaluate(
        {"keypoints": evaluation(steps=5)}, backbone=Net(), data=data(), out=tmp_path, seed=0
    )
    assert "baseline/pixels/keypoints/pck@0.2" in scores.values


def test_what_counts_and_in_what_unit():
    given = data()
    found = objects(given, "test", "box", NAMES, boxed=False, least=1.0)
    assert len(found) == 30
    assert found.units.tolist() == [4.0] * 30
    assert objects(given, "test", "given", NAMES, boxed=False, least=1.0).units.unique() == 3
    pair = objects(given, "test", ["spot", "corner"], NAMES, boxed=False, least=1.0)
    torch.testing.assert_close(pair.units, torch.full((30,), 8**0.5))
    missing = objects(given, "test", ["spot", "never"], NAMES, boxed=False, least=1.0)
    assert (len(missing), missing.left_out) == (0, 30)  # a unit that is not known
    seen = found.points[:, :2]
    places = seen[..., :2] + torch.tensor([[0.0, 0.6], [0.0, 0.9]])
    some = Objects(found.owner, seen, found.units, None, 0)
    known = torch.tensor([True, True])
    both = scored(places, some, NAMES[:2], known, Limits("pck", 0.2, 1.0), 0)
    assert both["pck@0.2"][0] == 0.5  # 0.6 and 0.9 of 0.8 pixels
    assert both["spot/pck@0.2"][0] == 1
    assert both["corner/pck@0.2"][0] == 0
    visible = scored(places, some, NAMES[:2], known, Limits("pck", 0.2, 2.0), 0)
    assert visible["pck@0.2"][0] == pytest.approx(30 / 45)  # half the corners are hidden
    alone = scored(places, some, NAMES[:2], torch.tensor([True, False]), Limits("pckh", 0.2, 1), 0)
    assert alone["pckh@0.2"][0] == 1
    assert alone["corner/pckh@0.2"][0] == 0


def test_predictions_go_back_into_the_image():
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.tensor([[0.5, 0.5], [0.25, 1.0]]).expand(len(x), 2, 2)

    given = data()
    found = objects(given, "test", "box", NAMES, boxed=True, least=1.0)
    cutter = Cutter(given, "box", 2.0, 24)
    places = predicted(Fixed(), cutter, found, subject(None, given))
    assert places.shape == (30, 2, 2)
    for i in range(30):
        x0, y0, x1, y1 = found.boxes[i].tolist()
        assert places[i, 0].tolist() == [(x0 + x1) / 2, (y0 + y1) / 2]
        assert places[i, 1].tolist() == [x0, y1 + 2]


def test_the_loss_counts_given_points_inside_the_crop():
    network = Regressor(Maps(), torch.zeros(2, 2), torch.ones(2), grid=0, learns=False)
    network.head = nn.Flatten()
    network.forward = lambda x: torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).expand(len(x), -1, -1)
    network.spread = torch.tensor([0.5, 1.0])
    crop = torch.zeros(3, 8, 8)
    here = Example(crop, torch.tensor([[0.75, 0.5, 2], [0.5, 0.9, 1]]))
    there = Example(crop, torch.tensor([[1.5, 0.5, 2], [0.0, 0.0, 0]]))  # outside, and not given
    value = loss(network, [here, there], 1.0, torch.device("cpu"))
    assert value.item() == pytest.approx((0.5**2 + 0.4**2) / 2)
    assert loss(network, [here], 2.0, torch.device("cpu")).item() == pytest.approx(0.25)
    assert loss(network, [there], 1.0, torch.device("cpu")).item() == 0


def test_a_new_head_says_the_mean_and_reads_a_grid():
    mean, spread = torch.rand(3, 2), torch.tensor([0.1, 0.2])
    torch.manual_seed(0)
    for grid, stage, size in ((2, "only", 4), (9, "only", 16), (0, "final", 1)):
        network = regressor(
            subject(Maps()), torch.rand(3, 16, 16), mean, spread, grid=grid, width=0, learns=False
        )
        assert network.stage == stage
        assert network.head[-1].in_features == size
        torch.testing.assert_close(network(torch.randn(5, 3, 16, 16)), mean.expand(5, 3, 2))
    deep = regressor(
        subject(Maps()), torch.rand(3, 16, 16), mean, spread, grid=2, width=7, learns=False
    )
    assert deep.head[-1].in_features == 7


def weights(net):
    return {name: x.clone() for name, x in net.state_dict().items()}


@pytest.mark.parametrize("freeze_at", [0, 3, 5])
def test_frozen_parts_stay_as_they_are(freeze_at):
    torch.manual_seed(0)
    net = ResNet(depth=18, width=8, stem="small")
    before = weights(net)
    evaluation(freeze_at=freeze_at, steps=2, lr=0.1, grid=1, flip=True, jitter=0.1).tune(
        subject(net)
    )
    moved = {k.split(".")[0] for k, x in net.state_dict().items() if not torch.equal(before[k], x)}
    parts = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert moved == set(parts[{0: 0, 3: 4, 5: 6}[freeze_at] :])


def test_lengths_move_with_crops():
    _, window = cut(torch.zeros(3, 40, 40, dtype=torch.uint8), (5, 5, 20), 30)
    assert moved("lengths", torch.tensor([4.0]), window).tolist() == pytest.approx([6.0])


def test_pictures_show_points_where_they_are():
    points = torch.tensor([[0.25, 0.5, 2], [0.75, 0.5, 0]])
    for cross in (False, True):
        made = picture(torch.zeros(3, 8, 8), points, cross=cross)
        assert made.shape == (192, 192, 3)
        rows, columns = np.nonzero(made.max(2) > 100)
        assert rows.mean() == pytest.approx(96, abs=1.5)
        assert columns.mean() == pytest.approx(48, abs=1.5)  # the second is not given


def test_obstacles():
    class Bare(Layout):
        def __call__(self, root, seed):
            found = super().__call__(root, seed)
            return {
                k: Array(x.pixels, None, (), {"keypoints": x.annotations["keypoints"]}, x.names)
                for k, x in found.items()
            }

    bare = data(Bare())
    assert evaluation().obstacle(bare) == "the train images have no annotation 'boxes'"
    assert "'lengths'" in evaluation(unit="given").obstacle(bare)
    assert evaluation(unit=["spot", "corner"]).obstacle(bare) is None
    assert "['nose']" in evaluation(unit=["spot", "nose"]).obstacle(bare)
    assert "['ear']" in evaluation(swap=[["spot", "ear"]]).obstacle(data())
    with pytest.raises(ValueError, match="no training object says where"):
        evaluation(points=None).tune(subject(Maps()))  # one is given nowhere


@pytest.mark.parametrize(
    "wrong",
    [
        {"unit": "head"},
        {"unit": ["a"]},
        {"crop": "person"},
        {"swap": [["a"]]},
        {"threshold": 0.0},
        {"enlarge": -1.0},
        {"side": 0},
        {"limit": 0},
        {"grid": -1},
        {"width": -1},
        {"jitter": 1.0},
        {"freeze_at": 7},
        {"pictures": -1},
        {"power": -1.0},
        {"steps": 0},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        evaluation(**wrong)
