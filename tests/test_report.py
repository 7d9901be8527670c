import csv
import json
import math
import re

import numpy as np
import pytest
import yaml
from rich.console import Console

from unlabeled.report import charts, pictures, plots
from unlabeled.report.beside import together
from unlabeled.report.html import write
from unlabeled.report.run import read
from unlabeled.report.scores import Score, headline, main, rows
from unlabeled.report.terminal import show

CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker"]
SCORES = {
    "knn/k1_t0.07/top1": (0.801, 0.701, 0.812),
    "knn/k20_t0.07/top1": (0.853, 0.723, 0.825),
    "knn/k20_t0.07/top5": (0.991, 0.964, 0.987),
    "linear/conv1/top1": (0.781, 0.772, 0.835),
    "linear/res2/top1": (0.834, 0.801, 0.835),
    "linear/res3/top1": (0.862, 0.806, 0.835),
    "linear/res4/top1": (0.874, 0.792, 0.835),
    "linear/res5/top1": (0.861, 0.742, 0.835),
}
CONFIG = {
    "seed": 0,
    "method": {
        "_target_": "unlabeled.methods.simclr.SimCLR",
        "temperature": 0.2,
        "optim": {"lr": 0.3, "optimizer": {"_target_": "torch.optim.SGD"}},
    },
    "backbone": {"_target_": "unlabeled.backbones.resnet.resnet18"},
    "data": {"batch_size": 256, "root": "data/fashion_mnist"},
    "trainer": {"max_epochs": 12, "max_steps": -1, "precision": "bf16-mixed"},
}


def save_config(run, config=CONFIG):
    folder = run / ".hydra"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    choices = {"method": "simclr", "backbone": "resnet18_tiny", "data": "fashion_mnist_mini"}
    hydra = {"hydra": {"runtime": {"choices": choices}}}
    (folder / "hydra.yaml").write_text(yaml.safe_dump(hydra))


def save_metrics(run, steps=560):
    rng = np.random.default_rng(0)
    names = ["step", "epoch", "train/loss", "health/std", "health/effective_rank"]
    names += ["health/mean_cosine", "optim/lr", "perf/images_per_second", "perf/data_wait"]
    names += ["online/knn_top1"]
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        for step in range(4, steps, 5):
            t = step / steps
            row = {"step": step, "epoch": step // 47}
            row["train/loss"] = 5.5 - 1.7 * t**0.3 + 0.05 * rng.normal()
            row["optim/lr"] = 0.15 * (1 + math.cos(math.pi * t))
            row["perf/images_per_second"] = 1480 + 30 * rng.normal()
            row["perf/data_wait"] = 0.03 + 0.004 * rng.normal()
            if step % 20 == 19:
                row["health/std"] = 0.45 + 0.45 * (1 - math.exp(-8 * t))
                row["health/effective_rank"] = 8 + 46 * (1 - math.exp(-5 * t))
                row["health/mean_cosine"] = 0.8 * math.exp(-6 * t)
            if step % 47 == 39:
                row["online/knn_top1"] = 0.86 - 0.15 * math.exp(-4 * t)
            writer.writerow(row)


def save_scores(run, scores=SCORES):
    flat, details = {}, {}
    for name, values in scores.items():
        protocol, stage, metric = name.split("/")
        probe = f"linear/pixels/{metric}" if protocol == "linear" else name
        columns = (name, f"baseline/random/{name}", f"baseline/pixels/{probe}")
        for column, value in zip(columns, values, strict=True):
            half = 1.96 * math.sqrt(value * (1 - value) / 2000)
            flat[column] = value
            details[column] = {
                "protocol": "weighted cosine kNN" if protocol == "knn" else "linear probe",
                "stage": stage if protocol == "linear" else "final",
                "selection": "learning rate on a tenth of the training set",
                "ci95": [value - half, value + half],
                "n": 2000,
                "seed": 0,
            }
    (run / "scores.json").write_text(json.dumps(flat))
    (run / "scores_details.json").write_text(json.dumps(details))


def save_figures(run, images, labels, neighbours, similarity, xy, classes):
    """neighbours: (Q, 8) positions among images; the first Q images are the queries."""
    (run / "figures").mkdir()
    q = len(neighbours)
    np.savez(
        run / "figures/neighbours.npz",
        queries=images[:q],
        neighbours=images[neighbours],
        query_labels=labels[:q],
        neighbour_labels=labels[neighbours],
        similarity=similarity,
        classes=np.array(classes),
    )
    np.savez(
        run / "figures/embedding.npz",
        xy=xy.astype(np.float32),
        label=labels,
        classes=np.array(classes),
        method=np.array("t-SNE"),
    )


def save_status(run):
    status = {
        "state": "done",
        "host": "workstation",
        "commit": "0123abc",
        "versions": {"torch": "2.6.0", "unlabeled": "0.1.0"},
        "seconds": 241.5,
    }
    (run / "status.json").write_text(json.dumps(status))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "2026-01-02_simclr"
    folder.mkdir()
    save_config(folder)
    save_metrics(folder)
    save_scores(folder)
    save_status(folder)
    rng = np.random.default_rng(1)
    labels = rng.integers(0, len(CLASSES), 60)
    images = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    near = rng.integers(0, 60, (3, 8))
    xy = rng.normal(size=(60, 2)) + 3 * labels[:, None]
    save_figures(folder, images, labels, near, np.full((3, 8), 0.9), xy, CLASSES)
    return folder


def text_of(run):
    return write(run).read_text(encoding="utf-8")


def test_report_shows_every_part(run):
    page = text_of(run)
    for part in ("Scores", "Linear probe, top1 by stage", "Loss", "Nearest neighbours"):
        assert f"<h2>{part}</h2>" in page
    assert "<h2>Map of the embeddings</h2>" in page
    for title in ("Spread of embeddings", "Effective rank", "Learning rate", "Images per second"):
        assert f"<h3>{title}</h3>" in page
    assert "SimCLR" in page
    assert "fashion_mnist_mini" in page
    assert "85.3 %" in page
    assert "+13.0" in page  # over random
    assert page.count('<img class="right"') + page.count('<img class="wrong"') == 3 * 8
    assert "max_epochs: 12" in page  # the whole config
    assert "0123abc" in page
    assert not list(run.glob("*.tmp"))


def test_report_loads_nothing(run):
    page = text_of(run)
    sources = re.findall(r'(?:src|href|srcset|action|data)\s*=\s*["\']([^"\']*)', page)
    assert len(sources) == 3 * 9
    assert all(s.startswith("data:image/") for s in sources)
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_report_escapes_everything_it_did_not_write(run):
    bad = "</pre><script>alert(1)</script>\"'&"
    config = CONFIG | {"seed": bad, "data": {"root": bad}, "method": {"_target_": f"m.{bad}"}}
    config["method"] |= {bad: bad}
    (run / ".hydra/config.yaml").write_text(yaml.safe_dump(config))
    choices = {"hydra": {"runtime": {"choices": {"data": bad, "backbone": bad}}}}
    (run / ".hydra/hydra.yaml").write_text(yaml.safe_dump(choices))
    (run / "status.json").write_text(json.dumps({"state": bad, bad: bad, "versions": {bad: bad}}))
    (run / "metrics.csv").write_text(f'step,"train/{bad.replace(chr(34), chr(34) * 2)}"\n1,2\n')
    name = f"linear/{bad.replace('/', '')}/top1"
    other = f"linear/b{bad.replace('/', '')}/top1"
    (run / "scores.json").write_text(json.dumps({name: 0.5, other: 0.4}))
    details = {"stage": bad, bad: bad, "ci95": [0.4, 0.6]}
    (run / "scores_details.json").write_text(
        json.dumps({name: details, other: details | {"stage": "b"}})
    )
    for file in ("neighbours", "embedding"):
        with np.load(run / f"figures/{file}.npz") as arrays:
            kept = dict(arrays)
        kept["classes"] = np.array([bad] * len(CLASSES))
        np.savez(run / f"figures/{file}.npz", **kept)
    page = text_of(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 20
    assert page.count("</pre>") == 1


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (".hydra/config.yaml", "The whole config"),
        (".hydra/hydra.yaml", "fashion_mnist_mini</h1>"),
        ("metrics.csv", "<h2>Loss</h2>"),
        ("scores.json", "<h2>Scores</h2>"),
        ("scores_details.json", "by stage</h2>"),
        ("status.json", "Where and with what it ran"),
        ("figures/neighbours.npz", "<h2>Nearest neighbours</h2>"),
        ("figures/embedding.npz", "<h2>Map of the embeddings</h2>"),
    ],
)
def test_report_leaves_out_what_is_missing(run, missing, gone):
    assert gone in text_of(run)
    (run / missing).unlink()
    page = text_of(run)
    assert gone not in page
    assert page.rstrip().endswith("</html>")


def test_report_of_an_empty_folder(tmp_path):
    assert "<h1>Evaluation" in text_of(tmp_path)
    with pytest.raises(ValueError, match="no run folder"):
        write(tmp_path / "nowhere")


def test_report_without_labels(run):
    for file, labels in (
        ("neighbours", ("query_labels", "neighbour_labels", "classes")),
        ("embedding", ("label", "classes")),
    ):
        with np.load(run / f"figures/{file}.npz") as arrays:
            kept = {k: v for k, v in arrays.items() if k not in labels}
        np.savez(run / f"figures/{file}.npz", **kept)
    page = text_of(run)
    assert "same class" not in page
    assert 'class="right"' not in page
    assert page.count("<img") == 3 * 9


def test_curves_survive_a_broken_file(tmp_path):
    text = "step,epoch,train/loss,health/std\n0,0,3.0,\n1,0,nan,0.5\n2,0,2.0,0.6\n3,0,1."
    (tmp_path / "metrics.csv").write_text(text + "\nx,y")
    curves = read(tmp_path).curves
    assert curves["train/loss"] == [(0, 3.0), (2, 2.0), (3, 1.0)]  # no NaN in a drawing
    assert curves["health/std"] == [(1, 0.5), (2, 0.6)]


def test_a_damaged_file_of_scores_is_named(tmp_path):
    (tmp_path / "scores.json").write_text('{"knn/')
    with pytest.raises(ValueError, match=r"scores.json is damaged .*: delete it"):
        read(tmp_path)


def test_rows_put_each_baseline_beside_its_score(run):
    found = read(run)
    table = {row.name: row for row in rows(found.scores, found.details)}
    assert list(table) == list(SCORES)  # baselines make no rows of their own
    row = table["linear/res3/top1"]
    assert {k: s.value for k, s in row.scores.items()} == {
        "trained": 0.862,
        "random": 0.806,
        "pixels": 0.835,  # pixels have no res3: one probe of theirs stands beside all stages
    }
    assert row.gain("random") == pytest.approx(0.056)
    assert row.scores["trained"].spread(share=True) == "± 1.5"
    short = main(list(table.values()))
    assert "knn/k20_t0.07/top5" not in {r.name for r in short}
    assert [r.name for r in headline(short)] == ["knn/k20_t0.07/top1", "linear/res5/top1"]


def test_numbers_that_are_no_shares_stay_as_they_are():
    (row,) = rows({"retrieval/rank/median": 12.25, "baseline/random/retrieval/rank/median": 40}, {})
    assert not row.share
    assert row.scores["trained"].text(share=row.share) == "12.25"
    assert Score(0.5, 0.4, 0.6).text(share=True) == "50.0 %"


def test_a_distance_below_one_is_no_percentage():
    distance = {"invariance/res5/flip/relative": {"share": False}}
    row, plain = (rows({"invariance/res5/flip/relative": 0.25}, x)[0] for x in (distance, {}))
    assert not row.share
    assert plain.share


def test_a_baseline_alone_still_has_a_row():
    (row,) = rows({"baseline/random/knn/k20_t0.07/top1": 0.7}, {})
    assert (row.name, list(row.scores)) == ("knn/k20_t0.07/top1", ["random"])
    assert row.gain("random") is None


def test_bars_are_as_high_as_their_values():
    table = rows({"linear/a/top1": 0.8, "baseline/random/linear/a/top1": 0.4}, {})
    drawing = charts.bars(table)
    heights = dict(re.findall(r'class="bar (\w+)".*?height="([\d.]+)"', drawing))
    assert float(heights["trained"]) == pytest.approx(2 * float(heights["random"]), rel=0.01)


@pytest.mark.parametrize("curve", [[(5, 1.0)], [(0, 2.0), (9, 2.0)], [(0, 0.0), (9, 0.0)]])
def test_a_line_of_one_point_or_one_value(curve):
    drawing = charts.line([("a", curve)], zero=curve[0][1] == 0)
    assert "nan" not in drawing
    assert 'class="line s0"' in drawing


def test_a_long_curve_keeps_its_end_and_its_mean():
    curve = [(i, float(i)) for i in range(100_000)]
    thin = charts._thin(curve)
    assert len(thin) <= charts.POINTS
    assert thin[-1][0] == 99_999
    assert sum(v for _, v in thin) / len(thin) == pytest.approx(49_999.5)
    assert len(charts.line([("a", curve)], smooth=True)) < 20_000


def test_axis_ticks_are_round_and_cover_the_data():
    for low, high in [(0.0, 0.87), (3.81, 5.54), (-2.0, 1480.0), (1e-7, 3e-7), (7.0, 7.0)]:
        first, last, ticks = charts.axis(low, high, 4)
        assert first <= low <= high <= last
        assert 2 <= len(ticks) <= 7


def test_map_colours_the_ten_most_frequent_classes():
    label = np.repeat(np.arange(14), [9] * 10 + [2] * 4)
    arrays = {"xy": np.random.default_rng(0).normal(size=(len(label), 2)), "label": label}
    names = pictures.legend(arrays)
    assert len(names) == 11
    assert names[-1] == ("4 other classes", "rest")
    drawing = pictures.scatter(arrays)
    drawn = {css: p.count("M") for css, p in re.findall(r'points (\w+)" d="([^"]*)"', drawing)}
    assert drawn == {"rest": 8} | {f"s{i}": 9 for i in range(10)}
    numbers = [float(x) for x in re.findall(r"M([\d.-]+) ", drawing)]
    assert min(numbers) >= 0
    assert max(numbers) <= 640


def test_terminal_table(run):
    console = Console(width=120, record=True, force_terminal=False)
    show(run, console=console)
    lines = console.export_text().splitlines()
    knn = next(line for line in lines if "knn/k20_t0.07/top1" in line)
    assert re.findall(r"\d+\.\d %", knn) == ["82.5 %", "72.3 %", "85.3 %"]
    assert "+13.0" in knn
    assert any("raw pixels" in li and "random init" in li and "trained" in li for li in lines)
    assert not any("top5" in line for line in lines)


def test_what_goes_into_a_file_is_not_cut(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    show(run)
    lines = capsys.readouterr().out.splitlines()
    assert any("knn/k20_t0.07/top1" in line and "+13.0" in line for line in lines)


def test_terminal_says_nothing_without_scores(tmp_path):
    console = Console(width=80, record=True)
    show(tmp_path, console=console)
    assert console.export_text() == ""


def test_curves_of_scores_are_drawn_with_those_of_all_baselines():
    def curve(name, values, spread):
        y = np.array([values])
        return {
            "kind": np.array("curves"),
            "x": np.array([1, 4]),
            "names": np.array([name]),
            "y": y,
            "low": y - spread,
            "high": y + spread,
            "scores": np.array([[f"{name}/k1/top1", f"{name}/k4/top1"]]),
        }

    figures = {
        "lowshot.curve": curve("res5", [0.3, 0.5], 0.1),
        "baseline.random.lowshot.curve": curve("res5", [0.2, 0.3], 0.05),
        "baseline.pixels.lowshot.curve": curve("pixels", [0.1, 0.2], 0.01),
        "invariance.stages": {"kind": np.array("curves"), "x": np.array([1])},
        "baseline.random.invariance.stages": {"kind": np.array("curves"), "x": np.array([2])},
    }
    scores = {"lowshot/res5/k1/top1": 0.3, "lowshot/res5/k4/top1": 0.5}
    details = {"lowshot/res5/k4/top1": {"baselines": {"supervised": 0.9}}}
    found = together(figures, rows(scores, details))
    assert list(found) == [
        "lowshot.curve",
        "invariance.stages",
        "baseline.random.invariance.stages",
    ]
    drawn = found["lowshot.curve"]
    titles = ["res5", "res5, random init", "raw pixels", "res5, supervised"]
    assert drawn["names"].tolist() == titles
    nan = float("nan")
    np.testing.assert_allclose(drawn["y"], [[0.3, 0.5], [0.2, 0.3], [0.1, 0.2], [nan, 0.9]])
    np.testing.assert_allclose(drawn["low"], [[0.2, 0.4], [0.15, 0.25], [0.09, 0.19], [nan, 0.9]])
    without = together({**figures}, rows(scores, {}))["lowshot.curve"]
    assert without["names"].tolist() == titles[:3]
    assert plots.figure("lowshot.curve", drawn).names == titles
