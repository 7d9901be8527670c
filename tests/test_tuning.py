"""`finetune`, `semisup` and `linear_augmented`: labels, crops and one loop for all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_evaluate import Net
from test_unsupervised_scores import Cut
from torch import nn

from unlabeled.data.decode import Crops
from unlabeled.draws import Draws, shuffled
from unlabeled.evaluate.augmented import LinearAugmented
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.few_labels import labelled
from unlabeled.evaluate.finetune import FineTune
from unlabeled.evaluate.pixel_heads import standardised
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.pooling import PUBLISHED
from unlabeled.evaluate.store import images, shapes_of
from unlabeled.evaluate.suite import evaluate
from unlabeled.evaluate.tuning import Schedule, fit, optimizer

ONE = Crops(size=8, count=1, scale=(0.5, 1.0))


class Labelled(Cut):
    def cut(self, split, parts, decode, *key):
        for batch in super().cut(split, parts, decode, *key):
            yield {**batch, "label": self.y[split][batch["index"]]}

    def path(self, split, position):
        return f"{split}/c{position % 3}/{position}.jpg"


def subject(backbone, data=None):
    return Subject(backbone, data or Labelled(), 3, torch.device("cpu"), lambda *_: None)


def test_the_loop_equals_one_by_hand():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    by_hand = copy.deepcopy(network)
    data, rows = Labelled(), torch.arange(0, 50)
    schedule = Schedule(2, 16, "step", (0.5,), 0.1)
    groups = [{"params": [*network.parameters()], "lr": 0.1, "weight_decay": 1e-3}]
    fit(
        lambda x, y: F.cross_entropy(network(x), y, reduction="sum"),
        optimizer("sgd", groups, momentum=0.9, nesterov=True),
        subject(network, data),
        rows,
        schedule,
        ONE,
        "key",
    )
    sgd = torch.optim.SGD(by_hand.parameters(), 0.1, 0.9, nesterov=True, weight_decay=1e-3)
    for epoch in range(2):
        sgd.param_groups[0]["lr"] = 0.1 if epoch == 0 else 0.01
        order = rows[shuffled(50, "key", "order", epoch)]
        for i in range(3):  # the 2 images left over wait for another epoch's order
            at = order[16 * i : 16 * i + 16]
            draws = Draws("key", "crops", epoch, int(at[0]), rows=16)
            (crop,) = ONE.batched(data.pixels["train"][at], draws)
            x = images(crop, "cpu").clone()
            for k, flipped in enumerate(Draws("key", "flip", epoch, i, rows=16).chance(0.5)):
                x[k] = x[k].flip(-1) if flipped else x[k]
            sgd.zero_grad()
            F.cross_entropy(by_hand(x), data.y["train"][at]).backward()
            sgd.step()
    for a, b in zip(network.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_fewer_images_than_a_batch_make_one():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    groups = [{"params": [*network.parameters()], "lr": 0.1, "weight_decay": 0.0}]
    seen = []

    def loss(x, y):
        seen.append(len(x))
        return F.cross_entropy(network(x), y, reduction="sum")

    sgd = optimizer("sgd", groups, momentum=0.0, nesterov=True)
    fit(loss, sgd, subject(network), torch.arange(5), Schedule(2, 16), ONE, "key")
    assert seen == [5, 5]


def finetune(**settings):
    settings = {"epochs": 4, "batch_size": 20, "lr_trunk": [0.05], "lr_head": [0.5]} | settings
    return FineTune(decode=ONE, **settings)


def test_each_process_has_an_image(monkeypatch):
    monkeypatch.setattr("unlabeled.dist.world_size", lambda: 3)
    sgd = optimizer(
        "sgd", [{"params": [*Net().parameters()], "lr": 0.1}], momentum=0, nesterov=False
    )
    with pytest.raises(ValueError, match=r"a batch of 2 of the 2 images .* for 3 processes"):
        fit(sum, sgd, subject(Net()), torch.arange(2), Schedule(1, 16), ONE, "key")


def test_finetuning_learns_and_leaves_the_backbone_of_others_alone(tmp_path):
    torch.manual_seed(0)
    backbone = Net()
    before = copy.deepcopy(backbone.state_dict())
    scores = evaluate(
        {"finetune": finetune(epochs=8)},
        backbone=backbone,
        random_backbone=Net(),
        data=Labelled(noise=5),
        out=tmp_path,
        seed=0,
    )
    assert all(map(torch.equal, before.values(), backbone.state_dict().values()))
    assert scores.values["finetune/100pct/top1"] > 0.9
    rows = {"", "baseline/random/", "baseline/pixels/"}
    assert set(scores.values) == {f"{row}finetune/100pct/top1" for row in rows}
    details = scores.details["finetune/100pct/top1"]
    assert details["n"] == 60
    assert details["hyperparameters"]["labelled"] == 120


def weights(net):
    return {name: x.clone() for name, x in net.state_dict().items()}


def test_what_learns_and_what_does_not():
    torch.manual_seed(0)
    net = Net()
    start = weights(net)
    finetune(lr_trunk=[0.0]).tune(subject(net))
    assert all(torch.equal(start[k], v) for k, v in net.state_dict().items())
    net = Net()
    start = weights(net)
    finetune(norm="frozen").tune(subject(net))
    moved = {k for k, v in net.state_dict().items() if not torch.equal(start[k], v)}
    assert "one.0.weight" in moved
    assert not {k for k in moved if "running" in k}
    net = Net()
    start = weights(net)
    finetune(norm="train").tune(subject(net))
    moved = {k for k, v in net.state_dict().items() if not torch.equal(start[k], v)}
    assert {"one.1.running_mean", "two.0.weight"} <= moved


def test_learning_rates_are_chosen_on_held_out_training_images():
    torch.manual_seed(0)
    data = Labelled(noise=5)
    start = Net()
    two = finetune(lr_trunk=[0.05], lr_head=[1e-6, 0.5])
    result = two.tune(subject(copy.deepcopy(start), data))
    details = result.details["100pct/top1"]
    tried = {t["head"]: t["held_out_top1"] for t in details["tried"]}
    assert tried[0.5] > tried[1e-6]
    assert details["hyperparameters"]["lr_head"] == 0.5
    alone = finetune().tune(subject(copy.deepcopy(start), data))
    assert alone.scores == result.scores  # trained again from the checkpoint
    data.y["test"] = data.y["test"][shuffled(60, "wrong")]
    other = two.tune(subject(copy.deepcopy(start), data))
    assert other.details["100pct/top1"]["tried"] == details["tried"]


def test_raw_pixels_are_classified_from_the_same_labels():
    data = Labelled(noise=40)
    plan = finetune(share=0.5, epochs=20)
    found = plan.tune(subject(Pixels(), data))
    details = found.details["50pct/top1"]
    assert found.scores["50pct/top1"] > 0.7
    assert details["stage"] == "pixels"
    assert details["hyperparameters"]["labelled"] == 60
    tried = {t["head"]: t["held_out_top1"] for t in details["tried"]}
    assert set(tried) == {0.5, 0.05, 0.005}
    assert tried[details["hyperparameters"]["lr_head"]] == max(tried.values())
    wrong = copy.deepcopy(data)
    wrong.y["train"] = wrong.y["train"][shuffled(120, "wrong")]
    assert plan.tune(subject(Pixels(), wrong)).scores["50pct/top1"] < 0.6
    few = finetune(share=0.03).tune(subject(Pixels(), data)).details["3pct/top1"]
    assert few["selection"] == "none: a tenth of the learning rate that is given"
    assert few["hyperparameters"]["lr_head"] == 0.05


def test_pixels_are_standardised_on_training_crops():
    data, rows = Labelled(), torch.arange(7, 40)
    features = standardised(subject(Pixels(), data), rows, ONE, "key")
    order = rows[shuffled(33, "key", "statistics")].tolist()
    (batch,) = data.cut("train", [order], ONE, "key", "statistics")
    z = features(images(batch["crops"][0], "cpu"))
    assert z.shape == (33, 192)
    torch.testing.assert_close(z.mean(0), torch.zeros(192), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(192), atol=1e-2, rtol=0)


def test_few_labels_are_balanced_and_fixed_by_the_seed():
    data = Labelled(noise=5)
    rows = labelled(data, 0.1, None, 0)
    assert len(rows) == 12
    assert data.y["train"][rows].bincount().tolist() == [4, 4, 4]
    assert torch.equal(rows, labelled(data, 0.1, None, 0))
    assert not torch.equal(rows, labelled(data, 0.1, None, 1))
    scores = finetune(share=0.1).tune(subject(Net(), data)).scores
    assert set(scores) == {"10pct/top1"}


def test_published_lists_name_the_images(tmp_path):
    data, path = Labelled(), tmp_path / "1percent.txt"
    path.write_text("7.jpg\ntrain/c1/4.jpg\n")
    assert labelled(data, 1.0, str(path), 0).tolist() == [4, 7]
    assert set(finetune(list=str(path)).tune(subject(Net(), data)).scores) == {"list/top1"}
    path.write_text("7.jpg\n999.jpg\n")
    with pytest.raises(ValueError, match=r"1percent.txt: 1 of 2 images .* e.g. 999.jpg"):
        labelled(data, 1.0, str(path), 0)
    data.path = lambda split, i: f"c{i % 3}/photo of {i // 3}.jpg"
    path.write_text("c1/photo of 2.jpg\r\n\n  c0/photo of 0.jpg \n")
    assert labelled(data, 1.0, str(path), 0).tolist() == [0, 7]
    path.write_text("photo of 2.jpg\nc0/photo of 0.jpg\n")
    with pytest.raises(ValueError, match=r"1 of 2 names are of several .* c0/photo of 0.jpg"):
        labelled(data, 1.0, str(path), 0)
    assert "no list of images" in finetune(list=str(tmp_path / "none")).obstacle(data)
    assert finetune().obstacle(data) is None


def augmented(**settings):
    settings = {"epochs": 6, "batch_size": 20, "lrs": [0.1], "weight_decays": [0.0]} | settings
    return LinearAugmented(decode=ONE, **settings)


def test_augmented_heads_learn_on_a_frozen_trunk(tmp_path):
    torch.manual_seed(0)
    backbone = Net()
    before = weights(backbone)
    scores = evaluate(
        {"la": augmented()},
        backbone=backbone,
        random_backbone=Net(),
        data=Labelled(noise=5),
        out=tmp_path,
        seed=0,
    )
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    assert scores.values["la/one/top1"] > 0.9
    assert {"la/two/top1", "la/final/top1", "baseline/pixels/la/pixels/top1"} <= set(scores.values)
    assert scores.details["la/one/top1"]["baselines"].keys() == {"random", "pixels", "supervised"}


def test_augmented_heads_do_not_depend_on_company():
    torch.manual_seed(0)
    net, data = Net(), Labelled(noise=60)
    together = augmented(lrs=[1e-4, 0.1]).tune(subject(net, data))
    tried = together.details["one/top1"]["tried"]
    assert tried[1]["held_out_top1"] > tried[0]["held_out_top1"]
    assert together.details["one/top1"]["hyperparameters"]["lr"] == 0.1
    assert "without it" in together.details["one/top1"]["selection"]
    few = augmented(lrs=[1e-4, 0.1], stages=["one"]).tune(subject(net, data))
    assert few.details["one/top1"]["tried"] == tried
    assert few.scores == {"one/top1": together.scores["one/top1"]}


def test_augmented_heads_read_published_windows(monkeypatch):
    """Net's first stage is none of ResNet-50's: here it is one, under windows of 5 by 3."""
    torch.manual_seed(0)
    net, data = Net(), Labelled(noise=60)
    shape = shapes_of(net, data, "cpu").maps["one"]
    monkeypatch.setitem(PUBLISHED, shape, (5, 3, 0))
    heads = augmented(pooling="published", stages=["one"])
    given = heads.tune(subject(net, data)).details["one/top1"]["hyperparameters"]
    grid = (shape[1] - 5) // 3 + 1
    assert given["grid"] == grid < shape[1]
    assert "windows of 5, stride 3" in given["pooling"]
    x = torch.rand(2, 3, *shape[1:])
    found = heads._features(net.eval(), x)["one"]
    assert torch.equal(found, F.avg_pool2d(net.stages(x)["one"], 5, 3))
    assert found.shape == (2, shape[0], grid, grid)


def test_unknown_stages_are_named():
    with pytest.raises(ValueError, match=r"no stages \['res9'\]; it has \['one', 'two', 'final'\]"):
        augmented(stages=["res9"]).tune(subject(Net()))


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (finetune, {"lr_trunk": [-1.0]}),
        (finetune, {"lr_head": [0.0]}),
        (finetune, {"share": 0.0}),
        (finetune, {"optimizer": "adam"}),
        (finetune, {"norm": "batch"}),
        (finetune, {"epochs": 0}),
        (finetune, {"schedule": "poly"}),
        (finetune, {"milestones": [2.0]}),
        (finetune, {"weight_decay": -1.0}),
        (augmented, {"stages": []}),
        (augmented, {"lrs": []}),
        (augmented, {"optimizer": "adamw"}),
        (augmented, {"norm": "sync"}),
        (augmented, {"max_features": 0}),
        (augmented, {"pooling": "max"}),
    ],
)
def test_bad_settings_are_named(make, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)
