"""`detection_voc`: a Faster R-CNN around any backbone with stages res2 to res5."""

import copy
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate import Net

from unlabeled.backbones.library import timm, torchvision
from unlabeled.backbones.regnet import RegNet
from unlabeled.backbones.resnet import ResNet
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.detection import Detection
from unlabeled.evaluate.drawing import SIDE, palette, with_boxes
from unlabeled.evaluate.iterations import Iterations, drawn
from unlabeled.evaluate.keypoints import KeyPoints
from unlabeled.evaluate.normals import Normals
from unlabeled.evaluate.objects import flipped
from unlabeled.evaluate.pixels import PixelMaps, Pixels
from unlabeled.evaluate.segmentation import Segmentation
from unlabeled.evaluate.suite import evaluate
from unlabeled.evaluate.trunk import cut, dilate, freeze_to, stages_of, still_norms
from unlabeled.report import html
from unlabeled.truth import Kept


class Rectangles:
    """Rectangles whose colour is their class on grey noise; the third image has none."""

    classes = ("red", "green", "blue")

    def __init__(self, count=4, side=64, seed=0, empty=None):
        g = torch.Generator().manual_seed(seed)
        noise = 90 + 20 * torch.randn(count, 3, side, side, generator=g)
        self.pixels = noise.clamp(0, 255).to(torch.uint8)
        self.known = {"boxes": [], "box_labels": [], "difficult": []}
        for i in range(count):
            boxes, labels = [], []
            for k in range(0 if i == empty else 1 + i % 2):
                w, h = torch.randint(16, 28, (2,), generator=g).tolist()
                x = int(torch.randint(0, side // 2 - w + 1, (1,), generator=g)) + k * side // 2
                y = int(torch.randint(0, side - h, (1,), generator=g))
                labels.append((i + k) % 3)
                self.pixels[i, :, y : y + h, x : x + w] = 30
                self.pixels[i, labels[-1], y : y + h, x : x + w] = 220
                boxes.append([x, y, x + w, y + h])
            self.known["boxes"].append(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
            self.known["box_labels"].append(torch.tensor(labels, dtype=torch.int64))
            self.known["difficult"].append(torch.zeros(len(labels), dtype=torch.bool))

    def has(self, split):
        return True

    def size(self, split):
        return len(self.pixels)

    def labels(self, split):
        return None

    def kinds(self, split):
        return frozenset(self.known)

    def annotation(self, split, kind):
        return Kept(self.known[kind])

    def image(self, split, position):
        return self.pixels[position]

    def split_hash(self):
        return "rectangles"


def small(stem_stride=2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ResNet(depth=18, width=16, stem="small", stem_stride=stem_stride)


def detection(**settings):
    head = settings.get("head", "c4")
    settings = {
        "norm": "train",
        "steps": 1,
        "batch_size": 2,
        "lr": 0.05,
        "milestones": [],
        "warmup": 0,
        "train_sides": [64],
        "test_side": 64,
        "longest": 96,
        "anchors": [16, 24, 32] if head == "c4" else [8, 16, 24, 32, 48],
        "pre_nms": [100, 50],
        "post_nms": [30, 20],
        "rois": 16 if head == "c4" else 8,
        "resamples": 20,
    } | settings
    return Detection(**settings)


def subject(backbone, data=None, seed=0):
    return Subject(backbone, data or Rectangles(), seed, torch.device("cpu"), lambda *a: None)


BACKBONES = {
    "ours": small,
    "torchvision": lambda: torchvision("resnet18"),
    "regnet": lambda: RegNet(depth=8, w_0=32, w_a=20.0, w_m=1.8, group_width=16),
    "timm": lambda: timm("test_resnet"),
    "recomputed": lambda: ResNet(
        depth=18, width=16, stem="small", checkpoint_activations=["res2", "res5"]
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_is_cut_at_res5(name):
    torch.manual_seed(1)
    backbone = BACKBONES[name]().eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        maps = {k: v.clone() for k, v in backbone.stages(x).items()}
        stages = stages_of(backbone)
        assert {s: v.channels for s, v in stages.items()} == {s: maps[s].shape[1] for s in stages}
        assert stages["res5"].stride == 96 // maps["res5"].shape[-1]
        stage, passed = cut(backbone, "res4", "res5")
        backbone.stages(x)
        res4 = passed.take()
        assert torch.equal(res4, maps["res4"])
        torch.testing.assert_close(stage(res4), maps["res5"])
    with pytest.raises(RuntimeError, match="never run"):
        passed.take()


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_is_frozen_up_to_a_stage(name):
    backbone = BACKBONES[name]()
    freeze_to(backbone, 3)
    with torch.no_grad():
        before = {s: x.clone() for s, x in backbone.eval().stages(torch.ones(1, 3, 64, 64)).items()}
        for p in backbone.parameters():
            if p.requires_grad:
                p.add_(0.1)
        after = backbone.stages(torch.ones(1, 3, 64, 64))
    same = [s for s in before if torch.equal(before[s], after[s])]
    assert same == ["conv1", "res2", "res3"]
    still = still_norms(backbone, every=False)
    moving = [m for m in still_norms(copy.deepcopy(backbone), every=True) if m not in still]
    assert still
    assert len(still) < len(moving)
    freeze_to(backbone, 0)
    assert all(p.requires_grad for p in backbone.parameters())


def test_res5_is_dilated():
    x = torch.randn(1, 3, 64, 64)
    for make in (small, BACKBONES["torchvision"], BACKBONES["regnet"]):
        backbone = make().eval()
        with torch.no_grad():
            before = {k: v.clone() for k, v in backbone.stages(x).items()}
            dilate(backbone)
            after = backbone.stages(x)
        assert after["res5"].shape[-1] == before["res4"].shape[-1] == 2 * before["res5"].shape[-1]
        assert torch.equal(before["res4"], after["res4"])
        if make is not BACKBONES["regnet"]:  # whose excitation averages over the map
            torch.testing.assert_close(after["res5"][..., ::2, ::2], before["res5"])


def test_backbones_without_stages_are_refused():
    with pytest.raises(ValueError, match=r"Net has no stages \['res2'.*it has \['one', 'two'\]"):
        stages_of(Net())
    with pytest.raises(ValueError, match=r"ResNet has no stages \['res5'\]"):
        detection().tune(subject(ResNet(depth=18, width=16, stem="small", last="res4")))


def test_backbones_that_do_not_fit_are_known_at_once(tmp_path):
    class Fixed(Net):
        def stages(self, x):  # as vision transformers do
            assert x.shape[-1] == 32, "Input height (128) doesn't match model (32)."
            return super().stages(x)

    evals = {"c4": detection(), "fpn": detection(head="fpn", anchors=[8] * 5)}
    evals |= {
        "maps": Segmentation(),
        "normals": Normals(dilate=True),
        "points": KeyPoints(freeze_at=3),
    }
    fits = small()
    before = fits.state_dict().copy()
    for evaluation in evals.values():
        assert "has no stages" in evaluation.misfit(Net())
        assert "doesn't match" in evaluation.misfit(Fixed())
        assert evaluation.misfit(fits) is None
    assert all(torch.equal(x, before[name]) for name, x in fits.state_dict().items())
    assert Segmentation(dilate=False).misfit(Net()) is Normals().misfit(Fixed()) is None
    given = {"backbone": Net(), "data": Rectangles(), "out": tmp_path, "seed": 0}
    assert "has no stages" in evaluate({"c4": evals["c4"]}, **given).skipped["c4"]
    with pytest.raises(ValueError, match="'c4' cannot run: the backbone Net has no stages"):
        evaluate({"c4": evals["c4"]}, explicit=True, **given)


def test_pixels_are_a_trunk_of_places_as_wide_as_a_resnets():
    trunk, x = PixelMaps(), torch.randn(1, 3, 60, 64)
    maps = trunk.stages(x)
    stages = stages_of(trunk)
    assert {name: stage.stride for name, stage in stages.items()} == {
        **{"res2": 4, "res3": 8, "res4": 16, "res5": 32},
    }
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        **{"res2": (1, 48, 16, 16), "res3": (1, 48, 8, 8)},
        **{"res4": (1, 48, 4, 4), "res5": (1, 48, 2, 2)},
    }
    for name, stage in stages.items():
        side = stage.stride
        place = x[0, :, side % 60 : side % 60 + side, :side]  # in the second row, where there is
        if side < 32:
            cells = torch.nn.functional.adaptive_avg_pool2d(place, 4).flatten()
            torch.testing.assert_close(maps[name][0, :, 1, 0], cells)
    stage, passed = cut(trunk, "res4", "res5")
    trunk.stages(x)
    assert torch.equal(stage(passed.take()), maps["res5"])


def test_raw_pixels_have_a_row(tmp_path):
    given = {"backbone": small(), "data": Rectangles(), "out": tmp_path, "seed": 0}
    scores = evaluate({"det": detection(freeze_at=2)}, **given, explicit=True)
    assert scores.details["baseline/pixels/det/coco/AP50"]["stage"] == "pixels"
    untrained = scores.details["det/coco/AP50"]["baselines"]["pixels"]
    found = detection(steps=60, norm="frozen").tune(subject(Pixels())).scores["coco/AP50"]
    assert found > untrained + 0.15  # colour tells the classes
    detection(head="fpn", freeze_at=5).tune(subject(Pixels()))


def test_boxes_are_flipped_with_their_image():
    image = torch.zeros(3, 5, 8)
    image[:, 1:3, 2:6] = 1
    left, top, right, bottom = flipped(torch.tensor([[2.0, 1, 6, 3]]), 8)[0].int().tolist()
    assert image.flip(-1)[:, top:bottom, left:right].min() == 1
    assert image.sum() == 3 * (right - left) * (bottom - top)
    assert flipped(torch.zeros(0, 4), 8).shape == (0, 4)


def test_every_image_is_drawn_once_a_pass():
    batches = [*islice(drawn(7, Iterations(steps=1, batch_size=3), 0, "a"), 14)]
    at = [p.position for batch in batches for p in batch]
    assert all(sorted(at[i : i + 7]) == list(range(7)) for i in range(0, 42, 7))
    assert at[:7] != at[7:14]
    assert [(p.step, p.slot) for p in batches[1]] == [(1, 0), (1, 1), (1, 2)]


def test_the_learning_rate_warms_up_and_drops():
    s = Iterations(steps=10, milestones=(6, 8), warmup=4, warmup_factor=0.2)
    rates = [s.factor(i) for i in range(10)]
    expected = [0.2, 0.4, 0.6, 0.8, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rates == pytest.approx(expected)


def test_a_few_images_are_learned_by_heart(tmp_path):
    scores = evaluate(
        {
            "detection": detection(
                steps=80, batch_size=4, milestones=[60], warmup=10, warmup_factor=0.1, precise=5
            )
        },
        backbone=small(),
        data=Rectangles(),
        out=tmp_path,
        seed=0,
        explicit=True,
    )
    assert scores.values["detection/voc07/AP50"] > 0.9
    assert scores.values["detection/coco/AP50"] > 0.9
    names = {f"detection/{r}/{k}" for r in ("coco", "voc07") for k in ("AP", "AP50", "AP75")}
    assert set(scores.values) == names | {f"baseline/pixels/{name}" for name in names}
    details = scores.details["detection/voc07/AP50"]
    assert details["by_class"].keys() == {"red", "green", "blue"}
    assert details["ci95"][0] <= scores.values["detection/voc07/AP50"] <= details["ci95"][1]
    sheet = scores.figures["detection/detections"]
    assert [sheet[f"column{i}"].shape for i in range(4)] == [(2, SIDE, SIDE, 3)] * 4
    scores.write(tmp_path)
    page = html.write(tmp_path).read_text()
    assert "Detections" in page
    assert 'class="samples large"' in page


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_every_stage_learns_and_frozen_norm_stays(head):
    net = small()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    data = Rectangles(empty=2)
    settings = {"head": head, "norm": "frozen", "batch_size": 4, "steps": 2, "lr": 1e-3}
    model, _ = detection(**settings)._model(subject(net, data))
    state = model.state_dict()
    left = dict(start)
    for name in start:
        found = [k for k in state if k.endswith(f".{name}")]
        found += [k for k in state if name.startswith("layer4") and k.endswith(f"stage{name[6:]}")]
        if ("norm" in name or "bn" in name or "running" in name) and found:
            assert torch.equal(state[found[0]], start[name]), name
            left.pop(name)
        elif found and "conv" in name:
            assert not torch.equal(state[found[0]], start[name]), name
            left.pop(name)
    assert all("downsample" in name for name in left), [*left]


def test_a_frozen_trunk_stays():
    net = small()
    trunk = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("layer4")}
    res5 = net.layer4[0].conv1.weight.clone()
    stage = net.layer4
    detection(freeze_at=4, precise=1).tune(subject(net))
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in trunk.items())
    assert not torch.equal(stage[0].conv1.weight, res5)


def test_one_seed_gives_one_detector_and_leaves_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    runs = []
    for seed in (0, 0, 1):
        plan = detection(extra_norm=True, batch_size=3, per_pass=2, train_sides=[48, 64])
        runs.append(plan._model(subject(small(), seed=seed))[0].state_dict())
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert any(not torch.equal(runs[0][k], runs[2][k]) for k in runs[0])


def test_precise_norm_is_the_mean_over_batches():
    net = small()
    plan = detection(lr=1e-12, precise=3, batch_size=4, weight_decay=0.0)
    plan._model(subject(net))
    x = Rectangles().pixels.float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():  # all four images in every batch, flipped or not: the mean is the same
        mean = net.conv1(x).mean((0, 2, 3))
    torch.testing.assert_close(net.bn1.running_mean, mean, rtol=0.2, atol=0.02)
    assert net.bn1.momentum == 0.1


@pytest.mark.parametrize("norm", ["frozen", "train"])
def test_training_that_diverges_ends_with_finite_scores(norm):
    plan = detection(steps=30, lr=1e4, norm=norm, precise=2)
    result = plan.tune(subject(small()))
    assert result.details["coco/AP"]["updates"] < 30
    assert all(0 <= x <= 1 for x in result.scores.values())
    assert detection().tune(subject(small())).details["coco/AP"]["updates"] == 1


def test_data_without_boxes_are_an_obstacle():
    data = Rectangles()
    assert detection().obstacle(data) is None
    del data.known["box_labels"]
    assert "train images have no boxes" in detection().obstacle(data)
    assert "no boxes" in detection().obstacle(object())


def test_pictures_show_boxes():
    image = np.full((40, 80, 3), 128, dtype=np.uint8)
    drawn_ = with_boxes(image, np.array([[20.0, 10, 60, 30]]), [2], ["chair 0.90"])
    assert drawn_.shape == (SIDE, SIDE, 3)
    changed = (drawn_ != with_boxes(image, np.zeros((0, 4)), [], [])).any(2)
    rows, columns = changed.nonzero()
    scale = SIDE / 80
    assert (rows.min(), columns.min()) == (80 + 10 * scale, 20 * scale)
    assert (rows.max(), columns.max()) == (80 + 30 * scale - 1, 60 * scale - 1)
    known = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert palette(21)[:5].tolist() == known
    assert palette(21)[20].tolist() == [0, 64, 128]


@pytest.mark.parametrize(
    "bad",
    [
        *({"head": "c5"}, {"norm": "sync"}, {"freeze_at": 6}, {"train_sides": []}, {"anchors": []}),
        *(
            {"test_side": 8},
            {"head": "fpn", "anchors": [8]},
            {"pre_nms": [1]},
            {"post_nms": [0, 1]},
        ),
        *({"rois": 0}, {"resamples": 0}, {"shown": -1}, {"steps": 0}, {"lr": 0.0}, {"warmup": -1}),
        *({"batch_size": 0}, {"milestones": [-1]}, {"momentum": 1.0}, {"per_pass": 0}),
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=list(bad)[-1]):
        detection(**bad)


VOC = Path(os.environ.get("UNLABELED_DATA", "data")) / "VOCdevkit/VOC2007"


@pytest.mark.slow
@pytest.mark.skipif(not VOC.is_dir(), reason="needs VOC 2007, or the mini set, in UNLABELED_DATA")
def test_eight_photographs_are_learned_by_heart(tmp_path):
    from unlabeled.data.decode import Center
    from unlabeled.data.images import Images
    from unlabeled.data.voc import VOC as Layout

    folder = tmp_path / "VOC2007"
    (folder / "ImageSets/Main").mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        (folder / name).symlink_to(VOC / name)
    ids = (VOC / "ImageSets/Main/trainval.txt").read_text().split()
    few = [i for i in ids if (VOC / f"Annotations/{i}.xml").read_text().count("<object>") <= 3]
    (folder / "ImageSets/Main/eight.txt").write_text("\n".join(few[:8]))
    data = Images(
        root=str(tmp_path),
        layout=Layout(train=["2007/eight"], test=["2007/eight"]),
        decode=Center(size=64, resize=64),
        eval_decode=Center(size=64, resize=64),
        batch_size=8,
        tier="folder",
    )
    data.setup()
    plan = detection(
        steps=400,
        batch_size=4,
        milestones=[320],
        warmup=20,
        warmup_factor=0.1,
        precise=10,
        train_sides=[128],
        test_side=128,
        longest=192,
        anchors=[16, 32, 64, 112],
        pre_nms=[400, 200],
        post_nms=[100, 50],
    )
    scores = plan.tune(subject(small(), data)).scores
    assert scores["voc07/AP50"] > 0.9


def test_without_voc_it_is_skipped_and_says_what_is_missing(compose, tmp_path, monkeypatch):
    from hydra.utils import instantiate

    from unlabeled.evaluate.suite import obstacle

    monkeypatch.setenv("UNLABELED_DATA", str(tmp_path))
    chosen = compose("evals=all", "data=fashion_mnist_mini").evals
    for name, file in (
        ("detection_voc", "VOC2007/ImageSets/Main/trainval.txt"),
        ("segmentation_voc", "VOC2012/ImageSets/Segmentation/train.txt"),
    ):
        said = obstacle(instantiate(chosen[name]), data=None)
        assert said is not None
        assert f"its data cannot be read: {tmp_path / 'VOCdevkit' / file} is not there" in said
