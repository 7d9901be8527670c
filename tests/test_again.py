"""Commands started again in a folder: what counts as done, and which scores are still true."""

import json
import shutil

import pytest
from PIL import Image
from test_runs import TINY, checkpoint, folder, in_folder, metrics, same_weights, status, unlabeled

from unlabeled.method import Method

__all__ = ["folder"]  # the fixture

QUICK = ["evals=knn", "evals.knn.k=[1]", "baselines=false"]
KNN = "knn/k1_t0.07/top1"


def names(out):
    path = out / "scores.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return {name for name in found if name.endswith("top1")}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run that was trained and scored."""
    out = tmp_path_factory.mktemp("first")
    assert unlabeled(*TINY, *QUICK, f"hydra.run.dir={out}") == (0, "")
    assert names(out) == {KNN}
    return out


@pytest.fixture
def copy(first, tmp_path):
    """Another folder of the same run."""
    return shutil.copytree(first, tmp_path / "copy")


def test_a_finished_run_goes_on_from_the_path_that_is_named(copy, tmp_path):
    out = tmp_path / "other"
    lines = [*TINY, "evals=none", "seed=1"]
    assert unlabeled(*lines, "trainer.max_steps=2", f"hydra.run.dir={out}") == (0, "")
    assert unlabeled(*lines, f"resume={out}", f"hydra.run.dir={copy}") == (0, "")
    assert [row["step"] for row in metrics(copy)] == ["2", "3"]  # it trained, from there
    assert checkpoint(copy)["global_step"] == 4
    assert names(copy) == set()  # they were of other weights
    assert not (copy / "figures/embedding.npz").exists()


def test_what_was_begun_anew_and_broke_off_is_not_taken_for_finished(copy, tmp_path, monkeypatch):
    lines = [*TINY, "evals=none", "callbacks.checkpoint.every_n_steps=1"]

    def broken(self, batch, batch_idx):
        if batch["step"] == 2:
            raise RuntimeError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(Method, "on_train_batch_start", broken)
        code, _ = unlabeled(*lines, "seed=1", "resume=none", f"hydra.run.dir={copy}")
    assert code == 1
    assert checkpoint(copy)["global_step"] == 2
    assert unlabeled(*lines, "seed=1", f"hydra.run.dir={copy}") == (0, "")
    assert checkpoint(copy)["global_step"] == 4
    assert unlabeled(*lines, "seed=1", f"hydra.run.dir={tmp_path / 'whole'}") == (0, "")
    assert same_weights(copy, tmp_path / "whole")


def test_a_longer_training_leaves_no_scores_of_the_shorter_one(tmp_path):
    constant = ["method.optim.schedule=constant", "method.optim.warmup=0"]
    again = [*TINY, *constant, f"hydra.run.dir={tmp_path}"]
    assert unlabeled(*again, "trainer.max_steps=2", *QUICK) == (0, "")
    assert names(tmp_path) == {KNN}
    assert unlabeled(*again, "evals=none") == (0, "")
    assert names(tmp_path) == set()
    assert unlabeled(*again, *QUICK) == (0, "")
    assert names(tmp_path) == {KNN}


def test_a_training_along_a_schedule_grows_longer_in_another_folder(copy, tmp_path):
    longer = [*TINY, "trainer.max_steps=6", "evals=none"]
    code, says = unlabeled(*longer, f"hydra.run.dir={copy}")
    assert code == 2
    assert "differs in trainer.max_steps: choose another hydra.run.dir" in says
    assert f"write resume={copy}" in says
    assert names(copy) == {KNN}
    out = tmp_path / "longer"
    assert unlabeled(*longer, f"resume={copy}", f"hydra.run.dir={out}") == (0, "")
    assert [row["step"] for row in metrics(out)] == ["4", "5"]


@pytest.mark.parametrize(
    ("line", "now"), [("evals.knn.k=[1,2]", "knn/k2_t0.07/top1"), ("baselines=true", None)]
)
def test_an_evaluation_with_other_settings_is_missing(copy, line, now):
    lines = [*TINY, *(x for x in QUICK if x.partition("=")[0] != line.partition("=")[0])]
    assert unlabeled(*lines, line, f"hydra.run.dir={copy}") == (0, "")
    assert {KNN, now or f"baseline/random/{KNN}"} <= names(copy)
    written = (copy / "scores.json").stat().st_mtime_ns
    assert unlabeled(*lines, line, f"hydra.run.dir={copy}") == (0, "")
    assert (copy / "scores.json").stat().st_mtime_ns == written  # now it is there


def test_evaluating_alone_is_done_once_and_for_one_backbone(first, tmp_path):
    lines = ["method=none", *(x for x in TINY if x.startswith(("data", "trainer"))), *QUICK]
    out = f"hydra.run.dir={tmp_path / 'run'}"
    scored = [*lines, "backbone=checkpoint", f"backbone.path={first}", out]
    assert unlabeled(*scored) == (0, "")
    written = (tmp_path / "run/scores.json").stat().st_mtime_ns
    assert unlabeled(*scored) == (0, "")
    assert (tmp_path / "run/scores.json").stat().st_mtime_ns == written
    code, says = unlabeled(*lines, "backbone.width=16", out)
    assert code == 2
    assert "holds another run" in says
    other = [*lines, "evals=none", "resume=none", "backbone.width=16", out]
    other.remove("evals.knn.k=[1]")
    assert unlabeled(*other) == (0, "")
    assert names(tmp_path / "run") == set()


def test_scoring_needs_no_full_batch(folder, tmp_path):
    lines = [*in_folder(folder / "labelled"), "data.layout.test_share=0.2", *QUICK]
    lines = ["method=none", *(x for x in lines if not x.startswith(("method", "optim", "aug")))]
    assert unlabeled(*lines, "data.batch_size=1000", f"hydra.run.dir={tmp_path}") == (0, "")
    assert names(tmp_path) == {KNN}


def test_what_nobody_asked_for_needs_no_labels(folder, tmp_path, capsys):
    lines = [*in_folder(folder / "bare"), "data.batch_size=8", "trainer.max_steps=1"]
    assert unlabeled(*lines, f"hydra.run.dir={tmp_path / 'default'}") == (0, "")
    assert "skipped the evaluation knn: the images of the train" in capsys.readouterr().out
    code, says = unlabeled(*lines, "evals=standard", f"hydra.run.dir={tmp_path / 'typed'}")
    assert code == 2
    assert "the evaluation 'knn' cannot run" in says


@pytest.mark.parametrize("tier", ["folder", "memory"])
def test_images_that_cannot_be_read_are_wrong_input(tmp_path, tier):
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (20, 20), (9 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    for i in range(5):
        (tmp_path / f"images/{i}.png").write_bytes(b"broken")
    lines = [*in_folder(tmp_path / "images"), f"data.tier={tier}", "data.workers=0", "evals=none"]
    code, says = unlabeled(*lines, "data.batch_size=8", f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 2
    assert "cannot be read, more than data.max_unreadable=0.01 allows" in says
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_training_without_end_is_refused(tmp_path):
    endless = ["trainer.max_steps=-1", "trainer.max_epochs=-1"]
    code, says = unlabeled(*TINY, *endless, "evals=none", f"hydra.run.dir={tmp_path}")
    assert code == 2
    assert "give trainer.max_epochs or trainer.max_steps" in says


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_out_of_range_is_named(tmp_path, seed):
    code, says = unlabeled(*TINY, "evals=none", f"seed={seed}", f"hydra.run.dir={tmp_path}")
    assert code == 2
    assert f"seed must be in [0, 4294967295], got {seed}" in says
