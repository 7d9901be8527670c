"""scripts/correspondence.py: which pairs are asked about, and how answers are counted."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts/correspondence.py"
COUNT = 5


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("correspondence", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Data:
    """Recordings whose pictures and sounds are their positions, at moments that are their turns."""

    batch_size, decode = 2, None

    def __init__(self, count=COUNT):
        self.count, self.asked = count, []

    def size(self, split):
        return self.count

    def cut(self, split, parts, decode, *key):
        self.asked.append((split, key))
        for part in parts:
            yield {"index": torch.tensor(part)}


def method(answer):
    """One that says whether a picture and a sound belong together by a function of positions."""

    def logits(v, a):
        pairs = zip(v.tolist(), a.tolist(), strict=True)
        same = torch.tensor([bool(answer(i, j)) for i, j in pairs])
        return torch.stack([~same, same], 1).float()

    views = SimpleNamespace(backbone=lambda x: x, sound=lambda x: x, logits=logits)
    views.augmented = lambda batch, key: {"views": [batch["index"], batch["index"]]}
    return views


def test_a_pair_of_each_kind_is_asked_of_every_recording_in_every_round(script):
    met = []
    data = Data()
    right = script.answers(method(lambda i, j: met.append((i, j)) or i == j), data, rounds=4)
    assert right.shape == (4, COUNT, 2)
    assert (right == 1).all()
    own = [pair for pair in met if pair[0] == pair[1]]
    others = [pair for pair in met if pair[0] != pair[1]]
    assert sorted(own) == sorted([(i, i) for i in range(COUNT)] * 4)
    # over four rounds each of the other recordings' sounds, once
    assert sorted(others) == [(i, j) for i in range(COUNT) for j in range(COUNT) if i != j]
    assert data.asked == [("test", ("pairs", turn)) for turn in range(4)]


def test_who_always_says_the_same_is_right_in_half_of_the_pairs(script):
    for always in (True, False):
        right = script.answers(method(lambda i, j, x=always: x), Data(), rounds=2)
        assert right.mean() == 0.5
        assert right[..., 0].mean() == always


def test_one_recording_has_no_other(script):
    with pytest.raises(ValueError, match="needs two, and there are 1"):
        script.answers(method(lambda i, j: True), Data(1), rounds=1)
