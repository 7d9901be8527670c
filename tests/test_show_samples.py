"""Pictures of several runs on one sheet."""

import importlib.util
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("show", ROOT / "scripts/show_samples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kept(folder, **columns):
    (folder / "figures").mkdir(parents=True)
    arrays = {f"column{i}": x for i, x in enumerate(columns.values())}
    np.savez(folder / "figures/samples.npz", titles=np.array(list(columns)), **arrays)
    return folder


def flat(value, rows=2, side=5):
    return np.full((rows, side, side, 3), value, np.uint8)


def test_what_runs_share_is_shown_once_and_the_truth_last(script, tmp_path, monkeypatch, capsys):
    first = kept(tmp_path / "a", grey=flat(10), guess=flat(20), truth=flat(30))
    second = kept(tmp_path / "b", grey=flat(10), guess=flat(25), truth=flat(30))
    out = tmp_path / "out.png"
    command = ["x", str(out), str(first), str(second), "--zoom", "2"]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    assert "grey, guess, guess (b), truth" in capsys.readouterr().out
    pixels = np.asarray(Image.open(out))
    assert pixels.shape == (2 * 10 + 4, 4 * 10 + 3 * 4, 3)
    assert pixels[3, [5, 19, 33, 47], 0].tolist() == [10, 20, 25, 30]
    assert (pixels[10:14] == 255).all()


def test_runs_on_other_pictures_are_refused(script, tmp_path):
    first = kept(tmp_path / "a", grey=flat(10))
    second = kept(tmp_path / "b", grey=flat(11, side=6))
    with pytest.raises(ValueError, match="differ"):
        script.columns([first, second])
