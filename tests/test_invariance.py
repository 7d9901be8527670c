"""`invariance`: distances of features under transforms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evaluate import Net
from test_unsupervised_scores import Cut
from torch import nn

from unlabeled.augment.geometry import Flip
from unlabeled.augment.probes import Noise, Shuffle, Turn, Zoom
from unlabeled.batch import normalize
from unlabeled.data.decode import Center
from unlabeled.data.images import Images
from unlabeled.data.scenes import Scenes
from unlabeled.draws import Draws, subset
from unlabeled.evaluate.invariance import Invariance
from unlabeled.evaluate.suite import evaluate
from unlabeled.report import html
from unlabeled.report.scores import headline, rows
from unlabeled.scenes.world import FACTORS

ALL = {"turn": Turn(), "shuffle": Shuffle(grid=2), "flip": Flip(p=1.0)}


class Mean(nn.Module):
    """The mean colour, which no permutation of pixels changes, beside a stage that sees places."""

    dim = 3

    def stages(self, x):
        return {"corner": x[:, :, :2, :2], "whole": x}

    def forward(self, x):
        return x.mean((2, 3))


def test_probes_move_pixels_as_they_say():
    x = torch.rand(6, 3, 9, 9)
    draws = Draws("p", rows=6)
    turned = Turn()(x.clone(), draws)
    for before, after in zip(x, turned, strict=True):
        assert any(torch.equal(torch.rot90(before, k, (1, 2)), after) for k in (1, 2, 3))
        assert not torch.equal(before, after)
    moved = Shuffle(grid=3)(x.clone(), Draws("p", rows=6))
    order = Draws("p", rows=6).permutations(9)
    for b in range(6):
        for slot in range(9):
            tile = int(order[b, slot])
            (r, c), (i, j) = divmod(slot, 3), divmod(tile, 3)
            assert torch.equal(
                moved[b, :, 3 * r : 3 * r + 3, 3 * c : 3 * c + 3],
                x[b, :, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3],
            )
    ragged = torch.rand(2, 3, 8, 8)
    assert torch.equal(
        Shuffle(grid=3)(ragged.clone(), Draws("q", rows=2))[..., 6:, :], ragged[..., 6:, :]
    )
    torch.testing.assert_close(Zoom(share=1.0)(x.clone(), draws), x)
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(50, 3, 8, 8)
    zoomed = Zoom(share=0.25)(ramp.clone(), Draws("z", rows=50))
    step = zoomed[..., 1:] - zoomed[..., :-1]
    torch.testing.assert_close(step[..., 2:5], torch.full_like(step[..., 2:5], 0.5))
    noisy = Noise(sigma=0.05)(torch.full((8, 3, 20, 20), 0.5), Draws("n", rows=8))
    assert noisy.std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize(
    ("make", "bad"),
    [(Shuffle, {"grid": 1}), (Zoom, {"share": 0.0}), (Noise, {"sigma": -1.0})],
)
def test_bad_probes_are_named(make, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_what_is_invariant_scores_zero_and_what_is_not_does_not(tmp_path):
    data = Cut(noise=40)
    scores = evaluate(
        {"inv": Invariance(transforms=ALL)}, backbone=Mean(), data=data, out=tmp_path, seed=0
    )
    for name in ALL:
        assert scores.values[f"inv/whole/{name}/relative"] == pytest.approx(0, abs=1e-5)
        assert scores.values[f"inv/corner/{name}/relative"] > 0.05
    x = normalize(data.pixels["test"].float() / 255)
    f = F.normalize(x[:, :, :2, :2].mean((2, 3)), dim=1)
    g = F.normalize(x.flip(-1)[:, :, :2, :2].mean((2, 3)), dim=1)
    expected = (f - g).norm(dim=1).mean().item()
    assert scores.values["inv/corner/flip/distance"] == pytest.approx(expected, rel=1e-4)
    details = scores.details["inv/corner/flip/relative"]
    assert scores.values["inv/corner/flip/relative"] == pytest.approx(
        expected / details["between_images"], rel=1e-4
    )
    assert details["better"] == "neither"
    low, high = details["ci95"]
    assert low < scores.values["inv/corner/flip/relative"] < high
    each = [scores.values[f"inv/corner/{name}/relative"] for name in ALL]
    assert scores.values["inv/corner/mean/relative"] == pytest.approx(np.mean(each))
    assert list(scores.values)[-1] == "baseline/pixels/inv/pixels/mean/relative"
    for stage in ("whole", "corner"):
        drawn = scores.figures[f"inv/histogram_{stage}"]
        assert list(drawn["names"]) == [*ALL, "another image"]
        assert drawn["y"].sum(1) == pytest.approx(np.ones(len(ALL) + 1))
    assert scores.figures["inv/histogram_whole"]["y"][0, 0] == 1  # it does not move
    scores.write(tmp_path)
    page = html.write(tmp_path).read_text()
    assert "Invariance of every stage" in page
    assert page.count("<h2>Distances under transforms, by stage</h2>") == 1  # both share a panel
    assert 0 < page.index("<h3>corner</h3>") < page.index("<h3>whole</h3>")  # in their order


def test_factors_of_rendered_scenes_are_redrawn_one_at_a_time(tmp_path):
    """By hand; a factor that is held fixed moves nothing, whoever looks."""
    layout = Scenes(size=16, train=20, test=30, finer=1, vary={"colour": 0.0})
    cut = {"decode": Center(size=16), "eval_decode": Center(size=16)}
    data = Images(root=str(tmp_path), layout=layout, batch_size=4, **cut)
    data.setup("test")
    evals = {"inv": Invariance(transforms={"flip": Flip(p=1.0)}, redrawn=10)}
    scores = evaluate(evals, backbone=Mean(), data=data, out=tmp_path, seed=0)
    chosen = subset(data.labels("test").tolist(), 30, 30, 0, "invariance").tolist()[:10]
    between = scores.details["inv/whole/flip/relative"]["between_images"]

    def features(redraw=None):
        x = normalize(layout.pictures("test", chosen, redraw).float() / 255)
        return F.normalize(x.mean((2, 3)), dim=1)

    for name in FACTORS:
        key = f"inv/whole/redrawn/{name}/relative"
        moved = (features() - features({name: 1})).norm(dim=1).mean().item()
        assert scores.values[key] == pytest.approx(moved / between, rel=1e-4, abs=1e-6)
        assert (scores.values[key] == 0) == (name == "colour")
        assert scores.details[key]["n"] == 10
        low, high = scores.details[key]["ci95"]
        assert low <= scores.values[key] <= high
        assert f"baseline/pixels/inv/pixels/redrawn/{name}/relative" in scores.values
    table = rows(scores.values, scores.details)
    assert [row.name for row in headline(table)] == ["inv/whole/mean/relative"]
    scores.write(tmp_path)
    assert "factors of the scene" in html.write(tmp_path).read_text()
    none = {"inv": Invariance(transforms={"flip": Flip(p=1.0)}, redrawn=0)}
    assert not any(
        "redrawn" in x
        for x in evaluate(none, backbone=Mean(), data=data, out=tmp_path, seed=0).values
    )


def test_it_runs_beside_its_baselines(tmp_path):
    torch.manual_seed(0)
    scores = evaluate(
        {"inv": Invariance(transforms={"noise": Noise(sigma=0.1)}, limit=20)},
        backbone=Net(end=True),
        random_backbone=Net(end=True),
        data=Cut(noise=40),
        out=tmp_path,
        seed=0,
    )
    for stage in ("one", "two", "final"):
        assert f"inv/{stage}/noise/relative" in scores.values
        assert f"baseline/random/inv/{stage}/noise/relative" in scores.values
    assert scores.details["inv/final/noise/relative"]["n"] == 20


def test_a_mean_distance_between_images_has_no_image_beside_itself():
    order = torch.randperm(7)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    assert not (other == torch.arange(7)).any()


@pytest.mark.parametrize(
    "bad",
    [
        *({"transforms": {}}, {"limit": 1}, {"redrawn": -1}),
        {"transforms": {"mean": Noise(sigma=0.1)}},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Invariance(**({"transforms": ALL} | bad))
