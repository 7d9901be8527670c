"""Actions: clips of a recording answer together, official splits one after the other."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_clips import layout
from torch import nn

from unlabeled.data.clip_decode import Clips, Evenly, Picture
from unlabeled.data.clip_parts import Square
from unlabeled.data.clips import Recordings
from unlabeled.data.decode import Center, Crops
from unlabeled.data.recordings import Memory
from unlabeled.draws import Draws
from unlabeled.evaluate.action import Action
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.tuning import Dropout

KINDS = ("dark", "light")


class Bright:
    """Recordings of two brightnesses; the last third of each is black. Split 2 is harder."""

    fold = 1

    def __call__(self, root, seed):
        grey = torch.tensor([60, 180]).repeat(12)
        generator = torch.Generator().manual_seed(self.fold)
        noise = torch.randint(-20, 21, (24, 30, 3, 8, 8), generator=generator)
        frames = (grey.view(-1, 1, 1, 1, 1) + noise).clamp(0, 255)
        frames[:, 20:] = 0
        labels = torch.arange(24) % 2
        if self.fold == 2:  # where a quarter of the test labels is wrong
            labels[20:22] = 1 - labels[20:22]
        split = Memory(frames.to(torch.uint8), 10.0, None, 0, labels, KINDS)
        rows = torch.arange(24)
        return {"train": split.take(rows[:16]), "test": split.take(rows[16:])}


class Mean(nn.Module):
    """The mean colour of a picture (B, 3, h, w) or clip (B, T, 3, h, w), and a bias that learns."""

    dim = 3

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        pictures = (
            x.flatten(1, 2).mean((-1, -2)).view(len(x), -1, 3)
            if x.ndim == 5
            else x.mean((2, 3))[:, None]
        )
        return pictures.mean(1) + self.bias


def data(**changes):
    decode, test = Crops(size=8), Evenly(size=8)
    given = {"batch_size": 4, "workers": 0, "val_share": 0.25} | changes
    return Recordings(root=".", layout=Bright(), decode=decode, eval_decode=test, **given)


def action(clips=3, frames=None, decode=None, **changes):
    test = Evenly(size=8, frames=frames, rate=10.0, clips=clips)
    given = {"epochs": 30, "batch_size": 16, "lr_trunk": [0.0], "lr_head": [1.0]} | changes
    decode = decode or Picture(decode=Center(size=8), random=False)
    return Action(decode=decode, test_decode=test, **given)


def subject(network=None, here=None):
    here = here or data()
    return Subject(network or Mean(), here, 0, torch.device("cpu"), lambda *args: None)


def test_the_scores_of_clips_are_averaged():
    network = Mean()
    found = action().tune(subject(network))
    assert found.scores["linear/top1"] == 1.0
    assert network.seen[-3:] == [(8, 3, 8, 8)] * 3
    details = found.details["linear/top1"]
    assert "softmax averaged" in details["protocol"]
    # by hand: softmax of each third, then the mean of them
    plan, here = action(), subject(Mean())
    head = nn.Linear(3, 2)
    answers = plan._answers(nn.Sequential(here.backbone, head), here, "test")
    split = here.data._read().split("test")
    for i in range(2):
        pictures = [split.frames[i, t].float() / 255 for t in (5, 15, 25)]
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        means = [(p.mean((1, 2)) - mean) / std for p in pictures]
        expected = torch.stack([head(m).softmax(0) for m in means]).mean(0)
        torch.testing.assert_close(answers[i], expected, rtol=1e-4, atol=1e-5)


def test_clips_train_and_are_mirrored_whole():
    network = Mean()
    decode = Clips(frames=4, rate=10.0, crop=Square(size=8))
    plan = action(frames=4, decode=decode, lr_trunk=[0.01], epochs=2)
    found = plan.tune(subject(network))
    assert set(found.scores) == {"finetune/top1"}
    assert {shape[1:] for shape in network.seen} == {(4, 3, 8, 8)}
    assert network.bias.abs().sum() > 0


def test_a_frozen_backbone_stays():
    network = Mean()
    action().tune(subject(network))
    assert not network.bias.any()


@pytest.mark.parametrize("frames", [None, 4])
def test_raw_pixels_are_classified(frames):
    decode = Clips(frames=6, rate=10.0, crop=Square(size=8)) if frames else None  # not as tested
    found = action(frames=frames, decode=decode, lr_trunk=[0.01]).tune(subject(Pixels()))
    assert found.scores["finetune/top1"] == 1.0
    assert found.details["finetune/top1"]["stage"] == "pixels"


def test_the_classifier_learns_first_and_drops_features_out():
    """Until `warmup` is over the backbone keeps its weights; masks are those of a literal loop."""
    network = Mean()
    options = {"epochs": 4, "lr_trunk": [0.1], "optimizer": "adamw", "warmup": 0.5, "dropout": 0.5}
    kept = []
    network.register_forward_pre_hook(
        lambda module, x: kept.append(module.bias.detach().clone()) if module.training else None
    )
    details = action(**options).tune(subject(network)).details["finetune/top1"]
    assert len(kept) == 4  # one update an epoch
    assert (torch.stack(kept[:3]) == 0).all()  # the third is made of what the second update left
    assert (kept[3] != 0).all()
    assert details["hyperparameters"]["dropout"] == 0.5
    drop = Dropout(0.25)
    drop.draws = Draws(3, "x", rows=400)
    x = torch.ones(400, 7)
    wanted = (Draws(3, "x", rows=400).uniform(7) >= 0.25).float() / 0.75
    assert torch.equal(drop(x), wanted)
    assert drop(x).mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)
    for bad in ({"dropout": 1.0}, {"warmup": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            action(**bad)


def test_official_splits_are_trained_apart_and_averaged():
    network = Mean()
    here = subject(network)
    found = action(folds=[1, 2], lr_trunk=[0.01]).tune(here)
    details = found.details["finetune/top1"]
    assert details["by_fold"] == {1: 1.0, 2: 0.75}
    assert found.scores["finetune/top1"] == pytest.approx(0.875)
    low, high = details["ci95"]
    assert low < 0.875 < high
    assert high <= 1
    assert details["n"] == 16
    assert not network.bias.any()  # each split began from a copy
    assert here.data.layout.fold == 1


def test_rates_are_chosen_on_training_recordings():
    found = action(lr_head=[1e-9, 1.0]).tune(subject())
    details = found.details["linear/top1"]
    best = max(details["tried"], key=lambda one: one["held_out_top1"])
    assert details["hyperparameters"]["lr_head"] == best["head"]
    assert [one["head"] for one in details["tried"]] == [1e-9, 1.0]


def test_what_cannot_be_is_said():
    plan = action(folds=[1, 2])
    assert "these are images" in plan.obstacle(SimpleNamespace())
    none = Recordings(
        root=".", layout=partial(layout), decode=Crops(size=8), eval_decode=Center(size=8)
    )
    assert "no official splits [1, 2]" in plan.obstacle(none)
    assert plan.obstacle(data()) is None
    with pytest.raises(ValueError, match="names a split twice"):
        action(folds=[1, 1])
    with pytest.raises(ValueError, match="no official splits"):
        none.fold(2)


def test_a_decode_of_images_sees_pictures_of_recordings():
    """Evaluations of images, with crops of their own, run on recordings too."""
    (batch,) = data().cut("train", [[0, 1, 2]], Crops(size=4, count=2), "key")
    assert [x.shape for x in batch["crops"]] == [(3, 3, 4, 4)] * 2
