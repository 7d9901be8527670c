"""Disks that are full, read-only or gone, and folders that are taken: what a run says of them."""

import errno
import os
import shutil
import subprocess

import numpy as np
import pytest
from lives import Lives
from omegaconf import OmegaConf
from test_checkpoints import RUN, again
from test_runs import folder as folder  # a fixture
from test_runs import in_folder, metrics, same_weights, status, unlabeled

from unlabeled import checkpoints
from unlabeled.callbacks.metrics import MetricsCSV
from unlabeled.data.rendered import _kept, _reserve
from unlabeled.disk import replace_arrays
from unlabeled.method import Method


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    assert unlabeled(*RUN, f"hydra.run.dir={out}") == (0, "")
    return out


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Full disks.


@pytest.mark.parametrize("where", ["checkpoint", "metrics"])
def test_a_full_disk_stops_a_run_that_goes_on_later(run, tmp_path, monkeypatch, where):
    out, wrote = tmp_path / "run", []

    def third(original):
        def tried(*args):
            wrote.append(args)
            return full() if len(wrote) == 3 else original(*args)

        return tried

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            from unlabeled.callbacks.checkpoint import Checkpoint

            patch.setattr(Checkpoint, "_age", third(Checkpoint._age))
        else:
            patch.setattr(MetricsCSV, "_line", third(MetricsCSV._line))
        code, says = again(out)
    assert code == 1
    assert f"the disk of {out} is full" in says
    assert "go on from the newest checkpoint" in says
    assert "Traceback" not in says
    assert status(out)["state"] == "failed"
    assert "is full" in status(out)["reason"]
    assert again(out) == (0, "")
    assert same_weights(run, out)
    assert [row["train/loss"] for row in metrics(out)] == [
        row["train/loss"] for row in metrics(run)
    ]


def test_a_status_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch):
    from unlabeled.folder import Folder

    def broken(self, *args):
        monkeypatch.setattr(Folder, "_write", full)
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Method, "on_train_batch_start", broken)
    code, says = again(tmp_path / "run")
    assert code == 1
    assert "no such luck" in says


@pytest.fixture
def tiny_disk(tmp_path):
    """A function: bytes -> a file system of that size, or of another size after it was used."""
    place = tmp_path / "disk"
    place.mkdir()

    def of(size, option=""):
        mounted = os.path.ismount(place)
        options = f"size={size}{option}" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip(f"this user mounts nothing: {done.stderr.strip()}")
        return place

    yield of
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_really_is_full(run, tiny_disk):
    size = (run / "checkpoints/last.ckpt").stat().st_size
    out = tiny_disk(int(1.6 * size)) / "run"
    code, says = again(out)
    assert code == 1
    assert f"the disk of {out} is full" in says
    saved = checkpoints.read(out / "checkpoints/last.ckpt")
    assert saved["global_step"] == 1
    assert os.listdir(out / "checkpoints") == ["last.ckpt"]  # nothing half written is left
    tiny_disk(8 * size)
    assert again(out) == (0, "")
    assert same_weights(run, out)


def test_scenes_that_do_not_fit_are_told_before_they_are_written(tiny_disk):
    place = tiny_disk(1 << 20)
    np.lib.format.open_memmap(place / "x.npy", mode="w+", dtype="float32", shape=(1 << 20,))
    with pytest.raises(OSError, match="No space left on device"):
        _reserve(place / "x.npy")


def test_a_read_only_folder_is_wrong_input(tiny_disk):
    place = tiny_disk(1 << 20)
    (place / "run").mkdir()
    tiny_disk(1 << 20, option=",ro")
    for out in (place / "run", place / "another"):
        code, says = again(out)
        assert code == 2
        assert "Read-only file system" in says
        assert str(out) in says
        assert "hydra.run.dir" in says


def test_a_folder_without_permission_is_wrong_input(tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / ".lock"))

    monkeypatch.setattr("unlabeled.lock.os.open", denied)
    code, says = again(tmp_path)
    assert code == 2
    assert f"cannot write in the run's folder {tmp_path}" in says


# Folders that are gone.


def test_data_that_vanish_are_named_and_the_run_goes_on_once_they_are_back(
    folder,
    tmp_path,
    monkeypatch,
):
    root = shutil.copytree(folder / "bare", tmp_path / "images")
    lines = [*in_folder(root), "data.tier=folder", "data.workers=0", "evals=none"]
    lines += ["callbacks=none", "callbacks.checkpoint.every_n_steps=1"]
    assert unlabeled(*lines, f"hydra.run.dir={tmp_path / 'whole'}") == (0, "")

    def vanish(self, batch, batch_idx):
        if batch["step"] == 2:
            root.rename(tmp_path / "elsewhere")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Method, "on_train_batch_start", vanish)
        code, says = unlabeled(*lines, f"hydra.run.dir={out}")
    assert code == 1
    assert f"the folder of the images, {root}, is gone" in says
    code, says = unlabeled(*lines, f"hydra.run.dir={out}")
    assert code == 2
    assert f"{root} does not exist" in says
    (tmp_path / "elsewhere").rename(root)
    assert unlabeled(*lines, f"hydra.run.dir={out}") == (0, "")
    assert same_weights(tmp_path / "whole", out)


# Folders that are taken.


def test_the_second_run_in_a_folder_is_refused_until_the_first_is_dead(compose, tmp_path):
    long = ["trainer.max_steps=100000", "trainer.max_epochs=100000"]
    constant = ["method.optim.schedule=constant", "method.optim.warmup=0"]  # may be shorter
    lines = [*(x for x in RUN if "max_" not in x), *constant]
    cfg = compose(*lines, *long, "data.tier=folder", "data.workers=2")
    lives = Lives(OmegaConf.to_yaml(cfg, resolve=True), tmp_path / "run")
    process, tells = lives.start()
    assert tells.poll(300), lives.said()
    before = status(tmp_path / "run")
    command = [*lines, "trainer.max_epochs=100000", "data.tier=folder", "data.workers=2"]
    code, says = unlabeled(*command, long[0], f"hydra.run.dir={lives.out}")
    assert code == 2
    assert f"is in use by another run (process {process.pid} on " in says
    assert status(tmp_path / "run") == before
    assert process.is_alive()
    process.kill()
    process.join()
    code, says = unlabeled(*command, "trainer.max_steps=1", "hydra.run.dir=" + str(lives.out))
    assert code == 0, says  # at once: the dead one's workers hold nothing


# Pictures.


def test_arrays_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "figures/samples.npz"
    replace_arrays(path, {"x": np.arange(3)})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_arrays(path, {"x": np.arange(4)})
    assert list(path.parent.iterdir()) == [path]
    with np.load(path) as kept:
        assert kept["x"].tolist() == [0, 1, 2]


def test_damaged_pictures_stop_no_run(run, tmp_path, caplog, capfd):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "figures").mkdir(exist_ok=True)
    for name in ("samples.npz", "knn.curve.npz"):
        (copy / "figures" / name).write_bytes(b"PK\3\4 cut")
    assert again(copy) == (0, "")
    assert "samples.npz is damaged" in caplog.text + "".join(capfd.readouterr())
    assert (copy / "report.html").exists()


# Damaged caches.


def test_a_damaged_index_of_images_is_made_again(folder, tmp_path, monkeypatch):
    from unlabeled.data import files

    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "SETTLED", -1.0)
    expected = files.index(folder)
    (cache,) = files.cache_folder().iterdir()
    whole = cache.read_bytes()
    packed = whole.replace(b"PK\1\2-\3-\0\0\0\0", b"PK\1\2-\3-\0\0\0\x63")
    assert packed != whole  # by a method that nobody knows
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"\0" * len(whole), packed):
        cache.write_bytes(damaged)
        found = files.index(folder)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        assert cache.read_bytes()[:2] == whole[:2]  # and kept again


def test_rendered_scenes_with_a_damaged_head_are_made_again(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 3)))
    assert _kept(tmp_path / "x.npy", (4, 3), "float64") is not None
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole.replace(b"}", b"{", 1))
    assert _kept(tmp_path / "x.npy", (4, 3), "float64") is None
