"""The losses of images with several labels against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from unlabeled.methods.supervised import Supervised, of_tags
from unlabeled.parts.labels import multi_hot

TAGS = torch.tensor([[2, 0, -1], [1, -1, -1], [4, 3, 0]])


def logits(b=3, c=5):
    return torch.randn(b, c, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_multi_hot():
    assert multi_hot(TAGS, 5).tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 1, 1]]
    assert multi_hot(torch.tensor([[-1, -1]]), 2).tolist() == [[0, 0]]


def test_losses_are_their_formulas():
    s = logits()
    softmax = sigmoid = 0.0
    for row, tags in zip(s.tolist(), TAGS.tolist(), strict=True):
        has = [j for j in tags if j >= 0]
        total = math.log(sum(math.exp(x) for x in row))
        softmax -= sum(row[j] - total for j in has) / len(has) / len(s)
        for c, x in enumerate(row):
            p = 1 / (1 + math.exp(-x))
            sigmoid -= math.log(p if c in has else 1 - p) / s.numel()
    assert of_tags(s, TAGS, "softmax", 0.0).item() == pytest.approx(softmax, rel=1e-12)
    assert of_tags(s, TAGS, "sigmoid", 0.0).item() == pytest.approx(sigmoid, rel=1e-12)
    smooth = 0.9 * softmax - 0.1 * s.log_softmax(1).mean().item()
    assert of_tags(s, TAGS, "softmax", 0.1).item() == pytest.approx(smooth, rel=1e-12)


def test_one_tag_is_a_label_and_several_are_one_drawn_at_random():
    s = logits()
    label = torch.tensor([2, 0, 4])
    alone = torch.stack([label, torch.full((3,), -1)], 1)
    expected = F.cross_entropy(s, label).item()
    assert of_tags(s, alone, "softmax", 0.0).item() == pytest.approx(expected, rel=1e-12)
    row = s[2:].expand(3, -1)  # the mean over its three tags
    mean = F.cross_entropy(row, TAGS[2]).item()
    assert of_tags(s[2:], TAGS[2:], "softmax", 0.0).item() == pytest.approx(mean, rel=1e-12)
    order = TAGS[:, [2, 0, 1]]
    for targets in ("softmax", "sigmoid"):
        assert of_tags(s, order, targets, 0.0) == of_tags(s, TAGS, targets, 0.0)


def test_half_precision_is_raised():
    s = 30 * logits().to(torch.bfloat16)
    for targets in ("softmax", "sigmoid"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = of_tags(s, TAGS, targets, 0.0)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, of_tags(s.float(), TAGS, targets, 0.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": "tags"}, "targets must be label, softmax or sigmoid, got 'tags'"),
        ({"targets": "softmax", "label_noise": 0.1}, "label_noise=0.1 is of targets=label"),
        ({"targets": "sigmoid", "label_smoothing": 0.1}, "is not of targets=sigmoid"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    backbone = torch.nn.Identity()
    backbone.dim = 4
    with pytest.raises(ValueError, match=said):
        Supervised(backbone, torch.nn.Identity(), None, **settings)
