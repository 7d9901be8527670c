"""scripts/wandb_dashboard.py: the workspace and report that it would send, without a network."""

import importlib.util
import json
import sys

import pytest
from conftest import ROOT

from unlabeled.callbacks.wandb_run import STEP
from unlabeled.report.html import MONITORS
from unlabeled.report.scores import TITLES

pytest.importorskip("wandb_workspaces", reason="the extra is not installed")

spec = importlib.util.spec_from_file_location("script", ROOT / "scripts/wandb_dashboard.py")
script = importlib.util.module_from_spec(spec)
sys.modules["script"] = script  # dataclasses look there
spec.loader.exec_module(script)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function: arguments -> what the script writes, without key or network."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))

    def made(*arguments):
        path = tmp_path / "made.json"
        monkeypatch.setattr(sys, "argv", ["script", *arguments, "--out", str(path)])
        script.main()
        return json.loads(path.read_text())

    return made


def sections(made):
    return made["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]


def every(node, kind):
    """The configs of all panels of a kind, wherever they are."""
    if isinstance(node, dict):
        if node.get("viewType") == kind:
            yield node["config"]
        for x in node.values():
            yield from every(x, kind)
    elif isinstance(node, list):
        for x in node:
            yield from every(x, kind)


def test_workspace_and_report_have_the_same_panels(written, capsys):
    made = written("--entity", "me", "--project", "trials")
    assert "no key or no network: nothing was sent" in capsys.readouterr().out
    titles = [section["name"] for section in sections(made)]
    assert titles == [s.title for s in script.SECTIONS]
    assert all(section["panels"] for section in sections(made))
    for kind in ("Run History Line Plot", "Bar Chart", "Media Browser", "Vega2", "Weave"):
        both = [[json.dumps(c) for c in every(made[name], kind)] for name in made]
        assert both[0] == both[1], kind
        assert both[0], kind
    for one in made.values():
        assert (one["entity"], one["project"]) == ("me", "trials")
    headings = [b["children"][0]["text"] for b in made["report"]["spec"]["blocks"] if "level" in b]
    assert headings == titles


def test_a_sweep_is_what_its_runs_are_chosen_by(written):
    made = written("--dry-run", "--group", "2026-01-31_12-00-00")
    for one in made.values():
        text = json.dumps(one)
        assert '"op": "=", "value": "2026-01-31_12-00-00"' in text
        assert "2026-01-31_12-00-00" in one["name"]
    assert '"op"' not in json.dumps(written("--dry-run", "--kind", "report")["report"])


def test_curves_are_of_metrics_that_runs_log(written):
    logged = {name for name, *_ in MONITORS} | {"train/loss", "train/accuracy", "perf/cpu_seconds"}
    made = written("--dry-run", "--kind", "workspace")
    assert list(made) == ["workspace"]
    for config in every(made, "Run History Line Plot"):
        if not config["metrics"][0].startswith("system"):
            assert set(config["metrics"]) <= logged
            assert config["xAxis"] == STEP
    assert script.BARS["value"] == TITLES["trained"]
    bars = [name for config in every(made, "Bar Chart") for name in config["metrics"]]
    assert "summary:eval/baseline/pixels/linear/pixels/top1" in [
        name if name.startswith("summary:") else f"summary:{name}" for name in bars
    ]
