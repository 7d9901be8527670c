"""The benchmark's table and its verdict, without any timing."""

import importlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    module = importlib.import_module("bench")
    monkeypatch.setattr(module, "OUT", tmp_path)
    return module


def parts(bench, monkeypatch, **rows):
    monkeypatch.setattr(bench, "PARTS", {name: lambda quick, r=r: r for name, r in rows.items()})


@pytest.mark.parametrize(
    ("values", "bar", "better", "missed"),
    [
        ([9.0, 11.0, 12.0], 10, "high", False),
        ([9.0, 9.9, 12.0], 10, "high", True),
        ([10.0], 10, "high", False),
        ([1.0, 1.05, 9.0], 1.05, "low", False),
        ([1.0, 1.06, 1.06], 1.05, "low", True),
        ([math.nan], 10, "high", True),
        ([math.nan], 10, "low", True),
        ([0.0], 0, "low", False),
        ([1.0], 0, "low", True),
        ([0.1], None, "high", False),
        ([], 10, "high", False),
    ],
)
def test_the_median_decides_on_the_side_of_the_bar(bench, values, bar, better, missed):
    assert bench.Row("a", values, bar=bar, better=better).missed is missed


def test_check_fails_and_names_what_missed(bench, monkeypatch, capsys, tmp_path):
    good, slow = bench.Row("good", [12.0], bar=10), bench.Row("slow", [7.0, 8.0, 30.0], bar=10)
    parts(bench, monkeypatch, one=[good], two=[slow])
    assert bench.main(["--check"]) == 1
    assert capsys.readouterr().err.endswith("missed:\n  slow: 8.00x, the bar is ≥ 10x\n")
    assert bench.main([]) == 0, "without --check it only reports"
    assert bench.main(["--check", "--only", "one"]) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [(r["name"], r["value"], r["missed"]) for r in record["rows"]] == [("good", 12.0, False)]
    assert record["machine"]["torch"]


def test_the_markdown_is_a_table_of_equal_rows(bench, monkeypatch, capsys):
    ratio = bench.Row("a / b", [1.0, 3.0, 2.0], bar=1.5, ours="3 s", other="1 s", note="how")
    skipped = bench.Row("c / d", bar=2, note="skipped: why")
    parts(bench, monkeypatch, one=[ratio, skipped], two=[bench.Row("n", [0], unit="")])
    assert bench.main(["--markdown"]) == 0
    head, line, *rows = capsys.readouterr().out.splitlines()[:-1]
    assert len({row.count("|") for row in (head, line, *rows)}) == 1
    assert rows == [
        "| a / b | 2.00x | 1.00-3.00 | ≥ 1.5x | 3 s | 1 s | how |",
        "| c / d | - |  | ≥ 2x |  |  | skipped: why |",
        "| n | 0 |  |  |  |  |  |",
    ]


def test_the_terminal_shows_every_row(bench, capsys):
    rows = [bench.Row("met", [2.0], bar=1), bench.Row("[not] met", [0.5], bar=1)]
    bench.show(rows, bench.Console(width=120))
    out = capsys.readouterr().out
    assert "2.00x" in out
    assert "[not] met" in out


def test_ratios_are_taken_round_by_round(bench):
    rows = importlib.import_module("bench_rows")
    assert rows.per_round([1.0, 4.0], [1.0, 2.0]) == [1.0, 2.0]
    assert rows.seconds([0.5, 0.1, 0.2]) == "200 ms (least 100)"
    assert rows.seconds([1.5]) == "1.50 s (least 1.50)"


def test_both_recipes_of_the_augmentation_run(bench):
    module = importlib.import_module("bench_augment")
    images = module.torch.randint(0, 256, (4, 3, 32, 32), dtype=module.torch.uint8)
    for file in module.RECIPES:
        recipe = module.OmegaConf.load(module.CONF / f"{file}.yaml")
        for way in (module.ours, module.torchvision_v2, module.pil):
            for view in way(recipe)(images):
                assert view.shape == (4, 3, 32, 32)
                assert view.dtype == module.torch.float32
                assert view.abs().max() < 3, "normalised"


def test_a_command_that_ends_otherwise_is_no_measurement(bench, tmp_path):
    start = importlib.import_module("bench_start")
    failing = ([sys.executable, "-c", "raise SystemExit(3)"], 0)
    with pytest.raises(RuntimeError, match="ended with 3, not 0"):
        start._times({"ours": failing}, 1, str(tmp_path))
    assert start._cpu_time((failing[0], 3), str(tmp_path)) > 0


def test_the_imports_that_a_check_needs_are_modules(bench):
    program = importlib.import_module("bench_start")._imports()
    assert "import unlabeled.methods.simclr" in program
    assert "import pytorch_lightning" in program
    for line in program.splitlines():
        importlib.import_module(line.removeprefix("import "))


@pytest.mark.parametrize("name", ["simclr", "moco_v2", "byol", "swav", "pirl"])
def test_the_bare_loops_compute_what_the_framework_does(bench, monkeypatch, name):
    step = importlib.import_module("bench_step")
    assert name in step.LOOPS
    monkeypatch.setattr(step, "IMAGES", 64)
    turns, method = step.fit(name, 8, 3, "backbone.width=8")
    assert len(turns.ours) == len(turns.other) == 3
    bare = turns.bare.method.state_dict()
    for key, x in method.state_dict().items():
        step.torch.testing.assert_close(x, bare[key], rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


def test_the_suites_rows_are_there_and_its_images_are_counted(bench, monkeypatch):
    suite = importlib.import_module("bench_suite")
    for name, value in {"TRAIN": 230, "TEST": 60, "WIDTH": 8, "SIDE": 16}.items():
        monkeypatch.setattr(suite, name, value)
    features, viewed, apart, views = suite.rows(1)
    assert features.bar == viewed.bar == views.bar == 1.25
    assert {"svm_voc07", "lowshot"} <= suite.suite().keys()
    assert min(features.value, viewed.value) > 0
    assert apart.value < 1, "one pass for ten evaluations, not ten passes"
    # ... and at most two images for each of the shapes: of the suite and of invariance
    assert 1 <= views.value <= (230 + 60 * 8 + 4) / (230 + 60 * 8)


def test_threads_are_set_before_torch_is_imported():
    code = "import os, sys, bench; print('torch' in sys.modules, os.environ['OMP_NUM_THREADS'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]


def installed(name):
    return importlib.util.find_spec(name) is not None


def test_every_way_from_jpegs_to_views_makes_as_many(bench, monkeypatch, tmp_path):
    photos = importlib.import_module("bench_photos")
    monkeypatch.setattr(photos, "IMAGES", 4)
    monkeypatch.setattr(photos, "DEVICE_BATCH", 2)
    rows = photos.rows(tmp_path, rounds=1, images=2)
    peers = {row.name.rpartition(" / ")[2]: row for row in rows}
    assert len(peers) == len(rows) == 3
    for row, package in zip(rows, ["lightly", "PIL", "kornia"], strict=True):
        assert bool(row.values) == installed(package), row.name
        assert row.bar or not row.values
    assert len(list(tmp_path.rglob("*.jpg"))) == 4


@pytest.mark.parametrize("bf16", [False, True])
def test_a_peer_learns_from_files(bench, tmp_path, bf16):
    photos, peers = importlib.import_module("bench_photos"), importlib.import_module("bench_peers")
    photos.photographs(tmp_path, 4)
    torch = peers.torch
    torch.manual_seed(0)
    loop = peers.solo_loop(tmp_path / "train", 4, bf16=bf16)
    before = loop.net[0].conv1.weight.clone()
    loop.step()
    assert not torch.equal(before, loop.net[0].conv1.weight)
    pair, _ = next(loop.batches)
    assert [x.shape for x in pair] == [(4, 3, 224, 224)] * 2


def test_the_peers_loss_is_simclrs(bench):
    from unlabeled.methods.simclr import nt_xent

    peers = importlib.import_module("bench_peers")
    a, b = peers.torch.randn(2, 5, 8, dtype=peers.torch.float64)
    unit = (peers.F.normalize(x, dim=1) for x in (a, b))
    peers.torch.testing.assert_close(peers.solo_loss(a, b), nt_xent(*unit, 0.2))


def test_end_to_end_rows_have_a_bar_only_against_the_peer_as_it_is(bench, monkeypatch):
    end = importlib.import_module("bench_end")

    class Nothing:
        steps = 0

        def step(self):
            Nothing.steps += 1

    def absent(*args, **kwargs):
        raise ImportError("no module named lightly")

    monkeypatch.setattr(end, "BATCH", 2)
    made = {"lightly": absent, "solo": lambda *args, **kwargs: Nothing()}
    monkeypatch.setattr(end, "PEERS", made)
    monkeypatch.setattr(end, "RECIPE", [*end.RECIPE, "decode.size=32", "backbone.width=8"])
    rows = {row.name.partition(" / ")[2]: row for row in end.rows(1)}
    assert [row.bar for row in rows.values()] == [None, None, end.BAR, None]
    assert not rows["lightly"].values
    assert rows["solo"].values[0] < 1, "doing nothing is faster"
    assert Nothing.steps == 4


def test_growth_tells_linear_from_quadratic(bench, monkeypatch):
    growth = importlib.import_module("bench_growth")

    def spends(power):
        def work(n):
            end = growth.time.process_time() + 1e-4 * n**power
            while growth.time.process_time() < end:
                pass

        return {n: (lambda n=n: work(n)) for n in (5, 25)}

    linear = growth.grown("linear", "images", spends(1), 2)
    quadratic = growth.grown("quadratic", "images", spends(2), 2)
    assert not linear.missed
    assert quadratic.missed
    assert [n for n, _ in quadratic.curve] == [5, 25]


def test_what_grows_is_measured_and_drawn(bench, monkeypatch, tmp_path):
    growth = importlib.import_module("bench_growth")
    sizes = {"BATCHES": (4, 8), "CROPS": (2, 3), "WORKERS": (0, 1), "IMAGES": (250, 500)}
    for name, value in sizes.items():
        monkeypatch.setattr(growth, name, value)
    few = importlib.import_module("bench_photos").photographs
    monkeypatch.setattr(growth, "photographs", lambda root: few(root, 8))
    rows = growth.rows(1)
    assert len(rows) == 6
    for row in rows:
        assert len(row.curve) == 2, row.name
        assert min(seconds for _, seconds in row.curve) > 0
    draw = importlib.import_module("bench_plot").draw
    draw([*rows, bench.Row("a / b", [1.0, 2.0], bar=3)], tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    draw([bench.Row("nothing")], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_both_sides_of_kmeans_have_their_turns(bench):
    (row,) = importlib.import_module("bench_clusters").rows(2, 500, 8, 4)
    assert len(row.values) == 2
    assert row.bar == 1.1


def test_every_way_to_pictures_of_a_video_gives_the_same(bench, tmp_path):
    import bench_video
    import torch

    path = bench_video.pan(tmp_path / "pan.mp4", frames=30)
    found, _ = bench_video.ways(path)
    assert {"ours", "plain PyAV"} <= set(found)
    ours = found["ours"]([3, 17, 29])
    assert ours.shape == (3, 3, 240, 320)
    assert ours.float().std() > 20
    for way in found.values():
        assert torch.equal(way([3, 17, 29]), ours)


def test_rows_of_videos_and_spectrograms(bench, monkeypatch, tmp_path):
    import bench_video

    monkeypatch.setattr(bench_video, "CLIPS", 2)
    monkeypatch.setattr(bench_video, "SOUNDS", 2)
    monkeypatch.setattr(bench_video.importlib.util, "find_spec", lambda name: None)
    rows = bench_video.rows(tmp_path, rounds=1)
    assert all(row.value is None or row.value > 0 for row in rows)
    names = " ".join(row.name for row in rows)
    for what in ("clips of 16", "single pictures", "spectrograms", "plain PyAV", "torchcodec"):
        assert what in names
