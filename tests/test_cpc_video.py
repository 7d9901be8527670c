"""CPC over time: the loss by loops, no look into the future, which frames compete."""

import math
from typing import ClassVar

import pytest
import torch
from processes import mean, on_processes
from test_relative_position import alone, near
from torch import nn

from unlabeled.batch import denormalize
from unlabeled.dist import rank, world_size
from unlabeled.methods.cpc_video import CPCVideo
from unlabeled.parts.causal import Past


class Map(nn.Module):
    """A map of four channels, whose average are the features."""

    dim: ClassVar[int] = 4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, self.dim, 3, padding=1)

    def forward(self, x):
        return self.stages(x)["res5"].mean((2, 3))

    def stages(self, x):
        return {"res5": self.conv(x)}


def method(**options):
    torch.manual_seed(0)
    given = {"side": 2, "widths": [5], "dim": 6, "steps": 2, **options}
    made = alone(CPCVideo(Map(), nn.Identity(), None, **given).double())
    with torch.no_grad():
        for layer in made.predict:
            layer.weight.mul_(20)  # so that the loss is far from its start
    return made


def clips(rows=6, frames=5):
    g = torch.Generator().manual_seed(2)
    x = torch.randn(rows, frames, 3, 6, 6, generator=g, dtype=torch.float64)
    share = rows // world_size()
    some = x[rank() * share : (rank() + 1) * share]
    return {"views": [some], "index": torch.arange(share)}


@pytest.mark.parametrize("context", ["gru", "conv", "none"])
def test_the_loss_is_its_formula(context):
    made, batch = method(context=context), clips()
    (x,) = batch["views"]
    z = torch.stack([made.places(made.backbone, clip)[1] for clip in x]).detach()  # 6 5 D
    c = torch.stack([made.past(row[None])[0] for row in z]).detach()
    steps, wins = [], []
    for k, layer in enumerate(made.predict, 1):
        terms = []
        for b in range(6):
            for t in range(5 - k):
                p = layer.weight.detach() @ c[b, t]
                scores = {(i, s): float(z[i, s] @ p) for i in range(6) for s in range(5)}
                right = scores[b, t + k]
                terms.append(math.log(sum(map(math.exp, scores.values()))) - right)
                wins.append((k, sum(s >= right for s in scores.values()) == 1))
        assert len(terms) == 6 * (5 - k)
        steps.append(sum(terms) / len(terms))
    found = made.measure(batch, 0)
    assert found["prediction"].item() == pytest.approx(sum(steps) / 2, rel=1e-9)
    share = [sum(w for j, w in wins if j == k) / (6 * (5 - k)) for k in (1, 2)]
    assert found["accuracy"].item() == pytest.approx(sum(share) / 2)


@pytest.mark.parametrize("negatives", [0, 7])
def test_without_a_prediction_it_costs_the_logarithm_of_the_candidates(negatives):
    made = method(negatives=negatives, chunk=4)
    with torch.no_grad():
        for layer in made.predict:
            layer.weight.zero_()
    loss = made.loss(clips())["prediction"].item()
    assert loss == pytest.approx(math.log(1 + negatives if negatives else 30), rel=1e-12)


@pytest.mark.parametrize(("kind", "sees"), [("gru", 99), ("conv", 4), ("none", 1)])
def test_contexts_see_the_past_and_not_the_future(kind, sees):
    """Bit for bit what it was before later frames changed; and it does see earlier ones."""
    torch.manual_seed(0)
    past = Past(3, kind, dim=5, blocks=2 if kind == "gru" else 1, reach=4)
    z = torch.randn(2, 9, 3)
    whole = past(z)
    assert whole.shape == (2, 9, 5)
    for t in range(9):
        later = z.clone()
        later[:, t + 1 :] = torch.randn(2, 8 - t, 3) * 100
        assert torch.equal(past(later)[:, : t + 1], whole[:, : t + 1])
        changed = z.clone()
        changed[:, t] += 1
        moved = (past(changed) - whole).abs().amax((0, 2)) > 0
        assert moved.tolist() == [t <= s < t + sees for s in range(9)]


def test_predictions_do_not_know_later_frames():
    made = method().eval()
    (x,) = clips()["views"]
    other = x.clone()
    other[:, 3:] = 9
    with torch.no_grad():
        rows = [
            made.places(made.backbone, v.flatten(0, 1))[1].unflatten(0, (6, 5)) for v in (x, other)
        ]
        before, after = (made.predict[0](made.past(z)) for z in rows)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_drawn_negatives_never_are_the_frame_itself():
    made = method(negatives=1000)
    own = torch.arange(30)
    drawn = made._rivals(1, torch.empty(6, 5, 1), own, 30)
    assert drawn.shape == (30, 1000)
    assert not (drawn == own[:, None]).any()
    assert all(len(row.unique()) == 29 for row in drawn)  # any of the others


def test_within_a_clip_its_own_frames_compete_and_no_others():
    made, batch = method(among="clip", chunk=4), clips()
    own = torch.arange(30)
    rivals = made._rivals(1, torch.empty(6, 5, 1), own, 30)
    for i, row in enumerate(rivals.tolist()):
        assert sorted(row) == [j for j in range(i // 5 * 5, i // 5 * 5 + 5) if j != i]
    with torch.no_grad():
        (x,) = batch["views"]
        z = made.places(made.backbone, x.flatten(0, 1))[1].unflatten(0, (6, 5))
        c, terms = made.past(z), []
        for k, layer in enumerate(made.predict, 1):
            scores = torch.stack([z[b] @ layer(c[b, t]) for b in range(6) for t in range(5 - k)])
            right = torch.tensor([t + k for _ in range(6) for t in range(5 - k)])
            terms.append(torch.nn.functional.cross_entropy(scores, right))
    near(made.loss(batch)["prediction"], torch.stack(terms).mean())
    with pytest.raises(ValueError, match="negatives=3 must be 0"):
        method(among="clip", negatives=3)


def test_chunks_change_nothing():
    found = []
    for chunk in (None, 3):
        made = method(chunk=chunk)
        loss = made.loss(clips())["prediction"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in made.parameters())])
    for a, b in zip(*found, strict=True):
        near(a, b, atol=1e-12)


def alike(**options):
    made = method(**options)
    loss = made.loss(clips())["prediction"]
    loss.backward()
    return [mean(loss.detach()), *(mean(p.grad) for p in made.parameters())]


def drawn():
    return alike(negatives=5)


def within():
    return alike(among="clip")


@pytest.mark.parametrize("function", [alike, drawn, within])
def test_processes_equal_one(function):
    one = function()
    for found in on_processes(2, function):
        for a, b in zip(one, found, strict=True):
            near(a, b, atol=1e-12)


@pytest.mark.parametrize("among", ["batch", "clip"])
def test_pictures_show_what_is_taken_for_the_future(among):
    made, batch = method(among=among), clips()
    columns = made.pictures(batch)
    assert list(columns) == ["now", "2 later", "answer"]
    (x,) = batch["views"]
    _, z = made._embedded(batch)
    shown = [denormalize(clip).clamp(0, 1) for clip in x]
    for b in range(6):
        p = made.predict[1].weight @ made.past(z[b][None])[0, 2]
        asked = [b] if among == "clip" else range(6)
        i, t = max(((i, t) for i in asked for t in range(5)), key=lambda at: float(p @ z[at]))
        assert torch.equal(columns["now"][b], shown[b][2])
        assert torch.equal(columns["2 later"][b], shown[b][4])
        assert torch.equal(columns["answer"][b], shown[i][t])


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(ValueError, match="decode=clip"):
        method(steps=5).loss(clips())
    with pytest.raises(ValueError, match="decode=clip"):
        method().loss({"views": [torch.zeros(2, 3, 6, 6)], "index": torch.arange(2)})
    for options, said in (
        ({"steps": 0}, "steps=0"),
        ({"context": "lstm"}, "context must be gru"),
        ({"chunk": 0}, "chunk=0"),
        ({"negatives": -1}, "negatives=-1"),
        ({"dim": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            method(**options)
