"""Shuffle & Learn: the sampler, the answer from frame indices, the loss, what must not matter."""

import logging
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from processes import mean, on_processes
from test_relative_position import alone, near
from torch import nn

from unlabeled.augment.frame_order import FrameOrder
from unlabeled.augment.geometry import Flip
from unlabeled.augment.views import Views
from unlabeled.data.clip_parts import Box, Square
from unlabeled.data.lasting import Lasting, unseen
from unlabeled.data.motion_frames import MotionFrames
from unlabeled.data.recordings import Kept, Memory
from unlabeled.data.rgb import UnreadableError
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods.shuffle_and_learn import ShuffleAndLearn


class Map(nn.Module):
    """A map of four channels, whose average are the features."""

    dim: ClassVar[int] = 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, self.dim, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.stages(x)["res5"].mean((2, 3))

    def stages(self, x):
        return {"res5": self.conv(x)}


class Flat(nn.Module):
    """Features of a frame: a linear map of its pixels."""

    dim: ClassVar[int] = 6

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3 * 8 * 8, self.dim)

    def forward(self, x):
        return self.map(x.flatten(1))


def recording(moving=slice(0, 0), frames=80):
    """Frame i shows i; noise where it moves."""
    x = torch.zeros(frames, 3, 8, 8, dtype=torch.uint8)
    noise = torch.randint(0, 255, x.shape, generator=torch.Generator().manual_seed(1))
    x[moving] = noise[moving].to(torch.uint8)
    return Kept(x, 10.0)


def sampler(tau_max=12, tau_min=4):
    return MotionFrames(crop=Square(size=8), tau_max=tau_max, tau_min=tau_min)


def test_five_frames_keep_their_distances():
    found = torch.stack([sampler().frames(recording(), Draws(1, i)) for i in range(500)])
    a, b, c, d, e = found.unbind(1)
    assert ((b < c) & (c < d)).all()
    assert ((d - b >= 2) & (d - b <= 12)).all()
    for outer in (b - a, e - d):
        assert (outer >= 4).all()
        assert (outer <= 12).all()
    assert a.min() == 0
    assert e.max() == 79
    assert set((d - b).tolist()) == set(range(2, 13))
    assert torch.equal(found[7], sampler().frames(recording(), Draws(1, 7)))


def test_windows_are_drawn_in_proportion_to_their_motion():
    moving = recording(slice(40, 50))  # differences 39 to 49
    found = torch.stack([sampler().frames(moving, Draws(2, i)) for i in range(400)])
    motion = moving.motion()
    assert (motion > 0).nonzero().flatten().tolist() == list(range(39, 50))
    inside = torch.stack([motion[b:d].sum() for _, b, _, d, _ in found.tolist()])
    assert (inside > 0).all()
    # a span of 2 has weights 1, 2, 2, ... 2, 1 about the moving part
    span = MotionFrames(crop=Square(size=8), tau_max=2, tau_min=1)
    starts = torch.stack([span.frames(moving, Draws(3, i))[1] for i in range(3000)])
    flat = motion.clamp(max=0.001) > 0
    wanted = torch.stack([motion[b : b + 2].sum() for b in range(78)])
    share = starts.bincount(minlength=78)[:78] / 3000
    assert flat.sum() == 11
    assert (share - wanted / wanted.sum()).abs().max() < 0.025


def test_short_recordings_are_refused_and_the_shortest_works():
    least = recording(frames=11)
    assert sampler().frames(least, Draws(0)).tolist() == [0, 4, 5, 6, 10]
    with pytest.raises(UnreadableError, match="10 frames are too few for tau_min: it takes 11"):
        sampler().frames(recording(frames=10), Draws(0))
    with pytest.raises(ValueError, match="tau_min"):
        sampler(tau_max=3, tau_min=4)
    assert sampler().least == 11


def test_recordings_without_enough_pictures_are_no_training_recordings(caplog):
    """Set aside before the training, counted and named; not unreadable, and still tested on."""

    class Split(Memory):
        def lengths(self):
            return self.labels  # 0: one that cannot be read

    counts = torch.tensor([20, 10, 11, 0, 9, 40])
    split = Split(torch.zeros(6, 1, 3, 8, 8, dtype=torch.uint8), 10.0, None, 0, counts, ())
    layout = Lasting(lambda root, seed: {"train": split, "test": split}, sampler().least)
    with caplog.at_level(logging.WARNING):
        splits = layout(Path(), 0)
    assert splits["train"].labels.tolist() == [20, 11, 0, 40]
    assert len(splits["test"]) == 6
    assert "train: of 6 recordings, 2 have fewer pictures than the 11" in caplog.text
    assert "left out: recording 1, recording 4" in caplog.text
    assert sorted(split.labels[unseen(split, 100, sampler(), 0)].tolist()) == [0, 11, 20, 40]
    assert not len(unseen(split.take(torch.tensor([1, 4])), 100, sampler(), 0))
    with pytest.raises(ValueError, match=r"the 50 pictures .*decode\.tau_min"):
        Lasting(lambda root, seed: {"train": split.take(torch.tensor([0, 5]))}, 50)(Path(), 0)


def test_one_box_holds_for_the_five_frames():
    still = torch.randint(0, 255, (1, 3, 20, 20)).to(torch.uint8).expand(40, -1, -1, -1)
    decode = MotionFrames(crop=Box(size=8), tau_max=9, tau_min=3)
    made = decode(Kept(still.contiguous(), 5.0), 3)
    (crop,) = made["crops"]
    assert crop.shape == (5, 3, 8, 8)
    assert (crop == crop[:1]).all()
    assert made["frames"].shape == (5,)


def order(batch=64, seed=0, **rest):
    crops = torch.arange(5).view(1, 5, 1, 1, 1) * 20 + torch.arange(batch).view(-1, 1, 1, 1, 1)
    crops = crops.expand(-1, -1, 3, 8, 8).to(torch.uint8).contiguous()
    frames = torch.tensor([[2, 9, 11, 15, 30]]).expand(batch, -1)
    augment = FrameOrder(Views([[Flip(p=0.5)]]), **rest)
    given = {"crops": [crops], "frames": frames, "index": torch.arange(batch)}
    return augment(given, Draws(seed, rows=batch))


def test_the_answer_is_recomputed_from_frame_indices():
    made = order(4000)
    first, middle, last = made["frames"].unbind(1)
    between = (torch.minimum(first, last) < middle) & (middle < torch.maximum(first, last))
    assert torch.equal(made["target"], between.long())
    share = made["target"].float().mean().item()
    assert abs(share - 0.25) < 0.025  # one to three
    assert abs((first > last).float().mean().item() - 0.5) < 0.03
    wrong = middle[made["target"] == 0]
    assert abs((wrong == 2).float().mean().item() - 0.5) < 0.03
    assert set(wrong.tolist()) == {2, 30}
    ends = torch.stack([first, last]).sort(0).values
    assert (ends == torch.tensor([[9], [15]])).all()


def test_views_are_the_frames_that_are_named():
    made = order(50)
    (views,) = made["views"]
    number = {2: 0, 9: 1, 11: 2, 15: 3, 30: 4}
    shown = views[:, :, 0, 0, 0] * 0.229 * 255 + 0.485 * 255
    for row in range(50):
        named = [number[f] * 20 + row for f in made["frames"][row].tolist()]
        assert shown[row].round().long().tolist() == named


def test_reversal_in_time_changes_no_answer():
    forwards, backwards = order(300, reverse=0.0), order(300, reverse=1.0)
    assert torch.equal(forwards["target"], backwards["target"])
    assert torch.equal(forwards["frames"], backwards["frames"].flip(1))
    assert torch.equal(forwards["views"][0], backwards["views"][0].flip(1))


def method():
    torch.manual_seed(0)
    return alone(ShuffleAndLearn(Flat(), nn.Identity(), None).double())


def batch_of(made, rows=12):
    g = torch.Generator().manual_seed(4)
    views = torch.randn(rows, 3, 3, 8, 8, generator=g, dtype=torch.float64)
    target = torch.arange(rows) % 4 == 0
    share = rows // world_size()
    some = slice(rank() * share, (rank() + 1) * share)
    return {"views": [views[some]], "target": target.long()[some], "index": torch.arange(share)}


def test_the_loss_is_its_formula():
    made = method()
    batch = batch_of(made)
    total, right = 0.0, []
    for x, y in zip(batch["views"][0], batch["target"].tolist(), strict=True):
        h = torch.cat([made.backbone(frame[None])[0] for frame in x])
        logits = (made.head[0].weight @ h + made.head[0].bias).tolist()
        total += math.log(sum(map(math.exp, logits))) - logits[y]
        right.append((y, float(logits.index(max(logits)) == y)))
    found = made.measure(batch, 0)
    assert found["order"].item() == pytest.approx(total / 12, rel=1e-9)
    assert found["accuracy"].item() == pytest.approx(sum(r for _, r in right) / 12)
    recalls = [sum(r for y, r in right if y == k) / (3, 9)[k == 0] for k in (0, 1)]
    assert found["balanced"].item() == pytest.approx(sum(recalls) / 2)


def placed(**options):
    torch.manual_seed(1)
    given = {"side": 2, "widths": [5], "hidden": [7], **options}
    return alone(ShuffleAndLearn(Map(), nn.Identity(), None, **given).double())


@pytest.mark.parametrize("compare", ["frames", "distances"])
def test_the_head_sees_places_or_how_much_frames_differ(compare):
    made = placed(compare=compare)
    (tuples,) = batch_of(made)["views"]
    layer, first, last = made.frames.layers[0][0], made.head[0], made.head[2]
    expected = []
    for x in tuples:
        maps = made.backbone.conv(x)  # 3 4 8 8
        cells = maps.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)).flatten(1)
        a, b, c = (cells @ layer.weight.T + layer.bias).relu()
        h = torch.cat([a, b, c] if compare == "frames" else [a - c, b - a, c - b])
        h = h if compare == "frames" else h.abs()
        h = (first.weight @ h + first.bias).relu()
        expected.append(last.weight @ h + last.bias)
    logits, features = made._answer(batch_of(made))
    torch.testing.assert_close(logits, torch.stack(expected))
    torch.testing.assert_close(features, made.backbone(tuples.flatten(0, 1)).view(12, 3, 4))


def test_an_average_does_not_see_a_thing_move_and_places_do():
    still = torch.zeros(1, 3, 3, 8, 8, dtype=torch.float64)
    moving = still.clone()
    still[..., 1, 1] = 50
    for t, row in enumerate((1, 3, 6)):
        moving[:, t, :, row, 1] = 50
    blind, seeing = placed(side=None, compare="distances"), placed(compare="distances")
    found = [made._answer({"views": [x]})[0] for made in (blind, seeing) for x in (still, moving)]
    torch.testing.assert_close(found[0], found[1])
    assert (found[2] - found[3]).abs().max() > 1e-3


def test_distances_do_not_tell_which_way_time_runs():
    made, batch = placed(compare="distances", hidden=[]), batch_of(None)
    (tuples,) = batch["views"]
    with torch.no_grad():  # those to the middle count alike, as they do in what is asked
        made.head[0].weight[:, 10:] = made.head[0].weight[:, 5:10]
    forwards = made._answer(batch)[0]
    torch.testing.assert_close(made._answer({"views": [tuples.flip(1)]})[0], forwards)
    assert (made._answer({"views": [tuples.roll(1, 1)]})[0] - forwards).abs().max() > 1e-3


def test_wrong_heads_are_refused():
    for options, said in (
        ({"compare": "x"}, "compare must be"),
        ({"side": 0}, "side must be"),
        ({"widths": [0]}, "widths must be"),
    ):
        with pytest.raises(ValueError, match=said):
            placed(**options)
    made = placed()
    made.frames.features = 5
    with pytest.raises(ValueError, match="channels are not the backbone's 5 features"):
        made._answer(batch_of(None))


def test_who_predicts_the_prior_pays_its_entropy():
    made = method()
    with torch.no_grad():
        made.head[0].weight.zero_()
        made.head[0].bias.copy_(torch.tensor([3.0, 1.0]).log())
    loss = made.loss(batch_of(made))["order"].item()
    assert loss == pytest.approx(0.5623, abs=1e-4)
    assert loss == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def alike():
    made = method()
    loss = made.loss(batch_of(made))["order"]
    loss.backward()
    return [mean(loss.detach()), *(mean(p.grad) for p in made.parameters())]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_equal_one(count):
    one = alike()
    for found in on_processes(count, alike):
        for a, b in zip(one, found, strict=True):
            near(a, b, atol=1e-12)


def test_pictures_show_the_frames_with_a_verdict():
    made = method()
    columns = made.pictures(batch_of(made))
    assert list(columns) == ["first", "middle", "last"]
    (views,) = batch_of(made)["views"]
    logits = made.head(made.backbone(views.flatten(0, 1)).view(12, -1))
    right = logits.argmax(1) == batch_of(made)["target"]
    for x in columns.values():
        assert x.shape == (12, 3, 8, 8)
        assert ((x >= 0) & (x <= 1)).all()
        assert torch.equal(x[:, 1, 0, 0] > 0.5, right)


def test_what_is_no_tuple_is_refused():
    with pytest.raises(ValueError, match="decode=five_frames"):
        FrameOrder(Views([[]]))(
            {"crops": [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], "index": torch.arange(2)},
            Draws(0, rows=2),
        )
    with pytest.raises(ValueError, match="positive"):
        FrameOrder(Views([[]]), positive=2.0)
