"""Pretext tasks on images that were not learned from: measured, shown, and nothing disturbed."""

import csv

import numpy as np
import pytest
import torch
from conftest import RECORDINGS
from test_methods import assert_same, state

from unlabeled.batch import first
from unlabeled.callbacks.held_out import HeldOut
from unlabeled.callbacks.metrics import MetricsCSV
from unlabeled.callbacks.views import sheet
from unlabeled.report import html


def measured(folder):
    """How often anything was."""
    with (folder / "metrics.csv").open(newline="") as file:
        return sum(
            any(v for k, v in row.items() if k.startswith("held_out/"))
            for row in csv.DictReader(file)
        )


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        found = [row.get("held_out/accuracy") for row in csv.DictReader(file)]
    return [float(value) for value in found if value]


@pytest.mark.parametrize("name", ["rotation", "jigsaw"])
def test_measuring_changes_nothing_and_is_logged(tiny, tmp_path, name):
    plain, data, trainer = tiny(name)
    trainer.fit(plain, data)
    watched, data, trainer = tiny(
        name,
        callbacks=[HeldOut(every_n_epochs=1, limit=40, pictures=2)],
        logger=MetricsCSV(tmp_path),
        default_root_dir=str(tmp_path),
    )
    trainer.fit(watched, data)
    assert_same(state(plain), state(watched))
    assert len(rows(tmp_path)) == 2  # one per epoch; the end of the training adds none


def test_what_is_measured_is_the_loss_in_eval_mode(tiny):
    method, data, trainer = tiny("rotation")
    trainer.fit(method, data)
    batches = list(data.unseen(48))
    assert [len(b["index"]) for b in batches] == [16, 16, 16]
    positions = torch.cat([b["index"] for b in batches])
    assert len(positions.unique()) == 48
    counts = data.labels("test")[positions].bincount()
    assert counts.max() - counts.min() <= 1
    assert counts.sum() == 48
    batch = method.augmented(batches[0], 0)
    found = method.measure(batch, 0)
    method.eval()
    logits = method.head(method.backbone(batch["views"][0]))
    torch.testing.assert_close(
        found["rotation"], torch.nn.functional.cross_entropy(logits, batch["target"])
    )
    accuracy = (logits.argmax(1) == batch["target"]).float().mean()
    torch.testing.assert_close(found["accuracy"], accuracy)
    again = method.measure(method.augmented(batches[0], 0), 0)
    assert again["rotation"] == found["rotation"]


def test_pictures_of_the_task_are_in_the_report(tiny, tmp_path):
    def made(*more, **trainer):
        return tiny("rotation", "trainer.max_epochs=1", *more, **trainer)

    logger = MetricsCSV(tmp_path)
    callback = HeldOut(limit=16, pictures=3)
    method, data, trainer = made(
        callbacks=[callback], logger=logger, default_root_dir=str(tmp_path)
    )
    method.pictures = lambda batch: {"grey <input>": batch["views"][0][:3].clamp(0, 1)}
    trainer.fit(method, data)
    with np.load(tmp_path / "figures/samples.npz", allow_pickle=False) as file:
        assert file["titles"].tolist() == ["grey <input>"]
        assert file["column0"].dtype == np.uint8
        assert file["column0"].shape[0] == 3
    page = html.write(tmp_path).read_text()
    assert "grey &lt;input&gt;" in page
    assert page.count('alt="grey &lt;input&gt;"') == 3
    assert "Pretext accuracy" in page


@pytest.mark.parametrize("name", sorted(RECORDINGS))
def test_recordings_keep_their_sound_and_frames(tiny, tmp_path, name):
    method, data, trainer = tiny(
        name,
        "trainer.max_epochs=1",
        callbacks=[HeldOut(limit=16, pictures=3)],
        logger=MetricsCSV(tmp_path),
        default_root_dir=str(tmp_path),
    )
    trainer.fit(method, data)
    if method.pretext:
        assert measured(tmp_path) == 1
        with np.load(tmp_path / "figures/samples.npz", allow_pickle=False) as file:
            assert file["column0"].shape == (3, 16, 16, 3)
    (batch, *_) = data.unseen(16)
    some = first(batch, 4)
    assert len(some["frames"]) == len(some["label"]) == len(some["crops"][0]) == 4
    shown = sheet("views", method.augmented(some, 0)["views"], 2, 8)
    assert len(shown.images) == 2


def test_joint_embedding_methods_stay_silent(tiny, tmp_path):
    method, data, trainer = tiny(
        "simclr",
        "trainer.max_epochs=1",
        callbacks=[HeldOut()],
        logger=MetricsCSV(tmp_path),
        default_root_dir=str(tmp_path),
    )
    trainer.fit(method, data)
    assert not (tmp_path / "metrics.csv").exists() or not rows(tmp_path)


@pytest.mark.parametrize("bad", [{"every_n_epochs": 0}, {"limit": 0}, {"pictures": -1}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        HeldOut(**bad)
