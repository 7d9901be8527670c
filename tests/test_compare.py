"""`compare=[RUN,...]` and the supervised baseline."""

import csv
import json
import re

import numpy as np
import pytest
from rich.console import Console
from test_runs import unlabeled

from unlabeled.report import compare, compared, html, plots, terminal
from unlabeled.report.run import read
from unlabeled.report.scores import kinds, rows

STAGES = ("conv1", "res2", "final")


def finished(folder, base, *, invariance=None, supervised=None, shots=None):
    folder.mkdir(parents=True)
    scores, details = {}, {}
    for i, stage in enumerate(STAGES):
        for prefix, value in (("", base + i / 10), ("baseline/random/", 0.2)):
            name = f"{prefix}linear/{stage}/top1"
            scores[name] = value
            details[name] = {"stage": stage, "ci95": [value - 0.01, value + 0.01]}
            details[name] |= {"protocol": "linear probe", "selection": "held-out", "seed": 7}
            details[name] |= {"split_hash": "f00", "epoch": 3}
        if supervised is not None:
            details[f"linear/{stage}/top1"]["baselines"] = {"supervised": supervised}
    for stage, value in (invariance or {}).items():
        scores[f"invariance/{stage}/crop/relative"] = value
        details[f"invariance/{stage}/crop/relative"] = {"stage": stage}
    if invariance:  # a factor of a scene, under the name of a transform
        scores["invariance/final/redrawn/crop/relative"] = 0.9
        details["invariance/final/redrawn/crop/relative"] = {"stage": "final"}
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "scores_details.json").write_text(json.dumps(details))
    if shots is not None:
        (folder / "figures").mkdir()
        arrays = {
            "kind": "curves",
            "title": "Low shot",
            "x": np.array([1, 4]),
            "y": np.array([shots]),
        }
        np.savez(folder / "figures/lowshot.res5.npz", names=np.array(["res5"]), **arrays)
    return folder


def test_runs_become_one_table_and_one_page(tmp_path):
    runs = [
        finished(
            tmp_path / "a/pirl", 0.4, invariance={"res2": 0.9, "final": 0.1}, shots=[0.1, 0.5]
        ),
        finished(
            tmp_path / "b/jigsaw", 0.3, invariance={"res2": 0.8, "final": 0.6}, shots=[0.2, 0.3]
        ),
    ]
    found = compare.write(runs, tmp_path / "out")
    assert found.header[0] == "run"
    assert [line[0] for line in found.lines] == ["pirl", "jigsaw"]
    assert found.lines[0][found.header.index("linear/final/top1")] == "60.0 % ± 1.0"
    with (tmp_path / "out/comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    (own,) = [x for x in lines if (x["run"], x["score"]) == ("jigsaw", "linear/res2/top1")]
    assert float(own["value"]) == pytest.approx(0.4)
    assert float(own["random"]) == 0.2
    assert own["supervised"] == ""
    beside = {"protocol": "linear probe", "selection": "held-out", "split_hash": "f00", "seed": "7"}
    assert beside | {"stage": "res2", "epoch": "3"} == {
        k: own[k] for k in [*beside, "stage", "epoch"]
    }
    text = (tmp_path / "out/comparison.md").read_text()
    assert "| pirl | " in text
    page = (tmp_path / "out/report.html").read_text()
    for said in ("linear, top1, by stage", "Low shot", "Performance against invariance"):
        assert said in page
    assert "pirl: res5" in page
    # The deepest stage's invariance is the axis.
    assert "pirl: 0.1," in page
    assert "jigsaw: 0.6," in page
    # One random network for both runs: one dashed line, the third.
    assert page.count('class="line dashed') == page.count('class="line dashed s2"') == 1
    assert "random init</span>" in page


def test_low_shot_curves_stand_beside_the_supervised_run(tmp_path):
    runs = [finished(tmp_path / name, 0.4, shots=[0.1, 0.5]) for name in ("a", "b")]
    labels = finished(tmp_path / "labels", 0.5, shots=[0.3, 0.7])
    for folder in runs:
        (folder / ".hydra").mkdir()
        (folder / ".hydra/config.yaml").write_text(f"baseline: {{supervised: {labels}}}\n")
    (drawn,) = compared.merged(["a", "b"], [read(f) for f in runs], "lowshot")
    assert drawn.names == ["a: res5", "b: res5", "supervised: res5"]
    assert str(drawn.drawing).count('class="line dashed s2"') == 1
    assert "70 %" in str(drawn.drawing) or "0.7" in str(drawn.drawing)
    # Who compares it as well sees it once.
    every = [read(f) for f in (*runs, labels)]
    (drawn,) = compared.merged(["a", "b", "labels"], every, "lowshot")
    assert drawn.names == ["a: res5", "b: res5", "labels: res5"]
    assert "dashed" not in str(drawn.drawing)


def test_the_label_of_an_axis_lies_on_no_point():
    arrays = {"x": np.array([0.0, 1.0]), "y": np.array([0.1, 1.0]), "names": np.array(["a", "b"])}
    drawn = str(plots.points({**arrays, "ylabel": "linear/res5/top1"}))
    (label,) = re.findall(r'y="([\d.]+)"[^>]*>linear/res5/top1<', drawn)
    highest = min(map(float, re.findall(r'cy="([\d.]+)"', drawn)))
    assert highest - 5 - 12 >= float(label)  # a radius, and the height of the point's own name


def test_runs_with_random_networks_of_their_own_have_a_dashed_line_each(tmp_path):
    runs = [finished(tmp_path / name, 0.4) for name in ("a", "b")]
    scores = json.loads((runs[1] / "scores.json").read_text())
    scores["baseline/random/linear/res2/top1"] = 0.25
    (runs[1] / "scores.json").write_text(json.dumps(scores))
    page = compare.write(runs, tmp_path / "out").page.read_text()
    assert page.count('class="line dashed') == 2
    assert "b, random init</span>" in page


def test_what_a_run_lacks_is_left_open(tmp_path):
    first, second = finished(tmp_path / "a", 0.4), finished(tmp_path / "b", 0.3)
    scores = json.loads((second / "scores.json").read_text())
    (second / "scores.json").write_text(json.dumps({**scores, "knn/k20/top1": 0.5}))
    found = compare.write([first, second], tmp_path / "out")
    assert found.lines[0][found.header.index("knn/k20/top1")] == "–"
    assert "Performance against invariance" not in found.page.read_text()


def test_less_is_better_where_the_score_says_so(tmp_path):
    runs = []
    for name, degrees in (("a", 20.0), ("b", 30.0)):
        folder = finished(tmp_path / name, 0.4)
        scores, details = (
            json.loads((folder / f"{file}.json").read_text())
            for file in ("scores", "scores_details")
        )
        scores |= {"normals/res5/median_degrees": degrees, "invariance/res5/crop/distance": degrees}
        scores["baseline/random/normals/res5/median_degrees"] = 25.0
        scores["baseline/random/invariance/res5/crop/distance"] = 25.0
        details["normals/res5/median_degrees"] = {"stage": "res5", "better": "lower"}
        details["invariance/res5/crop/distance"] = {"stage": "res5", "better": "neither"}
        (folder / "scores.json").write_text(json.dumps(scores))
        (folder / "scores_details.json").write_text(json.dumps(details))
        runs.append(folder)
    for folder, gain, verdict in zip(runs, ("-5", "+5"), ("up", "down"), strict=True):
        page = html.write(folder).read_text()
        assert f'<p class="gain"><b class="{verdict}">{gain}</b> over random init</p>' in page
        assert f'<p class="gain"><b class="">{gain}</b> over random init</p>' in page
        assert f'<td class="n"><b class="{verdict}">{gain}</b></td>' in page
        said = Console(record=True, force_terminal=True, width=200)
        terminal.show(folder, console=said)
        line = next(x for x in said.export_text(styles=True).splitlines() if "median_deg" in x)
        assert ("32m" if verdict == "up" else "31m") + gain in line  # green and red
    page = compare.write(runs, tmp_path / "out").page.read_text()
    assert "<b>20</b>" in page  # once among errors, never among distances
    assert page.count("<b>20</b>") == 1
    assert "<b>30</b>" not in page


def test_names_take_as_many_folders_as_they_need(tmp_path):
    runs = [finished(tmp_path / f"seed{k}/simclr", 0.4) for k in (0, 1)]
    found = compare.write(runs, tmp_path / "out")
    assert [line[0] for line in found.lines] == ["seed0/simclr", "seed1/simclr"]
    with pytest.raises(ValueError, match="names a run twice"):
        compare.write([runs[0], runs[0]], tmp_path / "out")


def test_a_folder_without_scores_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no scores.json"):
        compare.write([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="there is no run folder"):
        compare.write([tmp_path / "nowhere"], tmp_path / "out")


def test_a_supervised_run_has_a_column_where_it_is_named(tmp_path):
    run = finished(tmp_path / "a", 0.4, supervised=0.75)
    page = html.write(run).read_text()
    assert page.count("75.0 %") >= 3
    without = finished(tmp_path / "b", 0.4, supervised="not given")
    table = rows(
        json.loads((without / "scores.json").read_text()),
        json.loads((without / "scores_details.json").read_text()),
    )
    assert "supervised" not in kinds(table)


def test_the_command_compares_and_refuses(tmp_path, capfd):
    runs = [finished(tmp_path / name, 0.4) for name in "ab"]
    listed = f"compare=[{runs[0]},{runs[1]}]"
    out = f"hydra.run.dir={tmp_path / 'out'}"
    assert unlabeled("method=none", listed, out) == (0, "")
    assert "60.0 %" in capfd.readouterr().out
    assert (tmp_path / "out/comparison.md").exists()
    code, says = unlabeled(listed, out)
    assert code == 2
    assert "write method=none" in says
    lines = ["method=none", f"baseline.supervised={tmp_path / 'no'}", out, "data.limit=64"]
    code, says = unlabeled(*lines)
    assert code == 2
    assert "baseline.supervised=" in says
