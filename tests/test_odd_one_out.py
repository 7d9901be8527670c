"""The odd one out: how elements are drawn, the loss by loops, what must not matter."""

import itertools
import math

import pytest
import torch
from processes import mean, on_processes
from test_cpc_video import Map
from test_relative_position import alone, near

from unlabeled.augment.geometry import Flip
from unlabeled.augment.odd_one_out import OddOneOut as Question
from unlabeled.augment.odd_one_out import in_order
from unlabeled.augment.views import Views
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods.odd_one_out import OddOneOut


def asked(rows=400, clip=9, seed=0, **options):
    """Frame t of a clip shows t, in every recording."""
    crops = (10 * torch.arange(clip)).view(1, clip, 1, 1, 1).expand(rows, -1, 3, 4, 4)
    frames = 2 * torch.arange(clip).expand(rows, -1) + 5
    given = {"elements": 3, "frames": 4, **options}
    question = Question(Views([[Flip(p=0.5)]]), **given)
    batch = {"crops": [crops.to(torch.uint8).contiguous()], "frames": frames}
    return question({**batch, "index": torch.arange(rows)}, Draws(seed, rows=rows))


@pytest.mark.parametrize("reversals", [True, False])
def test_one_element_is_out_of_order_and_the_answer_says_which(reversals):
    made = asked(3000, reversals=reversals)
    frames, target = made["frames"], made["target"]
    assert frames.shape == (3000, 3, 4)
    right = in_order(frames)
    assert torch.equal((~right).long().argmax(1), target)
    assert ((~right).sum(1) == 1).all()
    assert ((frames.amax(2) - frames.amin(2)) == 6).all()  # consecutive, of every second
    assert (target.bincount() / 3000 - 1 / 3).abs().max() < 0.03
    odd = frames[torch.arange(3000), target]
    orders = {tuple(row) for row in odd.argsort(1).argsort(1).tolist()}
    expected = set(itertools.permutations(range(4))) - {(0, 1, 2, 3)}
    assert orders == (expected if reversals else expected - {(3, 2, 1, 0)})
    starts = frames.amin(2).sub(5).div(2, rounding_mode="floor")
    assert set(starts.flatten().tolist()) == set(range(6))


def test_elements_show_the_frames_that_are_named():
    made = asked(50)
    (x,) = made["views"]
    shown = ((x * 0.229 + 0.485) * 255 / 10).round()[:, :, :, 0, 0, 0]
    assert torch.equal(2 * shown.long() + 5, made["frames"])


def method(**options):
    torch.manual_seed(0)
    question = Question(Views([[]]), elements=3, frames=4)
    given = {"side": 2, "widths": [5], "hidden": [6], **options}
    return alone(OddOneOut(Map(), question, None, **given).double())


def batch_of(rows=6):
    g = torch.Generator().manual_seed(4)
    x = torch.randn(rows, 3, 4, 3, 6, 6, generator=g, dtype=torch.float64)
    target = torch.arange(rows) % 3
    share = rows // world_size()
    some = slice(rank() * share, (rank() + 1) * share)
    return {"views": [x[some]], "target": target[some], "index": torch.arange(share)}


@pytest.mark.parametrize("encoder", ["differences", "dynamic"])
@pytest.mark.parametrize("fusion", ["differences", "concatenate"])
def test_the_loss_is_its_formula(encoder, fusion):
    made, batch = method(encoder=encoder, fusion=fusion), batch_of()
    total, right = 0.0, 0
    for elements, y in zip(batch["views"][0], batch["target"].tolist(), strict=True):
        h = []
        for v in elements:
            if encoder == "dynamic":
                e = sum((2 * t - 4 - 1) * v[t - 1] for t in range(1, 5))
            else:
                stack = torch.cat([v[t + 1] - v[t] for t in range(3)])  # 9 H W
                weight = made.mix.weight[:, :, 0, 0]
                e = torch.stack(
                    [sum(w * s for w, s in zip(row, stack, strict=True)) for row in weight]
                )
            h.append(made.places(made.backbone, e[None])[1][0])
        if fusion == "concatenate":
            logits = made.head(torch.cat(h)).tolist()
        else:
            logits = [made.head(sum(a - b for b in h)).item() for a in h]
        total += math.log(sum(map(math.exp, logits))) - logits[y]
        right += logits.index(max(logits)) == y
    found = made.measure(batch, 0)
    assert found["odd"].item() == pytest.approx(total / 6, rel=1e-9)
    assert found["accuracy"].item() == pytest.approx(right / 6)


@pytest.mark.parametrize("encoder", ["differences", "dynamic"])
def test_a_still_clip_shows_nothing_in_any_order_and_costs_the_logarithm(encoder):
    made, batch = method(encoder=encoder), batch_of()
    still = batch["views"][0][:, :1, :1].expand(-1, 3, 4, -1, -1, -1)
    assert made.encode(still.flatten(0, 1)).abs().max() < 1e-12
    loss = made.loss({**batch, "views": [still]})["odd"].item()
    assert loss == pytest.approx(math.log(3), rel=1e-9)


def test_elements_that_change_places_change_their_logits():
    made, batch = method(), batch_of()
    order = torch.tensor([2, 0, 1])
    moved = {**batch, "views": [batch["views"][0][:, order]]}
    torch.testing.assert_close(made._answer(moved)[0], made._answer(batch)[0][:, order])


def alike():
    made = method()
    loss = made.loss(batch_of())["odd"]
    loss.backward()
    return [mean(loss.detach()), *(mean(p.grad) for p in made.parameters())]


def test_processes_equal_one():
    one = alike()
    for found in on_processes(2, alike):
        for a, b in zip(one, found, strict=True):
            near(a, b, atol=1e-12)


def test_pictures_mark_the_odd_one_and_the_mistake():
    made, batch = method(), batch_of()
    columns = made.pictures(batch)
    assert list(columns) == ["element 1", "element 2", "element 3"]
    answer = made._answer(batch)[0].argmax(1).tolist()
    for i, picture in enumerate(columns.values()):
        assert picture.shape == (6, 3, 6, 6)
        for row, y in enumerate(batch["target"].tolist()):
            green = torch.allclose(picture[row, :, 0, 0], torch.tensor([0.0, 0.62, 0.45]).double())
            red = torch.allclose(picture[row, :, 0, 0], torch.tensor([0.84, 0.37, 0.0]).double())
            assert (green, red) == (i == y, i == answer[row] != y)


def test_what_is_no_clip_or_too_short_is_refused():
    with pytest.raises(ValueError, match="hold no sequence of 4"):
        asked(2, clip=3)
    question = Question(Views([[]]), elements=3, frames=4)
    with pytest.raises(ValueError, match="decode=clip"):
        question({"crops": [torch.zeros(2, 3, 4, 4).byte()]}, Draws(0, rows=2))
    for options, said in (
        ({"elements": 1}, "elements=1"),
        ({"frames": 9}, "frames must be"),
        ({"frames": 2, "reversals": False}, "frames must be"),
    ):
        with pytest.raises(ValueError, match=said):
            asked(2, **options)
    for options, said in (({"encoder": "x"}, "encoder must"), ({"fusion": "x"}, "fusion must")):
        with pytest.raises(ValueError, match=said):
            method(**options)
