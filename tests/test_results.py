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
    for seed, knn in enumerate((0.40, 0.44)):
        results.record("simclr", seed).write_text(json.dumps({**first, "knn": knn}))
    assert "| 42.0 ± 2.8 |" in results.table(("simclr",))
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
