"""Images into shards: nothing lost, nothing changed, stopped and gone on with."""

import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from unlabeled.data.layouts import Folder
from unlabeled.data.shards import Shards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def script(monkeypatch):
    path = ROOT / "scripts/make_shards.py"
    spec = importlib.util.spec_from_file_location("make_shards", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_shards", module)  # where workers look for `write`
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(0)
    for side, count in (("train", 11), ("val", 3)):
        for kind in ("cat", "dog"):
            (root / side / kind).mkdir(parents=True)
            for i in range(count):
                image = pixels.integers(0, 256, (20 + 10 * i, 30, 3), dtype=np.uint8)
                ending = ("png", "jpg", "JPEG")[i % 3]
                Image.fromarray(image).save(root / side / kind / f"{i}.{ending}")
    return root


def content(out):
    return {
        p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.suffix == ".tar"
    }


def members(out, side="train"):
    """(path, label, bytes) of every sample."""
    found = []
    for path in sorted((out / side).glob("*.tar")):
        with tarfile.open(path) as archive:
            names = archive.getnames()
            data = {name: archive.extractfile(name).read() for name in names}
        keys = list(dict.fromkeys(name.partition(".")[0] for name in names))
        for key in keys:
            (image,) = (n for n in names if n.startswith(key) and not n.endswith(("json", "cls")))
            label = data.get(f"{key}.cls")
            about = json.loads(data[f"{key}.json"])
            found.append((about, None if label is None else int(label), data[image], image))
    return found


@pytest.mark.parametrize(
    ("images", "each"), [(28, 250), (5_011, 314), (160_000, 10_000), (1_281_167, 10_000)]
)
def test_few_images_make_shards_for_all_workers(script, images, each):
    assert script.images_of_a_shard(images) == each


def test_every_file_is_there_once_unchanged_with_its_label(script, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert script.main([str(photos), str(out), "--per-shard", "5", "--workers", "2"]) == 0
    assert "28 images in 7 shards" in capsys.readouterr().out
    assert script.WRITTEN.value == 28  # what moves the bar, image by image
    for side, count in (("train", 22), ("val", 6)):
        where = "test" if side == "val" else side
        found = members(out, where)
        assert len({about["path"] for about, *_ in found}) == len(found) == count
        for about, label, data, name in found:
            path = photos / about["path"]
            assert data == path.read_bytes()
            assert label == ("cat", "dog").index(path.parent.name)
            assert name.rpartition(".")[2] == path.suffix[1:].lower()
    assert (out / "classes.txt").read_text() == "cat\ndog\n"
    order = [about["path"] for about, *_ in members(out)]
    assert order != sorted(order)
    splits, folder = Shards()(out, 0), Folder()(photos, 0)
    assert splits["train"].classes == ("cat", "dog")
    for side in ("train", "test"):
        assert len(splits[side]) == len(folder[side])
        paths = [about["path"] for about, *_ in members(out, side)]
        by_name = {folder[side].name(i): i for i in range(len(folder[side]))}
        for i, path in enumerate(paths):
            j = by_name[path]
            assert torch.equal(splits[side].image(i), folder[side].image(j))
            assert splits[side].labels[i] == folder[side].labels[j]


def test_checksums_and_statistics_tell_the_truth(script, photos, tmp_path):
    out = tmp_path / "out"
    script.main([str(photos), str(out), "--per-shard", "8"])
    sums = (out / "SHA256SUMS").read_text().splitlines()
    assert len(sums) == 4
    for line in sums:
        checksum, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == checksum
    if subprocess.run(["which", "sha256sum"], capture_output=True, check=False).returncode == 0:
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    stats = json.loads((out / "train/00002_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (6, 6)


def test_the_same_command_gives_the_same_bytes_and_writes_nothing_twice(script, photos, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    command = ["--per-shard", "5"]
    script.main([str(photos), str(out), *command, "--workers", "2"])
    script.main([str(photos), str(again), *command, "--workers", "1"])
    assert content(out) == content(again)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")}
    (out / "train/00001.tar").unlink()
    (out / "train/00002_stats.json").unlink()
    (out / "train/.00003.tar.partial").write_bytes(b"half")
    assert script.main([str(photos), str(out), *command]) == 0
    assert content(out) == content(again)
    after = {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")}
    assert {p.name for p in before if before[p] != after[p]} == {"00001.tar", "00002.tar"}
    assert not list(out.rglob(".*"))


def test_a_killed_run_goes_on(photos, tmp_path):
    out = tmp_path / "out"
    big = tmp_path / "big"
    big.mkdir()
    for i in range(36):
        Image.effect_noise((300, 300), 50).save(big / f"{i}.jpg")
    line = [sys.executable, ROOT / "scripts/make_shards.py", big, out, "--per-shard", "6"]
    line += ["--max-side", "200", "--workers", "1"]
    process = subprocess.Popen([*map(str, line)], start_new_session=True)
    while not list(out.rglob("*_stats.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in out.rglob("*_stats.json")}
    assert 0 < len(done) < 6
    subprocess.run([*map(str, line)], check=True)
    assert all(p.stat().st_mtime_ns == changed for p, changed in done.items())
    assert len(members(out)) == 36
    assert not list(out.rglob("*.partial"))


def test_large_images_become_smaller_jpegs(script, photos, tmp_path):
    out = tmp_path / "out"
    script.main([str(photos), str(out), "--max-side", "64"])
    sizes = set()
    for about, _, data, name in members(out):
        with Image.open(io.BytesIO(data)) as image, Image.open(photos / about["path"]) as old:
            sizes.add(max(image.size))
            assert image.width / image.height == pytest.approx(old.width / old.height, abs=0.02)
            if max(old.size) > 64:
                assert (image.format, name[-4:]) == ("JPEG", ".jpg")
                assert max(image.size) == 64
            else:
                assert data == (photos / about["path"]).read_bytes()
    assert sizes == {30, 40, 50, 60, 64}


def test_lists_and_kept_order(script, photos, tmp_path):
    names = [f"train/cat/{i}.png" for i in (6, 0, 3)]
    (photos / "list.txt").write_text("\n".join(names))
    out = tmp_path / "out"
    command = [str(photos), str(out), "--list", "list.txt", "--keep-order"]
    assert script.main(command) == 0
    found = members(out)
    assert [about["path"] for about, *_ in found] == names
    assert {label for _, label, *_ in found} == {None}
    assert not (out / "classes.txt").exists()


def test_imagenet_and_voc(script, tmp_path):
    from test_every_yaml import WNIDS

    for side in ("train", "val"):
        for wnid in WNIDS:
            (tmp_path / f"in/{side}/{wnid}").mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / f"in/{side}/{wnid}/0.jpg")
    assert script.main([str(tmp_path / "in"), str(tmp_path / "a"), "--layout", "imagenet"]) == 0
    assert sorted(label for _, label, *_ in members(tmp_path / "a", "test")) == [0, 1]
    voc = tmp_path / "VOCdevkit/VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / name).mkdir(parents=True)
    for side, image in (("trainval", "000001"), ("test", "000002")):
        (voc / f"ImageSets/Main/{side}.txt").write_text(f"{image}\n")
        Image.new("RGB", (9, 9)).save(voc / f"JPEGImages/{image}.jpg")
        (voc / f"Annotations/{image}.xml").write_text(
            "<annotation><size><width>9</width><height>9</height><depth>3</depth></size>"
            "<object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
            "<xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>"
        )
    out = tmp_path / "b"
    assert script.main([str(tmp_path / "VOCdevkit"), str(out), "--layout", "voc07"]) == 0
    ((about, label, *_),) = members(out, "test")
    assert about == {"path": "VOC2007/JPEGImages/000002.jpg", "classes": ["dog"]}
    assert label is None


def test_what_cannot_be_read_is_left_out_and_named(script, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.new("RGB", (90, 9), (i, 0, 0)).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/2.png").write_bytes(b"no image")
    whole = (tmp_path / "in/3.png").read_bytes()
    (tmp_path / "in/3.png").write_bytes(whole[:-30])  # a header alone says nothing of this
    command = [str(tmp_path / "in"), str(tmp_path / "out")]
    assert script.main(command) == 1
    assert "cannot read 2.png" in capsys.readouterr().err
    assert len(members(tmp_path / "out")) == 3
    checked = [command[0], str(tmp_path / "checked"), "--check", "--max-unreadable", "0.5"]
    assert script.main(checked) == 0
    assert "2 of 4 images cannot be read" in capsys.readouterr().err
    stats = json.loads((tmp_path / "checked/train/00000_stats.json").read_text())
    assert sorted(stats["failed_to_read"]) == ["2.png", "3.png"]
    assert (stats["count"], stats["successes"]) == (4, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--per-shard", "0"], "--per-shard must be at least 1"),
        (["--max-side", "-1"], "--max-side must be at least 1"),
        (["--quality", "101"], "--quality must be 1 to 100"),
        (["--layout", "imagenet", "--list", "x"], "exclude one another"),
        (["--layout", "imagenet"], "ImageNet needs train"),
        (["--list", "none.txt"], "cannot read the list"),
    ],
)
def test_wrong_input_is_named(script, tmp_path, capsys, options, said):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "in/0.png")
    assert script.main([str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_images_or_settings_do_not_overwrite(script, photos, tmp_path, capsys):
    out = tmp_path / "out"
    script.main([str(photos), str(out)])
    before = content(out)
    assert script.main([str(photos), str(out), "--per-shard", "5"]) == 2
    assert "other images or other settings" in capsys.readouterr().err
    assert content(out) == before
