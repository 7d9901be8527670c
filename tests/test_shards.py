"""Shards: the same images in the same order, whoever reads them and wherever they lie."""

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_stream import fit, flat

from unlabeled.data import tar
from unlabeled.data.archives import Archives
from unlabeled.data.copies import Copies
from unlabeled.data.decode import Center, Crops
from unlabeled.data.images import Images
from unlabeled.data.order import BufferedOrder
from unlabeled.data.remote import Source, expand, find
from unlabeled.data.shards import Shards
from unlabeled.data.stream import Stream

COUNTS, BATCH = (7, 5, 9, 6), 4
COUNT = sum(COUNTS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (value, 2 * value, 3 * value)).save(file, "png")
    return file.getvalue()


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write(folder, counts=COUNTS, labels=True):
    """Shards as img2dataset writes them; the first pixel of image i is i."""
    folder.mkdir(parents=True, exist_ok=True)
    i = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for _ in range(count):
                add(archive, f"{i:09d}.json", json.dumps({"key": f"{i:09d}"}).encode())
                add(archive, f"{i:09d}.png", png(i))
                add(archive, f"{i:09d}.txt", b"a caption")
                if labels:
                    add(archive, f"{i:09d}.cls", str(i % 3).encode())
                i += 1
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": count}))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"))


def module(root, kind=Images, *, layout=None, **changes):
    given = {"batch_size": BATCH, "workers": 0, "tier": "folder", **changes}
    return kind(
        root=str(root),
        layout=layout or Shards(buffer=8),
        decode=Crops(size=8, count=2),
        eval_decode=Center(size=8),
        **given,
    )


def values(split):
    return [int(split.image(i)[0, 0, 0]) for i in range(len(split))]


def epochs(data, count=1):
    data.setup("fit")
    seen = []
    for _ in range(count):
        seen += [b["index"].tolist() for b in data.train_dataloader()]
    return seen


# The archive.


def test_every_image_is_found_with_its_label(shards):
    split = Shards()(shards, 0)["train"]
    assert len(split) == COUNT
    assert values(split) == list(range(COUNT))
    assert split.labels.tolist() == [i % 3 for i in range(COUNT)]
    assert split.classes == ("0", "1", "2")
    assert split.name(8) == "00001.tar: 000000008.png"
    assert Shards(labels=False)(shards, 0)["train"].labels is None


@pytest.mark.parametrize(
    ("label", "says"), [("9" * 20, None), ("9" * 18, "9{18}, which can be no class's"), ("x", None)]
)
def test_a_number_that_is_no_class_is_none(tmp_path, label, says):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "a.png", png(1))
        add(archive, "a.cls", label.encode())
    if says:
        with pytest.raises(ValueError, match=says):
            Shards()(tmp_path, 0)
    else:
        assert Shards()(tmp_path, 0)["train"].labels is None


def test_shards_of_unknown_sizes_are_told_apart_by_their_places(shards, tmp_path):
    def fingerprint(folder, pattern):
        data = module(folder, layout=Shards(train=pattern.format(folder)))
        data.setup("test")
        return data.fingerprint("train")

    other = shutil.copytree(shards, tmp_path / "other")
    remote, here = (
        [fingerprint(x, p) for x in (shards, other)] for p in ("file://{}/*0.tar", "*0.tar")
    )
    assert here[0] == here[1]
    assert remote[0] == remote[1]  # listed, so sizes are known
    named = [fingerprint(x, "file://{}/00000.tar") for x in (shards, other)]
    assert named[0] != named[1]


def test_webdataset_reads_the_same(shards):
    wds = pytest.importorskip("webdataset")
    paths = [str(p) for p in sorted(shards.glob("*.tar"))]
    theirs = [s["png"] for s in wds.WebDataset(paths, shardshuffle=False, empty_check=False)]
    archives = Archives([Source(p) for p in paths], Copies(None, None))
    assert [archives.read(i).getvalue() for i in range(COUNT)] == theirs


def test_what_webdataset_writes_is_read(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "0.tar")) as sink:
        for i in range(5):
            sink.write({"__key__": f"a.b/{i}", "png": png(i), "cls": 4 - i})
    split = Shards()(tmp_path, 0)["train"]
    assert values(split) == list(range(5))
    assert split.labels.tolist() == [4, 3, 2, 1, 0]


def test_names_that_tar_stores_elsewhere_are_read(tmp_path):
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        long = "ü" * 120 + f"/{kind}"
        with tarfile.open(tmp_path / f"{kind}.tar", "w", format=kind) as archive:
            archive.addfile(_directory("d"))
            add(archive, f"{long}.PNG", png(kind))
            add(archive, f"{long}.cls", b"0\n")
    split = Shards()(tmp_path, 0)["train"]
    assert values(split) == sorted([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    assert split.labels.tolist() == [0, 0]
    assert "ü" * 120 in split.name(1)


def _directory(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def test_links_are_no_images_and_paths_that_lead_outside_are_refused(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(99))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "fine.png", png(1))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(info)
        add(archive, "../up.png", png(2))
        add(archive, "/etc/absolute.png", png(3))
    assert len(Shards()(tmp_path, 0)["train"]) == 3
    data = module(tmp_path, max_unreadable=0.9)
    data.setup()
    assert [b["crops"][0][0, 0, 0, 0].item() for b in data.scan("train", 0, 1)] == [1]
    list(data.scan("train"))
    assert {reason for reason in data.unreadable["train"].values()} == {
        "its path leads outside of the archive"
    }
    assert len(data.unreadable["train"]) == 2


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("unlabeled.data.rgb.MAX_PIXELS", 100)
    monkeypatch.setattr("unlabeled.data.archives.MOST_BYTES", 1000)
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "0.png", png(1))  # 192 pixels
        add(archive, "1.png", bytes(2000))
    data = module(tmp_path, max_unreadable=0.9)
    data.setup()
    with pytest.raises(
        ValueError, match=r"(?s)2 of 2 images.*16 x 12 pixels.*a file of 2000 bytes"
    ):
        list(data.scan("train"))


# The order.


@pytest.mark.parametrize(
    ("counts", "batch", "buffer", "lanes"),
    [
        *((COUNTS, 4, 8, 1), (COUNTS, 4, 8, 2), (COUNTS, 3, 1, 1), (COUNTS, 6, 1000, 3)),
        *(((1,), 1, 5, 1), ((0, 3, 0, 2), 1, 2, 1), ((50, 50, 50), 10, 7, 5)),
    ],
)
def test_an_order_meets_each_image_once_whatever_is_asked_at_a_time(counts, batch, buffer, lanes):
    def order():
        return BufferedOrder(np.array(counts), batch, buffer, lanes, 0, 3)

    n = sum(counts)
    whole = order()[0:n].tolist()
    assert len(whole) == len(order()) == n // batch * batch
    assert len(set(whole)) == len(whole)
    assert set(whole) <= set(range(n))
    by_two = order()
    assert [i for k in range(0, len(whole), 2) for i in by_two[k : k + 2].tolist()] == whole
    assert order()[len(whole) // 2 : n].tolist() == whole[len(whole) // 2 :]


def test_orders_differ_by_key_and_stay_near_their_shard():
    counts = np.full(100, 50)
    order = BufferedOrder(counts, 10, 200, 1, 0, 0)[0:5000]
    assert not torch.equal(order, BufferedOrder(counts, 10, 200, 1, 0, 1)[0:5000])
    shards = [set((part // 50).tolist()) for part in order.split(10)]
    assert max(map(len, shards)) <= 2 * 3 * 200 / 50  # of one and a half windows to both sides
    first = [s for k in range(40) for s in shards[k]]
    assert len(set(first)) < 20  # not of all 100
    assert [len(s) for s in shards].count(1) < 5  # and no batch comes from one shard alone
    place = torch.empty(5000, dtype=torch.int64)
    place[order] = torch.arange(5000)
    assert (place.view(100, 50).float().std(1) > 40).all()  # a shard's images are spread


def test_every_image_may_come_anywhere_in_a_small_set():
    seen = torch.zeros(6, 6)
    for epoch in range(600):
        order = BufferedOrder(np.array([2, 4]), 1, 6, 1, 0, epoch)[0:6]
        seen[torch.arange(6), order] += 1
    assert ((seen - 100).abs() < 50).all()


def test_a_lane_keeps_nodes_from_the_shards_of_others():
    counts = np.full(40, 25)
    order = BufferedOrder(counts, 20, 100, 2, 0, 0)[0:1000].view(50, 2, 10)
    ours, theirs = (set((order[:, lane] // 25).flatten().tolist()) for lane in (0, 1))
    assert len(ours) == len(theirs) == 20
    assert not ours & theirs


@pytest.mark.parametrize("lanes", [1, 2])
def test_workers_and_processes_do_not_change_the_sequence(shards, lanes):
    def read(workers, rank=0, world=1):
        data = module(shards, layout=Shards(buffer=8, lanes=lanes), workers=workers)
        data._place = lambda: {"rank": rank, "world": world}
        return epochs(data, 2)

    whole = read(0)
    assert len(whole) == 2 * (COUNT // BATCH)
    for k in range(2):
        epoch = flat(whole[k * 6 : k * 6 + 6])
        assert len(set(epoch)) == len(epoch) == 24
    assert whole[:6] != whole[6:]
    assert read(1) == read(2) == whole
    parts = [read(1, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Images, Stream])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 1)])
def test_a_stopped_run_goes_on_at_the_next_image(shards, tmp_path, kind, before, after):
    passes = {"max_epochs": 1 if kind is Stream else 2}
    whole = fit(module(shards, kind), tmp_path / "whole", **passes).seen
    first = fit(module(shards, kind, workers=before), tmp_path, stop=3, **passes).seen
    last = tmp_path / "last.ckpt"
    rest = fit(module(shards, kind, workers=after), tmp_path, ckpt=last, **passes).seen
    assert [*first, *rest] == whole
    assert len(first) == 3


@pytest.mark.filterwarnings("ignore")
def test_a_stream_refuses_other_shards(shards, tmp_path):
    fit(module(shards, Stream), tmp_path, stop=2)
    fewer = Shards(train="0000[0-2].tar", buffer=8)
    with pytest.raises(ValueError, match="other images: images would come twice"):
        fit(module(shards, Stream, layout=fewer), tmp_path, ckpt=tmp_path / "last.ckpt")


def test_limits_and_shares_take_images_of_all_shards(shards):
    data = module(shards, limit=12, layout=Shards(test_share=0.25, buffer=8))
    seen = flat(epochs(data))
    assert sorted(seen) == list(range(12))
    assert data.size("test") == 6
    train, test = ({data.path(s, i) for i in range(data.size(s))} for s in ("train", "test"))
    assert not train & test
    assert len({name[:5] for name in train}) == 4


def test_memory_holds_them_too(shards):
    data = module(shards, tier="memory", size=16)
    (batch, *_) = data.train_dataloader()
    assert batch["crops"][0][:, 0, 0, 0].tolist() == batch["index"].tolist()


# What is broken.


def spoil(path, at, data):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def test_a_damaged_member_is_skipped_counted_and_named(shards, tmp_path):
    root = tmp_path / "shards"
    shutil.copytree(shards, root)
    index = tar.scan(root / "00002.tar")
    spoil(root / "00002.tar", int(index.offsets[3]), b"garbage" * 4)
    data = module(root, max_unreadable=0.1)
    seen = flat(epochs(data, 2))
    assert 7 + 5 + 3 not in seen
    assert list(data.unreadable["train"]) == [15]
    assert data.path("train", 15) == "00002.tar: 000000015.png"
    with pytest.raises(ValueError, match=r"(?s)1 of 27 images.*00002.tar: 000000015.png"):
        epochs(module(root, max_unreadable=0), 2)


def test_images_behind_a_damaged_header_are_found(shards, tmp_path):
    root = tmp_path / "shards"
    shutil.copytree(shards, root)
    with tarfile.open(root / "00002.tar") as archive:
        header = archive.getmember("000000015.png").offset
    spoil(root / "00002.tar", header + 100, b"\xff" * 100)
    split = Shards(labels=False)(root, 0)["train"]
    assert len(split) == COUNT
    bad = "00002.tar: (a damaged header after 000000015.json)"
    assert bad in [split.name(i) for i in range(COUNT)]
    data = module(root, max_unreadable=0.1)
    data.setup()
    assert len(list(data.scan("train", batch_size=1))) == COUNT
    assert [data.path("train", i) for i in data.unreadable["train"]] == [bad]
    found = {values(split.take(torch.tensor([i])))[0] for i in range(COUNT) if split.name(i) != bad}
    assert found == set(range(COUNT)) - {15}


@pytest.mark.parametrize("lost", [1, 600, 3000])
def test_an_archive_that_was_cut_short_loses_its_end_alone(shards, tmp_path, lost):
    root = tmp_path / "shards"
    shutil.copytree(shards, root)
    path = root / "00003.tar"
    end = int(tar.scan(path).offsets[-1] + tar.scan(path).sizes[-1])
    os.truncate(path, end - lost)
    data = module(root, max_unreadable=0.5, layout=Shards(labels=False, buffer=8))
    data.setup()
    list(data.scan("train"))
    bad = data.unreadable["train"]
    assert data.size("train") - len(bad) == COUNT - 1
    last = "00003.tar: (whatever came after"
    assert [data.path("train", i).startswith(last) for i in bad].count(True) == 1
    assert len(bad) == 1 + (lost == 1)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 100])
def test_what_is_no_archive_is_named(shards, tmp_path, content):
    root = tmp_path / "shards"
    shutil.copytree(shards, root)
    (root / "00001.tar").write_bytes(content)
    data = module(root, max_unreadable=0.1, layout=Shards(labels=False, buffer=8))
    seen = flat(epochs(data, 2))
    assert len(set(seen)) == 22
    ((i, reason),) = data.unreadable["train"].items()
    assert data.path("train", i).startswith("00001.tar: (")
    assert reason == "damaged archive"


def test_compressed_archives_are_refused(shards, tmp_path):
    (tmp_path / "0.tar").write_bytes(gzip.compress((shards / "00000.tar").read_bytes()))
    with pytest.raises(ValueError, match=r"0\.tar is compressed.*unpack it"):
        Shards()(tmp_path, 0)


def test_an_archive_without_images_is_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "0.txt", b"text")
    with pytest.raises(ValueError, match=r"no images in the shard .*0\.tar"):
        Shards()(tmp_path, 0)


def test_shards_that_are_not_there_are_named(shards, tmp_path):
    with pytest.raises(ValueError, match=r"2 of the 6 shards .* first .*00004\.tar"):
        Shards(train="{00000..00005}.tar")(shards, 0)
    with pytest.raises(ValueError, match=r"no shards match \['x\*'\]"):
        Shards(train="x*")(shards, 0)
    with pytest.raises(ValueError, match=r"no shards .*data\.root.*make_shards"):
        Shards()(tmp_path, 0)
    with pytest.raises(ValueError, match="name a shard twice"):
        Shards(train=["*.tar", "00000.tar"])(shards, 0)


def test_a_shard_that_vanishes_is_replaced_by_the_next(shards, tmp_path):
    root = tmp_path / "shards"
    shutil.copytree(shards, root)
    data = module(root, max_unreadable=0.3)
    data.setup("fit")
    (root / "00001.tar").unlink()
    seen = flat([b["index"].tolist() for b in data.train_dataloader()])
    assert len(seen) == 24
    assert not set(seen) & set(range(7, 12))
    assert set(data.unreadable["train"]) <= set(range(7, 12))
    assert all("FileNotFound" in reason for reason in data.unreadable["train"].values())
    stand_ins = [i + 5 for i in data.unreadable["train"]]  # at the same place in the next
    assert set(seen) == set(seen) | set(stand_ins)
    assert len(seen) - len(set(seen)) <= len(stand_ins)
    strict = module(root, layout=Gone(root))
    with pytest.raises(ValueError, match=r"(?s)of 27 images.*00001\.tar: image"):
        list(strict.train_dataloader())


class Gone(Shards):
    """Shards of which one goes missing after they were counted."""

    def __init__(self, root):
        super().__init__(buffer=8)
        write(root)

    def __call__(self, root, seed):
        splits = super().__call__(root, seed)
        (root / "00001.tar").unlink()
        return splits


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"test_share": 1.0}, "test_share"),
        ({"buffer": 0}, "buffer"),
        ({"lanes": 0}, "lanes"),
        ({"cache_gb": 0}, "cache_gb"),
    ],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Shards(**settings)


def test_lanes_that_do_not_divide_the_batch_are_refused_at_once(shards):
    with pytest.raises(ValueError, match=r"lanes=3 must divide data\.batch_size=4"):
        module(shards, layout=Shards(lanes=3)).setup("fit")


# The index.


def test_an_index_is_kept_and_made_anew_when_the_archive_changes(tmp_path, monkeypatch):
    root, scans = write(tmp_path / "shards"), []
    scan = tar.scan
    monkeypatch.setattr(tar, "scan", lambda path: scans.append(path.name) or scan(path))
    first = Shards()(root, 0)["train"]
    assert len(scans) == 4
    assert Shards()(root, 0)["train"].identity() == first.identity()
    assert len(scans) == 4
    with tarfile.open(root / "00001.tar", "a") as archive:
        add(archive, "new.png", png(77))
        add(archive, "new.cls", b"1")
    assert len(Shards()(root, 0)["train"]) == COUNT + 1
    assert scans[4:] == ["00001.tar"]


def test_damaged_indices_are_made_anew(tmp_path, cache):
    root = write(tmp_path / "shards")
    Shards()(root, 0)
    for path in (cache / "index").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    assert values(Shards()(root, 0)["train"]) == list(range(COUNT))


# From elsewhere.


def test_patterns():
    assert expand("a{08..10}b") == ["a08b", "a09b", "a10b"]
    assert expand("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand("pipe:awk '{print}' x") == ["pipe:awk '{print}' x"]


@pytest.fixture
def memory(shards):
    import fsspec

    system = fsspec.filesystem("memory")
    for path in shards.iterdir():
        system.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [None, "*.tar", "{00000..00003}.tar"])
def test_urls_give_the_same_images(shards, memory, train, workers):
    data = module("memory://bucket", layout=Shards(train=train, buffer=8), workers=workers)
    local = module(shards, layout=Shards(train=train, buffer=8, labels=False))
    assert epochs(data) == epochs(local)
    assert "label" not in data.gives  # counted by _stats.json, without reading the shards
    for batch in data.scan("train"):
        assert batch["crops"][0][:, 0, 0, 0].tolist() == batch["index"].tolist()


def test_nothing_is_copied_before_it_is_read(memory, cache):
    split = Shards()(Path("memory://bucket"), 0)["train"]
    assert not list(cache.rglob("*.tar"))
    split.image(8)
    assert len(list(cache.rglob("*.tar"))) == 1


def test_without_statistics_shards_are_copied_to_count_them(memory, shards, cache):
    for name in memory.glob("/bucket/*_stats.json"):
        memory.rm(name)
    splits = [Shards()(Path("memory://bucket"), 0)["train"] for _ in range(2)]
    assert splits[0].labels.tolist() == [i % 3 for i in range(COUNT)]
    assert splits[0].identity() == splits[1].identity()
    assert len(list(cache.rglob("*.tar"))) == 4


def test_file_urls_and_pipes(shards, tmp_path):
    whole = epochs(module(shards, layout=Shards(buffer=8)))
    for place in (f"file://{shards}/*.tar", f"pipe:cat {shards}/{{00000..00003}}.tar"):
        data = module(tmp_path, layout=Shards(train=place, buffer=8), workers=2)
        assert epochs(data) == whole
        assert values(data._read().split("train")) == list(range(COUNT))


def test_a_command_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("unlabeled.data.remote.time.sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=r"pipe:sh -c 'echo no >&2; false'.*ended with 1: no"):
        Shards(train="pipe:sh -c 'echo no >&2; false'")(tmp_path, 0)
    with pytest.raises(ValueError, match=r"cannot read the shard memory://bucket/none\.tar"):
        Shards(train="memory://bucket/none.tar")(tmp_path, 0)


def test_a_missing_package_or_protocol_is_named(tmp_path, monkeypatch):
    def missing(place):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ValueError, match=r"Install s3fs.*pip install 'unlabeled\[shards\]'"):
        Shards(train="s3://bucket/0.tar")(tmp_path, 0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"nonsense://x/0\.tar: Protocol not known"):
        Shards(train="nonsense://x/0.tar")(tmp_path, 0)


def test_statistics_that_promise_too_much_cost_the_images_that_are_not_there(memory):
    memory.pipe_file("/bucket/00001_stats.json", json.dumps({"successes": 6}).encode())
    data = module("memory://bucket", max_unreadable=0.1)
    seen = flat(epochs(data, 2))
    assert set(data.unreadable["train"].values()) == {"the archive has only 5 images"}
    assert 12 not in seen


def test_copies_stay_below_their_limit(memory, cache):
    size = memory.info("/bucket/00000.tar")["size"]
    layout = Shards(cache_gb=2.5 * size / 1e9)
    split = layout(Path("memory://bucket"), 0)["train"]
    for _ in range(2):
        assert values(split) == list(range(COUNT))
        kept = [p.stat().st_size for p in cache.rglob("*.tar")]
        assert 0 < sum(kept) <= 2.5 * size
    split.archives._start()
    assert values(split) == list(range(COUNT))


def test_a_copy_that_is_stopped_leaves_nothing(memory, cache, monkeypatch):
    import unlabeled.data.remote as remote

    def stopped(source, target, length):
        target.write(b"half")
        raise KeyboardInterrupt

    split = Shards()(Path("memory://bucket"), 0)["train"]
    with monkeypatch.context() as patch:
        patch.setattr(remote.shutil, "copyfileobj", stopped)
        with pytest.raises(KeyboardInterrupt):
            split.image(0)
    assert not [p for p in cache.rglob("*") if p.suffix in (".tar", ".partial")]
    assert values(split) == list(range(COUNT))


def test_find_tells_sizes(shards, memory):
    local, there = find(shards, "*.tar"), find(Path("memory://bucket"), "*.tar")
    assert [s.size for s in local] == [s.size for s in there]
    assert [s.name for s in local] == [s.name for s in there] == [f"0000{i}.tar" for i in range(4)]


def test_a_copy_that_was_cut_is_fetched_again(shards, tmp_path):
    copies = Copies(str(tmp_path / "copies"), None)
    whole = (shards / "00000.tar").read_bytes()
    for place in (f"pipe:cat {shards}/00000.tar", f"file://{shards}/00000.tar"):
        source = Source(place)  # of unknown size
        os.close(copies.open(source))
        os.truncate(copies.path(place), 700)
        file = copies.open(source)
        assert os.fstat(file).st_size == len(whole)
        assert os.pread(file, len(whole), 0) == whole
        os.close(file)
