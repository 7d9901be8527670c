"""The index of a folder of many files: in bounded memory, and read again in no time."""

import gc
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from unlabeled.data import files, sorted_names, tree
from unlabeled.data.tree import read_tree


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache") / "unlabeled"
    monkeypatch.setenv("UNLABELED_CACHE", str(folder))
    return folder


def many(root, count, folders):
    """Empty files, equally many in every folder."""
    for i in range(folders):
        (root / f"{i:02}").mkdir(parents=True)
        for j in range(count // folders):
            (root / f"{i:02}/{j * 7919 % 10007}-{'x' * (j % 30)}.jpg").touch()
    for folder in (root, *root.iterdir()):
        os.utime(folder, ns=(10**18, 10**18))  # long ago
    return root


def peak(work):
    """The most bytes that Python and NumPy held meanwhile, and the result."""
    gc.collect()
    tracemalloc.start()
    try:
        result = work()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def by_hand(root):
    found = [Path(at, name) for at, _, names in os.walk(root) for name in names]
    return sorted(os.fsencode(path.relative_to(root)) for path in found)


def test_an_index_takes_the_memory_of_its_paths(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(sorted_names, "RUN", 500)
    monkeypatch.setattr(tree, "FEW", 500)
    monkeypatch.setattr(sorted_names, "READ", 100)
    most = {}
    for count in (1_200, 6_000):
        root = many(tmp_path / str(count), count, folders=3)
        made, found = peak(lambda root=root: files.index(root))
        assert found.paths.tolist() == by_hand(root)
        assert found.sizes.tolist() == [0] * count
        with monkeypatch.context() as patch:
            patch.setattr(files, "walk", None)
            again, _ = peak(lambda root=root: files.index(root))
            split, _ = peak(lambda root=root: read_tree(root))
        most[count] = np.array([made, again, split])
    width = found.paths.itemsize
    made, again, split = (most[6_000] - most[1_200]) / 4_800  # bytes of a file
    # While they are saved and loaded, up to 16 MB are copied; as objects of Python they take 200.
    assert made < 2.2 * (width + 8)
    assert again < 3.0 * (width + 8)
    assert split < 2.2 * (width + 8) + 30  # all of them are training images: a copy, with labels
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("fails", ["folder", "runs", "listing"])
def test_without_room_for_an_index_memory_serves(tmp_path, cache, monkeypatch, fails):
    monkeypatch.setattr(sorted_names, "RUN", 30)
    root = many(tmp_path / "data", 100, 2)

    def full(*_args, **_settings):
        raise OSError(28, "No space left on device")

    if fails == "folder":
        cache.write_bytes(b"a file where the folder should be")
    else:
        place = sorted_names if fails == "runs" else files
        name = "TemporaryFile" if fails == "runs" else "NamedTemporaryFile"
        monkeypatch.setattr(place.tempfile, name, full)
    found = files.index(root)
    assert found.paths.tolist() == by_hand(root)
    assert len(found.sizes) == 100
    assert len(found.folders) == len(found.changed) == 3


@pytest.mark.slow
def test_a_second_start_reads_100_000_files_in_seconds(tmp_path, cache):
    root = many(tmp_path / "data", 100_000, 20)
    spent = []
    for _ in range(2):
        start = time.process_time()
        splits = read_tree(root)
        spent.append(time.process_time() - start)
        assert len(splits["train"]) == 100_000
    assert spent[1] < min(2, spent[0])
