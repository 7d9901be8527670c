"""scripts/correspondence.py: which pairs are asked about, and how answers are counted."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import AVE_NET, SHORT
from hydra.utils import instantiate
from omegaconf import OmegaConf

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

    views = SimpleNamespace(backbone=lambda x: x, listen=lambda x: x, logits=logits)
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


def test_a_run_whose_backbone_hears_is_asked(script, compose, tmp_path, monkeypatch, capsys):
    """`method.sound=null`, as AVE-Net's."""
    shared = [*SHORT, "data.layout.train=16", f"data.root={tmp_path}", "data.workers=0"]
    config = compose("experiment=scenes/ave_net", *AVE_NET, *shared, "data.batch_size=16")
    run = tmp_path / "run"
    for folder in (".hydra", "checkpoints"):
        (run / folder).mkdir(parents=True)
    OmegaConf.save(config, run / ".hydra/config.yaml")
    state = instantiate(config.method).state_dict()
    torch.save({"state_dict": state}, run / "checkpoints/last.ckpt")
    monkeypatch.setattr(sys, "argv", ["correspondence.py", str(run), "--pairs", "50"])
    script.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["pairs"], found["recordings"]) == (64, 16)  # whole rounds of two pairs each
    both = found["own_sound"] + found["another's"]
    assert found["correspondence"] == pytest.approx(both / 2, abs=0.011)
