"""`segmentation_voc`: classes of pixels, their mIoU, and the layout of VOC's masks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_detection import Rectangles, small, subject
from test_evaluate import Net

from unlabeled.draws import Draws
from unlabeled.evaluate.drawing import SIDE
from unlabeled.evaluate.overlap import accuracy, by_class, counts, intervals, mean_iou
from unlabeled.evaluate.segmentation import Segmentation
from unlabeled.evaluate.segmenter import Example, cut, head_of, resized
from unlabeled.evaluate.suite import evaluate
from unlabeled.truth import Kept


class Painted(Rectangles):
    """The rectangles with a map of their colours; the border of each is unknown."""

    def __init__(self, **settings):
        super().__init__(**settings)
        maps = torch.zeros(len(self.pixels), *self.pixels.shape[2:], dtype=torch.uint8)
        for i, boxes in enumerate(self.known["boxes"]):
            for box, c in zip(boxes.int().tolist(), self.known["box_labels"][i], strict=True):
                x0, y0, x1, y1 = box
                maps[i, y0:y1, x0:x1] = 255
                maps[i, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = c + 1
        self.known["segmentation"] = maps

    def annotation(self, split, kind):
        return Kept(self.known[kind])


def segmentation(**settings):
    settings = {
        **{"steps": 2, "batch_size": 4, "lr": 0.05, "milestones": [], "crop": 64, "holes": 1},
        **{"scales": [1.0, 1.0], "resamples": 50},
    } | settings
    return Segmentation(**settings)


def table(predicted, true, classes):
    return torch.stack([counts(p, t, classes) for p, t in zip(predicted, true, strict=True)])


def test_miou_equals_torchmetrics_and_a_loop():
    from torchmetrics.functional.classification import multiclass_jaccard_index

    g = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 5, (6, 9, 7), generator=g)
    true = torch.randint(0, 4, (6, 9, 7), generator=g)
    true[torch.rand(true.shape, generator=g) < 0.2] = 255
    predicted[predicted == 3] = 2  # class 3: true, never predicted; 4: predicted, never true
    found = by_class(table(predicted, true, 6).sum(0))
    for c in range(6):
        known = true != 255
        p, t = (predicted == c) & known, (true == c) & known
        union = int((p | t).sum())
        expected = int((p & t).sum()) / union if union else float("nan")
        assert found[c].item() == pytest.approx(expected, nan_ok=True)
    assert found[3] == found[4] == 0  # wrong, and counted
    assert found[5].isnan()  # absent
    theirs = multiclass_jaccard_index(predicted, true, 5, ignore_index=255)
    assert mean_iou(table(predicted, true, 6).sum(0)).item() == pytest.approx(theirs.item())
    right = (predicted == true)[true != 255].double().mean().item()
    assert accuracy(table(predicted, true, 6).sum(0)).item() == pytest.approx(right)


def test_miou_of_nothing_is_0():
    unknown = torch.full((2, 4, 4), 255)
    found = table(torch.zeros(2, 4, 4, dtype=torch.uint8), unknown, 3).sum(0)
    assert mean_iou(found) == accuracy(found) == 0
    assert found.sum() == 0


def test_intervals_are_over_images():
    g = torch.Generator().manual_seed(1)
    true = torch.randint(0, 3, (30, 8, 8), generator=g)
    wrong = torch.rand(30, 8, 8, generator=g) < torch.rand(30, 1, 1, generator=g)
    images = table(torch.where(wrong, (true + 1) % 3, true), true, 3)
    low, high = intervals(images, 0)["miou"]
    assert low < mean_iou(images.sum(0)) < high
    same = images[:1].expand(30, -1, -1)
    low, high = intervals(same, 0)["miou"]
    assert low == high == mean_iou(images[0])


def test_crops_keep_pixels_and_classes_together():
    image = torch.arange(1, 13, dtype=torch.uint8).mul(20).view(1, 3, 4).expand(3, -1, -1)
    example = Example(image, image[0].clone())
    places, flips = set(), set()
    for i in range(60):
        for size in (2, 3, 6):
            made = cut(example, Draws("cut", i, size), size, (1.0, 1.0))
            assert made.image.shape == (3, size, size)
            known = made.classes != 255
            assert torch.equal(made.image[0][known], made.classes[known])
            assert (made.image[0][~known] == 124).all()
            assert known.sum() == min(3, size) * min(4, size)
            places.add((size, int(made.classes[known].min())))
            row = made.classes[known][:2].tolist()
            flips.add(row[0] < row[1])
    assert flips == {True, False}
    assert len([p for p in places if p[0] == 2]) == 6  # every corner of 2 x 3
    double = resized(example, 2.0)
    assert double.image.shape == (3, 6, 8)
    assert torch.equal(double.classes[::2, ::2], example.classes)


@pytest.mark.parametrize("head", ["fcn", "linear"])
def test_colours_are_learned(head, tmp_path):
    plan = segmentation(head=head, steps=60, lr=0.1, milestones=[50], scales=[0.9, 1.1], side=60)
    scores = evaluate(
        {"seg": plan}, backbone=small(), data=Painted(), out=tmp_path, seed=0, explicit=True
    )
    raw = scores.details[f"baseline/pixels/seg/{head}/miou"]
    assert raw["stage"] == "pixels"
    assert scores.values[f"baseline/pixels/seg/{head}/miou"] > 0.3  # chance: 0.2, all background
    assert "pixels" in scores.details[f"seg/{head}/miou"]["baselines"]
    assert scores.values[f"seg/{head}/miou"] > 0.7
    details = scores.details[f"seg/{head}/miou"]
    assert details["by_class"].keys() == {"background", "red", "green", "blue"}
    assert details["absent"] == []
    assert details["stage"] == "res5"
    assert details["ci95"][0] <= scores.values[f"seg/{head}/miou"] <= details["ci95"][1]
    sheet = scores.figures["seg/maps"]
    assert [sheet[f"column{i}"].shape for i in range(3)] == [(4, SIDE, SIDE, 3)] * 3
    assert {tuple(c) for c in sheet["column1"][0].reshape(-1, 3)} == {
        *((0, 0, 0), (128, 0, 0), (224, 224, 192)),
    }


def test_a_frozen_trunk_stays_and_a_trained_one_moves():
    for trunk, norm in (("frozen", "train"), ("train", "frozen"), ("train", "train")):
        net = small()
        start = {k: v.clone() for k, v in net.state_dict().items()}
        segmentation(trunk=trunk, norm=norm).tune(subject(net, Painted()))
        moved = {k for k, v in net.state_dict().items() if not torch.equal(v, start[k])}
        assert ("conv1.weight" in moved) == (trunk == "train")
        assert ("bn1.running_mean" in moved) == (trunk == norm == "train")
        assert not moved or trunk == "train"


def test_unknown_pixels_do_not_train():
    runs = []
    for seed in (0, 1):
        data = Painted()
        unknown = data.known["segmentation"] == 255
        assert unknown.any()
        net = small()
        plan = segmentation(trunk="frozen", head="linear", steps=3)
        network, _ = plan._network(subject(net, data))
        x, y = data.pixels, data.known["segmentation"].long()
        total = F.cross_entropy(network(x), y, ignore_index=255, reduction="sum")
        (total / (~unknown).sum()).backward()
        runs.append(network.head[-1].weight.grad.clone())
        network.zero_grad()
        logits = network(x)
        rows = logits.permute(0, 2, 3, 1)[~unknown]
        F.cross_entropy(rows, y[~unknown]).backward()
        torch.testing.assert_close(network.head[-1].weight.grad, runs[-1], rtol=1e-4, atol=1e-6)
        assert seed in (0, 1)


def test_backbones_without_res5_need_no_dilation():
    with pytest.raises(ValueError, match=r"has no stages \['res2'"):
        segmentation().tune(subject(Net(), Painted()))
    found = segmentation(dilate=False).tune(subject(Net(), Painted()))
    assert found.details["fcn/miou"]["stage"] == "two"


def test_heads_have_their_shapes():
    x = torch.zeros(2, 8, 5, 7)
    assert head_of("linear", 8, 4, 6)(x).shape == head_of("fcn", 8, 4, 6)(x).shape == (2, 4, 5, 7)
    assert len(head_of("linear", 8, 4, 6)) == 1


def test_data_without_masks_are_an_obstacle():
    assert segmentation().obstacle(Painted()) is None
    assert "train images have no segmentation" in segmentation().obstacle(Rectangles())


@pytest.mark.parametrize(
    "bad",
    [
        *({"head": "psp"}, {"trunk": "tuned"}, {"norm": "sync"}, {"crop": 8}, {"scales": [2, 1]}),
        *({"scales": [1]}, {"side": 3}, {"holes": 0}, {"resamples": 0}, {"steps": 0}, {"lr": -1}),
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        segmentation(**bad)


@pytest.fixture
def devkit(tmp_path):
    """Two training images and a test image in VOC 2012's layout."""
    folder = tmp_path / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2007_000039\n")
    (folder / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n")
    for k, name in enumerate(("2007_000032", "2007_000039", "2007_000033")):
        Image.new("RGB", (20 + k, 12), (9, 9, 9)).save(folder / f"JPEGImages/{name}.jpg")
        values = np.full((12, 20 + k), k, dtype=np.uint8)
        values[0] = 255
        mask = Image.fromarray(values).convert("P")
        mask.putpalette([5] * 768)
        mask.putdata(values.flatten().tolist())
        mask.save(folder / f"SegmentationClass/{name}.png")
    return tmp_path


def test_masks_are_read_as_they_are(devkit):
    from unlabeled.data.voc_segmentation import VOCSegmentation

    splits = VOCSegmentation()(devkit, 0)
    assert [len(splits[side]) for side in ("train", "test")] == [2, 1]
    assert splits["train"].labels is None
    known = splits["train"].annotations["segmentation"]
    assert known[1].shape == (12, 21)
    assert known[1].unique().tolist() == [1, 255]
    assert splits["test"].annotations["segmentation"][0].unique().tolist() == [2, 255]
    assert splits["test"].image(0).shape == (3, 12, 22)
    assert splits["train"].classes[14] == "person"


def test_what_is_missing_or_wrong_is_named(devkit):
    from unlabeled.data.voc_segmentation import VOCSegmentation

    with pytest.raises(ValueError, match=r"train_aug.txt is not there.*data.root"):
        VOCSegmentation(train=["2012/train_aug"])(devkit, 0)
    with pytest.raises(ValueError, match=r"Aug/2007_000032.png; get it from http"):
        VOCSegmentation(masks="SegmentationClassAug")(devkit, 0)
    path = devkit / "VOC2012/SegmentationClass/2007_000033.png"
    Image.fromarray(np.full((12, 22), 21, dtype=np.uint8)).save(path)
    known = VOCSegmentation()(devkit, 0)["test"].annotations["segmentation"]
    with pytest.raises(ValueError, match=r"2007_000033.png has pixels of class 21"):
        known[0]
    Image.new("RGB", (22, 12)).save(path)
    with pytest.raises(ValueError, match=r"2007_000033.png is no map .* mode is RGB"):
        known[0]
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2007_000033.png is no map of VOC's classes"):
        known[0]
    (devkit / "VOC2012/ImageSets/Segmentation/val.txt").write_text("../../x")
    with pytest.raises(ValueError, match="no name of a VOC image"):
        VOCSegmentation()(devkit, 0)
    for bad in ({"train": []}, {"test": ["val"]}, {"masks": "../x"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            VOCSegmentation(**bad)
