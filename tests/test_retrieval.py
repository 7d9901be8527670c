"""`retrieval`: neighbours of images and patches, without the query and what equals it."""

import pytest
import torch
import torch.nn.functional as F
from test_evaluate import Net
from test_unsupervised_scores import Cut

from unlabeled.draws import Draws
from unlabeled.evaluate.retrieval import Retrieval, neighbours
from unlabeled.evaluate.suite import evaluate
from unlabeled.report import html


def test_neighbours_equal_a_loop():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=g)
    owner = torch.arange(24) // 3
    pixels = torch.randint(0, 256, (24, 3, 2, 2), generator=g).to(torch.uint8)
    x[20], pixels[20] = x[1], pixels[1]  # a duplicate in another image
    x[21] = x[4]  # the same features of other pixels: a neighbour
    near, similarity = neighbours(x, owner, pixels, 6, "cpu")
    u = F.normalize(x, dim=1)
    for i in range(24):
        good = [
            j for j in range(24) if owner[j] != owner[i] and not torch.equal(pixels[i], pixels[j])
        ]
        best = sorted(good, key=lambda j: (-round(float(u[i] @ u[j]), 5), j))[:6]
        torch.testing.assert_close(similarity[i], torch.stack([u[i] @ u[j] for j in best]))
        assert near[i].tolist() == best
    assert 20 not in near[1].tolist()
    assert near[4, 0] == 21


def test_many_duplicates_are_looked_past():
    x, pixels = torch.ones(40, 3), torch.zeros(40, 3, 2, 2, dtype=torch.uint8)
    x[38:] = torch.tensor([[1.0, 0.5, 1.0], [1.0, 0.0, 1.0]])
    pixels[38:] = 9
    near, _ = neighbours(x, torch.arange(40), pixels, 2, "cpu")
    assert near[0].tolist() == [38, 39]
    assert set(near[38].tolist()) <= set(range(38))


def test_patches_are_parts_of_their_image():
    crop = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    crop = crop.to(torch.uint8)
    found = Retrieval(patches=5, share=1.0)._cut(crop, Draws("a", rows=3))
    assert torch.equal(found, crop.repeat_interleave(5, 0))
    half = Retrieval(patches=5, share=0.5)
    constant = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 8, 8)
    assert torch.equal(half._cut(constant, Draws("a", rows=3)), constant.repeat_interleave(5, 0))
    # A ramp says where a patch was: its mean is the place of its centre.
    ramp = torch.arange(8.0).mul(30).to(torch.uint8).view(1, 1, 1, 8).expand(200, 3, 8, 8)
    places = half._cut(ramp, Draws("b", rows=200)).float().mean((1, 2, 3)) / 30 - 1.5
    assert sorted(set(places.round().tolist())) == [0, 1, 2, 3, 4]


def test_classes_are_found_and_shown(tmp_path):
    torch.manual_seed(0)
    scores = evaluate(
        {"retrieval": Retrieval(k=[1, 5], patches=2, queries=3)},
        backbone=Net(),
        random_backbone=Net(),
        data=Cut(noise=2, classes=4, test=48),
        out=tmp_path,
        seed=0,
    )
    names = {f"retrieval/{kind}/recall@{k}" for kind in ("image", "patch") for k in (1, 5)}
    for prefix in ("", "baseline/random/", "baseline/pixels/"):
        assert {prefix + name for name in names} <= set(scores.values)
    assert scores.values["retrieval/image/recall@1"] > 0.9
    assert scores.values["retrieval/image/recall@5"] >= scores.values["retrieval/image/recall@1"]
    assert scores.details["retrieval/patch/recall@1"]["n"] == 48  # images, not patches
    scores.write(tmp_path)
    page = html.write(tmp_path).read_text()
    assert "Nearest neighbours of patches" in page


def test_without_labels_there_are_sheets_only(tmp_path):
    data = Cut(noise=2, test=30)
    data.y = dict.fromkeys(data.y)
    scores = evaluate(
        {"retrieval": Retrieval()}, backbone=Net(), data=data, out=tmp_path, seed=0, explicit=True
    )
    assert not scores.values
    assert "retrieval/image" in scores.figures


def test_too_few_images_are_an_obstacle():
    assert Retrieval().obstacle(Cut(test=8)) == "it needs 11 test images, there are 8"


@pytest.mark.parametrize(
    "bad", [{"k": [0]}, {"patches": -1}, {"share": 1.5}, {"limit": 4}, {"queries": 0}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Retrieval(**bad)
