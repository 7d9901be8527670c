"""The README's table of methods: it is what the records say."""

import importlib.util
import json
import sys

import pytest
from conftest import METHODS, RECORDINGS, ROOT


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("results", ROOT / "scripts/results.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["results"] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_records(results):
    assert results.table(results.METHODS) in (ROOT / "README.md").read_text()


def test_every_method_is_in_the_table(results):
    assert set(results.METHODS) == set(METHODS) - {"demo", *RECORDINGS}


def test_seeds_are_averaged_and_a_record_is_not_repeated(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RECORDS", tmp_path)
    first = json.loads(next((ROOT / "docs/results").glob("simclr_seed0.json")).read_text())
    for seed, (knn, stage) in enumerate(((0.40, "res2"), (0.44, "conv1"))):
        found = {**first, "knn": knn, "stage": stage}
        results.record("simclr", seed).write_text(json.dumps(found))
    assert "| 42.0 ± 2.8 |" in results.table(("simclr",))
    assert "(conv1, res2) |" in results.table(("simclr",))
    assert results.table(("simclr",)).splitlines()[2].endswith("| 2 |")
    monkeypatch.setattr(results, "unlabeled", lambda *_: pytest.fail("ran again"))
    monkeypatch.setattr(sys, "argv", ["results.py", "--methods", "simclr", "--seeds", "0", "1"])
    results.main()
    assert "42.0" in capsys.readouterr().out


def test_the_budget_counts_once_what_is_done_once(results):
    # 30 s of extraction before the first update, 2 s of clustering before each pass of 10 updates
    spent = [30 + 2 * (1 + k // 10) + 0.5 * (k + 1) for k in range(20)]
    assert results.affordable(spent, 240) == round((240 - 30) / 0.7)
    assert results.affordable(spent, 1) == 10  # at least one pass


def test_a_last_stage_that_is_the_features_counts_as_final(results, tmp_path):
    scores = {results.KNN: 0.3, f"baseline/random/{results.KNN}": 0.2}
    scores |= {f"baseline/pixels/{results.KNN}": 0.1, "baseline/pixels/linear/pixels/top1": 0.1}
    for prefix, gain in (("", 0.1), ("baseline/random/", 0.0)):
        for stage, top1 in (("conv1", 0.5), ("res5", 0.4)):
            scores[f"{prefix}linear/{stage}/top1"] = top1 + gain
    trained = {"trained": {"max_steps": 2}, "identity": {"data.batch_size": 8}}
    status = {**trained, "command": "train.py x=1", "commit": "c", "versions": {"torch": "2"}}
    details = {name: {"best_stage": "conv1"} for name in scores}
    named = {"scores": scores, "scores_details": details, "status": status}
    for name, content in named.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "metrics.csv").write_text("perf/cpu_seconds\n60\n")
    found = results.measured(tmp_path)
    assert (found["final"], found["random final"]) == (0.5, 0.4)
    assert (found["linear"], found["stage"], found["images"]) == (0.6, "conv1", 16)
