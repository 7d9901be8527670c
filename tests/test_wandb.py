"""What runs show at Weights & Biases, read from the files of its offline mode."""

import csv
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from test_runs import FAST_EVALS, NAMES, TINY, folder, in_folder, unlabeled  # noqa: F401
from wandb_file import Offline

from unlabeled.callbacks import wandb_artifacts, wandb_run
from unlabeled.callbacks.loggers import Guarded, wandb_logger
from unlabeled.callbacks.views import sheet
from unlabeled.dashboards import Dashboards
from unlabeled.report import dashboard
from unlabeled.report.run import read
from unlabeled.shown import About, Files, Images, Table, montage


def parts(run):
    """Every start of a run, in order; W&B's process may write on a moment after its end."""
    paths, until = sorted(run.glob("wandb/offline-run-*")), time.monotonic() + 20
    while time.monotonic() < until and any(Offline(path).exit is None for path in paths):
        time.sleep(0.1)
    return [Offline(path) for path in paths]


@pytest.fixture(scope="module")
def offline():
    """W&B without a network, and without anybody's key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.delenv("WANDB_API_KEY", raising=False)
        yield patch


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory, offline):  # noqa: F811
    """A run that stopped after two updates and went on, and one that evaluates it."""
    here = tmp_path_factory.mktemp("runs")
    images = [*in_folder(folder / "labelled"), "data.layout.test_share=0.2", "logger=wandb"]
    images += ["logger.wandb.tags=[first,second]", "callbacks.learning_rate.every_n_steps=2"]
    lines = [*images, "logger.wandb.group=mine", f"hydra.run.dir={here}/a"]
    lines += ["method.optim.schedule=constant", "method.optim.warmup=0"]  # it grows longer
    assert unlabeled(*lines, "trainer.max_steps=2", "evals=none") == (0, "")
    time.sleep(1.1)  # W&B names a start's folder by the second
    lines += [*FAST_EVALS[:2], "evals.linear.stages=[res4,res5]"]
    assert unlabeled(*lines, "trainer.max_steps=4") == (0, "")
    ours = ("method", "optim", "augment", "back", "callbacks", "logger.wandb.tags")
    images = [line for line in images if not line.startswith(ours)]
    lines = ["method=none", "backbone=checkpoint", f"backbone.path={here}/a", "evals=knn"]
    more = ["logger.wandb.features=upload", f"hydra.run.dir={here}/b"]
    assert unlabeled(*images, *lines, *more) == (0, "")
    return here


def test_a_run_that_goes_on_is_one_wandb_run(runs):
    first, second = parts(runs / "a")
    assert first.run.run_id == second.run.run_id == (runs / "a/wandb_id").read_text()
    assert [step for step, _ in first.column("train/loss")] == [0, 1]
    assert [step for step, _ in second.column("train/loss")] == [2, 3]
    assert second.run.resume
    assert first.exit == second.exit == 0


def test_history_has_the_names_and_numbers_of_metrics_csv(runs):
    first, second = parts(runs / "a")
    with (runs / "a/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {n for n in rows[0] if n not in ("step", "epoch")}
    assert {"train/loss", "optim/lr", "eval/knn/k20_t0.07/top1"} <= names
    history = first.history + second.history
    for name in names:
        table = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        assert table == pytest.approx(
            {r["trainer/global_step"]: r[name] for r in history if name in r}
        )
    groups = {name.split("/")[0] for name in names}
    assert groups <= {"train", "health", "eval", "perf", "optim"}


def test_summary_has_every_score(runs):
    _, second = parts(runs / "a")
    scores = json.loads((runs / "a/scores.json").read_text())
    assert set(NAMES) <= set(scores)
    for name, value in scores.items():
        assert second.summary[f"eval/{name}"] == pytest.approx(value)


def test_config_and_commit_are_the_runs(runs):
    _, second = parts(runs / "a")
    assert second.config["data"]["batch_size"] == 16
    assert second.config["method"]["_target_"] == "unlabeled.methods.simclr.SimCLR"
    status = json.loads((runs / "a/status.json").read_text())
    assert second.config["provenance"]["commit"] == status["commit"]
    assert second.config["provenance"]["versions"]["torch"] == torch.__version__.split("+")[0]
    if (ROOT / ".git").exists():
        head = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "HEAD"], text=True)
        assert second.run.git.commit == head.strip()


def test_names_groups_and_tags(runs):
    (*_, mine), (other,) = parts(runs / "a"), parts(runs / "b")
    assert (mine.run.display_name, mine.run.run_group) == ("a", "mine")
    assert list(mine.run.tags) == ["first", "second"]
    assert mine.run.job_type == "pretrain"
    assert (other.run.job_type, other.run.run_group) == ("evaluate", "")
    assert list(other.run.tags) == ["folder", "checkpoint"]


def test_views_are_shown_once(runs):
    first, second = parts(runs / "a")
    (row,) = [r for r in first.history if r.get("views/augmented._type")]
    assert row["_step"] == 0
    assert len(row["views/augmented.filenames"]) == 8
    for name in row["views/augmented.filenames"]:
        assert (first.files / name).stat().st_size > 0
    assert row["views/augmented.width"] == 16 * 2 + 4  # two views
    assert not any(key.startswith("views/") for r in second.history for key in r)


def test_pictures_tables_and_charts_are_shown(runs):
    _, second = parts(runs / "a")
    (row,) = [r for r in second.history if "neighbours/test._type" in r]
    table = json.loads((second.files / row["neighbours/test.path"]).read_text())
    assert table["columns"][:4] == ["query", "class", "neighbour 1", "class 1"]
    near = np.load(runs / "a/figures/neighbours.npz")
    assert len(table["data"]) == len(near["queries"])
    assert table["data"][0][0] == table["data"][0][2] == "Image"
    assert table["data"][0][1] == near["classes"][near["query_labels"][0]]
    (kept,) = [a for a in second.artifacts if a.type == "run_table" and "neighbours" in a.name]
    images = [e for e in kept.manifest.contents if e.path.startswith("media/images")]
    assert len(images) > len(near["queries"])
    visualized = {k: v for k, v in second.config.items() if k.startswith("_wandb.visualize.")}
    bars = json.dumps(visualized["_wandb.visualize.stages/linear_top1"])
    assert "wandb/bar/v0" in bars
    points = json.dumps(visualized["_wandb.visualize.embedding/test"])
    assert "wandb/scatter/v0" in points
    key = "Custom Chart Tables/stages/linear_top1_table"
    stages = json.loads((second.files / row[f"{key}.path"]).read_text())
    scores = json.loads((runs / "a/scores.json").read_text())
    assert [r[0] for r in stages["data"]] == ["res4", "res5"]
    assert stages["data"][1][1] == pytest.approx(scores["linear/res5/top1"])
    assert (second.files / row["embedding/test_drawing.path"]).exists()
    assert row["Custom Chart Tables/embedding/test_table.nrows"] == 16


def test_the_dashboard_script_shows_what_is_there(runs):
    """The keys in scripts/wandb_dashboard.py are those that runs write."""
    (first, second), text = parts(runs / "a"), (ROOT / "scripts/wandb_dashboard.py").read_text()
    keys = {key.split(".")[0] for row in first.history + second.history for key in row}
    for name in ("stages/linear_top1", "embedding/test"):
        assert f'"{name}"' in text
        assert f'"{name}_drawing"' in text
        assert {f"Custom Chart Tables/{name}_table", f"{name}_drawing"} <= keys
    for name in ("neighbours/test", "views/augmented"):
        assert f'"{name}"' in text
        assert name in keys
    assert "eval/baseline/pixels/linear/pixels/top1" in second.summary


def test_the_trained_checkpoint_is_an_artifact(runs):
    first, second = parts(runs / "a")
    saved = [[a for a in part.artifacts if a.type == "checkpoint"] for part in (first, second)]
    for (artifact,), updates in zip(saved, (2, 4), strict=True):
        assert artifact.name == f"checkpoint-{first.run.run_id}"
        assert set(artifact.aliases) == {"latest", f"updates-{updates}"}
        assert json.loads(artifact.metadata)["updates"] == updates
        (entry,) = artifact.manifest.contents
        held = torch.load(entry.local_path, weights_only=True)  # not the one that replaced it
        assert held["global_step"] == updates


def test_an_artifact_counts_updates_that_no_curve_has(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss\n2799,14,1.0\n")
    (tmp_path / "status.json").write_text(json.dumps({"updates": 2805, "epochs": 15}))
    (tmp_path / "last.ckpt").touch()
    given = []
    board = SimpleNamespace(log_files=given.append)
    boards = Dashboards(tmp_path, [lambda about: board])
    boards.keep("checkpoint", [tmp_path / "last.ckpt"])
    assert given[0].facts == {"updates": 2805, "epochs": 15}


def test_lineage_names_the_run_that_a_run_starts_from(runs):
    (*_, source), (part,) = parts(runs / "a"), parts(runs / "b")
    (used,) = [a for a in part.artifacts if a.use_after_commit]
    (made,) = [a for a in source.artifacts if a.type == "checkpoint"]
    assert (used.name, used.type) == (made.name, "checkpoint")
    assert used.digest == made.digest  # so W&B knows it for the same
    given = part.config["sources"]["backbone.path"]
    assert given["id"] == source.run.run_id
    assert given["run"] == str(runs / "a")


def test_features_are_an_artifact_where_they_are_wanted(runs):
    (part,) = parts(runs / "b")
    (made,) = [a for a in part.artifacts if a.type == "features"]
    paths = [entry.path for entry in made.manifest.contents]
    assert {path.split("_")[0] for path in paths} == {"train", "test"}
    for entry in made.manifest.contents:
        assert os.path.getsize(entry.local_path) == entry.size > 0
    assert not (runs / "b/features").exists()
    assert not any(a.type == "features" for start in parts(runs / "a") for a in start.artifacts)


@pytest.mark.parametrize("stay", [True, False])
def test_features_that_stay_are_referenced_by_themselves(tmp_path, offline, stay, caplog):
    made = tmp_path / "features/train_1a/res5.npy"
    made.parent.mkdir(parents=True)
    made.write_bytes(bytes(3000))
    for name, more in (("default", {}), ("small", {"features": "upload", "largest": 0.002})):
        logger = wandb_logger(about=About(tmp_path / name), **more)
        logger.log_files(Files("features", [made.parent], {"updates": 3}, stay=stay))
        logger.close("finished")
        (part,) = parts(tmp_path / name)
        found = [entry.ref for a in part.artifacts for entry in a.manifest.contents]
        assert found == ([made.as_uri()] if stay else [])
    assert ("the features, 0 MB: left out" in caplog.text) is not stay


def test_system_metrics_are_measured(runs):
    measured = {
        key for part in (*parts(runs / "a"), *parts(runs / "b")) for s in part.stats for key in s
    }
    assert any(key.startswith("proc.") for key in measured), measured


def test_a_finished_run_that_is_started_again_shows_nothing_new(runs):
    before = len(parts(runs / "a"))
    lines = yaml.safe_load((runs / "a/.hydra/overrides.yaml").read_text())
    assert unlabeled(*lines) == (0, "")
    assert len(parts(runs / "a")) == before


def test_tensorboard_has_the_same_names_and_the_pictures(runs, tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra is not installed",
    )
    from unlabeled.callbacks.tensorboard_run import TensorBoard

    board = Guarded(lambda: TensorBoard(tmp_path), "TensorBoard")
    boards = Dashboards(runs / "a", [lambda about: board])
    with boards:
        boards.publish()
    found = accumulator.EventAccumulator(str(tmp_path)).Reload().Tags()
    assert {f"eval/{name}" for name in NAMES} <= set(found["scalars"])
    assert {"neighbours/test", "embedding/test", "stages/linear_top1"} <= set(found["images"])
    assert "config/text_summary" in found["tensors"]


def test_members_of_a_sweep_are_a_group(folder, tmp_path, offline):  # noqa: F811
    lines = [*in_folder(folder / "bare"), "logger=wandb", "evals=none", "trainer.max_steps=1"]
    sweep = f"hydra.sweep.dir={tmp_path}/tried"
    assert unlabeled("-m", *lines, "seed=0,1", sweep)[0] == 0
    members = [parts(tmp_path / f"tried/{i}")[0].run for i in range(2)]
    assert [m.run_group for m in members] == ["tried", "tried"]
    assert [m.display_name for m in members] == ["tried-0", "tried-1"]
    assert members[0].run_id != members[1].run_id


def test_wandbs_agent_gives_the_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "given123")
    assert wandb_run.identity(About(tmp_path / "one")) == "given123"
    assert wandb_run.identity(About(tmp_path / "two", group="a sweep of ours")) != "given123"
    monkeypatch.setenv("WANDB_RUN_ID", "other456")
    assert wandb_run.identity(About(tmp_path / "one")) == "given123"


# What goes wrong there stays there.


class Board:
    """A dashboard that fails, or hangs, in what is asked of it."""

    def __init__(self, bad=(), seconds=0.0):
        self.bad, self.seconds, self.seen = bad, seconds, []

    def _do(self, what):
        self.seen.append(what)
        if what in self.bad:
            time.sleep(self.seconds)
            raise ConnectionError("gone")

    def log_hyperparams(self, params):
        self._do("log_hyperparams")

    def log_metrics(self, metrics, step):
        self._do("log_metrics")

    def log_images(self, images, step):
        self._do("log_images")

    def log_table(self, table, step):
        self._do("log_table")

    def log_files(self, files):
        self._do("log_files")

    def close(self, state):
        self._do(f"close {state}")


def test_a_picture_that_fails_costs_no_curves(caplog):
    board = Board(bad=("log_images", "log_files"))
    guarded = Guarded(lambda: board, "W&B", patience=5)
    guarded.log_images(Images("a", [], []), 0)
    guarded.log_files(Files("checkpoint", []))
    guarded.log_metrics({"a": 1.0}, 0)
    guarded.close("finished")
    assert board.seen == ["log_images", "log_files", "log_metrics", "close finished"]
    assert caplog.text.count("W&B failed (ConnectionError: gone)") == 2


def test_curves_that_fail_end_it_but_what_was_there_is_kept(caplog):
    board = Board(bad=("log_metrics",))
    guarded = Guarded(lambda: board, "W&B", patience=5)
    for step in range(3):
        guarded.log_metrics({"a": 1.0}, step)
    guarded.close("failed")
    assert board.seen == ["log_metrics", "close failed"]
    assert caplog.text.count("goes on without it") == 1


@pytest.mark.parametrize("what", ["log_metrics", "log_table", "close finished", "opening"])
def test_a_hang_costs_the_run_its_patience_once(what, caplog):
    board, ended = Board(bad=(what,), seconds=30), []

    def make():
        if what == "opening":
            time.sleep(30)
        return board

    guarded = Guarded(make, "W&B", patience=0.3, abandon=lambda: ended.append(True))
    begin = time.monotonic()
    for step in range(3):
        guarded.log_metrics({"a": 1.0}, step)
        guarded.log_table(Table("a", "a", [], []), step)
    guarded.close("finished")
    assert time.monotonic() - begin < 3
    assert ended == [True]
    assert caplog.text.count("W&B did not answer for 0.3 seconds; the run goes on") == 1


STOPS = """
import os, signal, sys, time, pathlib
import wandb
from unlabeled.callbacks.loggers import wandb_logger
from unlabeled.shown import About

logger = wandb_logger(about=About(pathlib.Path(sys.argv[1])))
logger.log_metrics({"train/loss": 1.0}, 0)
assert not logger.failed
logger.patience = 4
os.kill(wandb.setup()._connection._proc._process.pid, signal.SIGSTOP)
for step in range(1, 9):
    logger.log_metrics({"train/loss": 1.0}, step)
logger.close("finished")
assert logger.hung
print("the evaluations", flush=True)
"""


def test_a_process_of_wandbs_that_hangs_holds_nothing_up(tmp_path):
    environment = {**os.environ, "WANDB_MODE": "offline"}
    environment.pop("WANDB_SERVICE", None)  # else it shares this process's
    command = [sys.executable, "-c", STOPS, str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the evaluations\n"
    assert "W&B did not answer for 4 seconds" in done.stderr


def test_a_requeued_run_is_marked(tmp_path, offline):
    logger = wandb_logger(about=About(tmp_path))
    logger.log_metrics({"a": 1.0}, 0)
    logger.close("requeued")
    (part,) = parts(tmp_path)
    assert part.preempted
    assert part.exit == 1


def test_what_is_too_large_is_referenced(tmp_path, offline, caplog):
    file = tmp_path / "last.ckpt"
    file.write_bytes(os.urandom(30_000))
    logger = wandb_logger(about=About(tmp_path / "run"), largest=0.02)
    logger.log_files(Files("checkpoint", [file], {"updates": 3}))
    logger.log_files(Files("features", [file], {"updates": 3}, stay=False))
    logger.close("finished")
    assert (
        "the checkpoint, 0 MB: referenced, not uploaded (logger.wandb.largest=0.02)" in caplog.text
    )
    (part,) = parts(tmp_path / "run")
    (artifact,) = part.artifacts  # features that go are not referenced
    (entry,) = artifact.manifest.contents
    assert entry.ref == file.as_uri()
    assert not entry.local_path
    assert not (tmp_path / "run" / wandb_artifacts.WAITING).exists()


def test_nothing_is_uploaded_where_that_is_off(tmp_path, offline):
    file = tmp_path / "last.ckpt"
    file.write_bytes(b"x")
    logger = wandb_logger(about=About(tmp_path / "run"), checkpoint="none")
    logger.log_files(Files("checkpoint", [file], {"updates": 3}))
    logger.close("finished")
    (part,) = parts(tmp_path / "run")
    assert part.artifacts == []


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"checkpoint": "yes"}, "logger.wandb.checkpoint='yes': choose one of"),
        ({"features": "all"}, "logger.wandb.features='all': choose one of"),
        ({"patience": 0}, "logger.wandb.patience=0 must be positive"),
        ({"largest": -1}, "largest=-1 not negative"),
    ],
)
def test_wrong_settings_are_refused(setting, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        wandb_logger(about=About(tmp_path), **setting)


# Pictures.


def test_views_of_every_shape_become_pictures():
    image, tiles = torch.zeros(3, 3, 8, 8), torch.zeros(3, 9, 3, 4, 4)
    shown = sheet("views/x", [image, tiles], rows=2, most=16)
    assert [x.shape for x in shown.images] == [(8, 8 + 9 * (4 + 4), 3)] * 2
    assert shown.captions == ["0", "1"]
    assert (shown.images[0][:, :8] == np.array([124, 116, 104])).all()  # ImageNet's mean colour
    few = sheet("views/x", [tiles], rows=3, most=4)
    assert few.captions[2] == "2, 4 of 9 views"
    assert few.images[0].shape == (4, 4 * 4 + 3 * 4, 3)
    grey = sheet("views/x", [torch.arange(16.0).view(1, 1, 4, 4)], rows=1, most=4).images[0]
    assert grey[0, 0].tolist() == [0, 0, 0]
    assert grey[-1, -1].tolist() == [255, 255, 255]


def test_a_montage_keeps_every_pixel():
    small, large = np.full((2, 3, 3), 7, np.uint8), np.full((4, 2, 3), 9, np.uint8)
    whole = montage([[small, large], [large]])
    assert whole.shape == (4 + 4 + 4, 3 + 4 + 2, 3)
    assert (whole == 7).all(-1).sum() == small[..., 0].size
    assert (whole == 9).all(-1).sum() == 2 * large[..., 0].size
    assert (whole[2:4, :3] == 255).all()


def test_figures_of_every_kind_are_shown(tmp_path):
    figures = {
        "lowshot.curve": {
            **{"kind": "curves", "title": "Low-shot", "x": [1, 2, 4], "names": ["trained", "b"]},
            **{"y": [[0.1, 0.2, np.nan], [0.3, 0.2, 0.1]], "xlabel": "k", "log": True},
        },
        "invariance.plane": {
            "kind": "points", "title": "Plane", "x": [1, 2], "y": [0.5, 0.1], "names": ["p", "q"]
        },
        "segmentation.sheet": {
            **{"kind": "sheet", "title": "Sheet", "titles": ["image", "answer"]},
            **{f"column{i}": np.zeros((2, 6, 6, 3), np.uint8) for i in range(2)},
        },
    }  # fmt: skip
    (tmp_path / "figures").mkdir()
    for name, arrays in figures.items():
        np.savez(tmp_path / f"figures/{name}.npz", **{k: np.asarray(v) for k, v in arrays.items()})
    found = {item.name: item for item in dashboard.shown(read(tmp_path))}
    curve = found["figures/lowshot.curve"]
    assert curve.columns == ["k", "y", "series"]
    assert curve.rows[:3] == [[1.0, 0.1, "trained"], [2.0, 0.2, "trained"], [1.0, 0.3, "b"]]
    assert curve.chart == "lines"
    assert curve.drawing.dtype == np.uint8
    assert curve.drawing.std() > 5  # something is drawn
    assert found["figures/invariance.plane"].rows == [[1.0, 0.5, "p"], [2.0, 0.1, "q"]]
    assert found["figures/segmentation.sheet"].images[0].shape == (6 + 4 + 6, 6 + 4 + 6, 3)


def test_a_checkpoint_that_no_run_made_is_a_source_all_the_same(tmp_path):
    (tmp_path / ".hydra").mkdir()
    target = "unlabeled.backbones.load.checkpoint"
    text = (
        f"method:\n  source: {{_target_: {target}, path: {tmp_path}/weights.pth}}\nresume: auto\n"
    )
    (tmp_path / ".hydra/config.yaml").write_text(text)
    about = Dashboards(tmp_path, []).about
    (source,) = about.sources.values()
    assert list(about.sources) == ["method.source.path"]
    assert source.file == tmp_path / "weights.pth"
    assert source.run is source.id is None
    assert wandb_artifacts.owner(source) != wandb_artifacts.owner(
        type(source)(tmp_path / "other.pth")
    )
