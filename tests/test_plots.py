"""Figures of evaluations: written with the scores, drawn in the report."""

import numpy as np
import pytest
import torch
from test_evaluate import Fake, run

from unlabeled.evaluate.contract import Result
from unlabeled.report import html, plots
from unlabeled.report.run import read

CURVES = {
    "kind": "curves",
    "title": "Low <shot>",
    "x": np.array([1, 4, 16]),
    "y": np.array([[0.1, 0.2, 0.4], [0.1, np.nan, 0.3]]),
    "low": np.array([[0.05, 0.1, 0.3], [0.05, np.nan, 0.2]]),
    "high": np.array([[0.15, 0.3, 0.5], [0.15, np.nan, 0.4]]),
    "names": np.array(["res4", "res5"]),
    "xlabel": "images",
    "log": True,
    "percent": True,
}
POINTS = {
    "kind": "points",
    "title": "Invariance",
    "note": "left is better",
    "x": np.array([0.5, 1.5]),
    "y": np.array([0.2, 0.4]),
    "names": np.array(["conv1", "r&s"]),
}
SHEET = {
    "kind": "sheet",
    "title": "Found",
    "titles": np.array(["input", "output"]),
    "column0": np.zeros((2, 4, 4, 3), np.uint8),
    "column1": np.ones((2, 4, 4, 3), np.uint8),
}


class Draws:
    data = None
    splits = frozenset({"test"})
    needs_labels = False

    def tune(self, subject):
        own = {"protocol": "t", "stage": "final", "hyperparameters": {}, "selection": "none"}
        figures = {"low": CURVES, "points": POINTS, "sheet": SHEET}
        return Result({"one": 1.0}, {"one": own}, {"one": torch.ones(3)}, figures)


def test_figures_travel_from_the_evaluation_to_the_page(tmp_path):
    scores = run(tmp_path, Fake(), {"draws": Draws()})
    assert set(scores.figures) == {
        f"{prefix}draws/{name}"
        for prefix in ("", "baseline/random/")
        for name in ("low", "points", "sheet")
    }
    scores.write(tmp_path)
    assert (tmp_path / "figures/baseline.random.draws.low.npz").exists()
    assert next(iter(read(tmp_path).figures)) == "draws.low"  # the trained backbone's first
    page = html.write(tmp_path).read_text()
    assert page.count("Low &lt;shot&gt;") == 2
    assert page.count("Low &lt;shot&gt;: random initialisation") == 1
    assert "left is better" in page
    assert "r&amp;s" in page
    assert page.count('alt="output"') == 4


def test_curves_break_where_there_is_no_value():
    drawing = plots.curves(CURVES)
    assert drawing.count('class="line') == 2
    assert drawing.count("<circle") == 5
    assert drawing.count('class="band') == 2
    assert "nan" not in drawing
    assert ">16<" in drawing


def test_a_logarithmic_axis_spaces_factors_alike():
    import re

    found = re.findall(r'cx="([\d.]+)"', plots.curves({**CURVES, "y": CURVES["y"][:1]}))
    a, b, c = map(float, found)
    assert b - a == pytest.approx(c - b, abs=0.2)


def test_points_skip_what_is_no_number():
    drawing = plots.points({**POINTS, "x": np.array([0.5, np.nan]), "y": np.array([0.2, 0.3])})
    assert drawing.count("<circle") == 1


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="unknown kind 'pie'"):
        plots.figure("x", {"kind": "pie"})
