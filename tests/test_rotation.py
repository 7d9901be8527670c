"""Rotation: turns, the loss, what cannot be told, processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes
from test_relative_position import alone, near, pixels
from torch import nn

from unlabeled.augment.geometry import Flip, rotate
from unlabeled.augment.rotation import Rotations
from unlabeled.augment.views import Views
from unlabeled.backbones.alexnet import AlexNet
from unlabeled.backbones.resnet import ResNet
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods.rotation import Rotation


def test_turns_add_up_and_undo_one_another_exactly():
    x = pixels(3, 3, 7, 7)
    for r in range(4):
        assert torch.equal(rotate(rotate(x, r), (4 - r) % 4), x)
        for s in range(4):
            assert torch.equal(rotate(rotate(x, s), r), rotate(x, (r + s) % 4))
    assert torch.equal(rotate(x, 1), x.mT.flip(-2))  # counter-clockwise, and no new value
    for r in range(4):
        assert torch.equal(rotate(x, r).flip(-1), rotate(x.flip(-1), (4 - r) % 4))


def method(copies="all", net=None, flip=0.5):
    torch.manual_seed(1)
    augment = Rotations(Views([[Flip(p=flip)]]), copies)
    net = net or ResNet(depth=18, width=16, stem="small", stem_stride=2, norm="sync")
    return alone(Rotation(net, augment, None).double())


def batch_for(made, crops):
    share = len(crops) // world_size()
    mine = crops[rank() * share : (rank() + 1) * share]
    draws = Draws(0, "augment", 2, rows=share, rank=rank(), world=world_size())
    batch = made.augment({"crops": [mine], "index": torch.arange(share)}, draws)
    return {**batch, "views": [x.double() for x in batch["views"]]}


def pictures(count=6, side=12):
    return (pixels(count, 3, side, side) * 255).byte()


@pytest.mark.parametrize("copies", ["all", "one"])
def test_the_loss_is_its_formula(copies):
    made = method(copies, flip=0.0).eval()
    batch = batch_for(made, pictures())
    upright = (
        method("all", flip=0.0)
        .augment({"crops": [pictures()], "index": torch.arange(6)}, Draws(0, rows=6))["views"][0][
            :6
        ]
        .double()
    )
    turns = batch["target"].view(-1, 6).tolist()
    assert [sorted(set(t)) for t in turns] == (
        [[r] for r in range(4)] if copies == "all" else [sorted(set(turns[0]))]
    )
    total, right = 0.0, 0
    for row in turns:
        for x, r in zip(upright, row, strict=True):
            logits = made.head(made.backbone(torch.rot90(x, r, (-2, -1))[None]))[0].tolist()
            total += math.log(sum(map(math.exp, logits))) - logits[r]
            right += logits.index(max(logits)) == r
    count = 6 * len(turns)
    assert made.loss(batch)["rotation"].item() == pytest.approx(total / count, rel=1e-6)
    assert made.measure(batch, 0)["accuracy"].item() == pytest.approx(right / count)


def test_all_copies_are_balanced():
    batch = batch_for(method(), pictures(5))
    assert batch["target"].bincount().tolist() == [5] * 4
    assert batch["views"][0].shape[0] == 20


def test_pictures_without_an_up_cost_log_four_at_least():
    quarter = pictures(4)[:, :, :6, :6]
    top = torch.cat([quarter, rotate(quarter, 3)], -1)
    same = torch.cat([top, top.flip(-1, -2)], -2)  # looks the same in all four turns
    assert all(torch.equal(rotate(same, r), same) for r in range(4))
    made = method(flip=0.0)
    for seed in range(3):
        torch.manual_seed(seed)
        torch.nn.init.normal_(made.head.weight)
        loss = made.eval().loss(batch_for(made, same))["rotation"].item()
        assert loss >= math.log(4) - 1e-9
    torch.nn.init.zeros_(made.head.weight)
    torch.nn.init.zeros_(made.head.bias)
    assert made.loss(batch_for(made, same))["rotation"].item() == pytest.approx(math.log(4))


def shown(mirror_after):
    """What a network meets for each answer, where images come with their mirror images."""
    x = pictures(1)
    met = {r: set() for r in range(4)}
    for image in (x, x.flip(-1)):
        for flip in (0.0, 1.0):
            made = Rotations(Views([[Flip(p=0.0 if mirror_after else flip)]]))
            out = made({"crops": [image]}, Draws(0, rows=1))
            for view, r in zip(out["views"][0], out["target"].tolist(), strict=True):
                view = view.flip(-1) if mirror_after and flip else view
                met[r].add(tuple(view.flatten().tolist()))
    return met


def test_a_flip_after_the_turn_would_make_answers_ambiguous():
    first, after = shown(mirror_after=False), shown(mirror_after=True)
    assert all(len(first[r]) == 2 for r in range(4))
    assert not any(first[r] & first[s] for r in range(4) for s in range(r))
    assert after[1] == after[3]  # a quarter and its opposite: the same pictures


def test_the_papers_alexnet_has_its_hidden_layers_in_the_trunk():
    net = AlexNet(norm="batch", features="grid", hidden=[20, 12])
    made = method(net=net)
    assert made.head.in_features == net.dim == 12
    assert [tuple(p.shape) for n, p in net.named_parameters() if n.startswith("classifier")] == [
        (20, 9216),
        (12, 20),
    ]
    assert made.loss(batch_for(made, pictures(2, 64)))["rotation"].isfinite()


def gradients():
    found = {}
    for copies in ("all", "one"):
        made = method(copies).train()
        value = made.loss(batch_for(made, pictures()))["rotation"]
        value.backward()
        grads = [mean(p.grad).flatten() for p in made.parameters() if p.grad is not None]
        found |= {f"value {copies}": mean(value), f"gradient {copies}": torch.cat(grads)}
    return found


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(world):
    one = gradients()
    for found in on_processes(world, gradients):
        for name, value in one.items():
            near(found[name], value, 1e-8)


@pytest.mark.parametrize("copies", ["all", "one"])
def test_pictures_show_the_question_and_the_answer(copies):
    made = method(copies, flip=0.0).eval()
    crops = pictures(6, 24)
    batch = batch_for(made, crops)
    upright = crops.double() / 255

    class Answers(nn.Module):  # right for all images but the last
        def forward(self, h):
            rows = torch.arange(6) + (torch.arange(6) % 4 * 6 if copies == "all" else 0)
            right = batch["target"][rows].clone()
            right[-1] = (right[-1] + 1) % 4
            return F.one_hot(right, 4).double()

    made.head = Answers()
    shown = made.pictures(batch)
    seen, back = shown["turned"], shown["turned back by the answer"]
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(back[:5][inside].double(), upright[:5][inside], atol=1e-5, rtol=0)
    assert not torch.allclose(back[5][inside].double(), upright[5][inside], atol=0.1)
    if copies == "all":  # the turns take turns
        torch.testing.assert_close(seen[1].double(), rotate(upright[1], 1), atol=1e-5, rtol=0)
    assert (back[:5, 1, 0] > back[:5, 0, 0]).all()  # green
    assert (back[5, 0, 0] > back[5, 1, 0]).all()  # red
