"""YFCC100M: metadata in every form, a subset that depends on nothing but its seed, and labels."""

import bz2
import io
import shutil
import sqlite3
import tarfile
import tracemalloc
from hashlib import md5

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.data import selection
from unlabeled.data.decode import Center, Crops
from unlabeled.data.images import Images
from unlabeled.data.metadata import Photo, file_name, photos, words
from unlabeled.data.selection import Selection
from unlabeled.data.yfcc import YFCC

NAMES = [
    *("photoid", "uid", "unickname", "datetaken", "dateuploaded", "capturedevice", "title"),
    *("description", "usertags", "machinetags", "longitude", "latitude", "accuracy", "pageurl"),
    *("downloadurl", "licensename", "licenseurl", "serverid", "farmid", "secret"),
    *("secretoriginal", "ext", "marker"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))


def url(i):
    return f"http://farm1.staticflickr.com/{i}/{i}_a.jpg"


def row(i, columns=23):
    """Every seventh is a video; every second has a place, every third tags."""
    said = dict.fromkeys(NAMES, "x")
    said |= {"photoid": str(1000 + i), "downloadurl": url(i), "marker": str(int(i % 7 == 6))}
    said["usertags"] = "" if i % 3 == 2 else f"all,Tag+{i % 3},tag+{i % 3},only{i}"
    said["longitude"], said["latitude"] = (str(i % 90), "10.5") if i % 2 else ("", "")
    values = list(said.values())
    if columns == 25:
        values[1:1] = [file_name(url(i)).decode()]
        values.insert(0, str(i))
    return values


def write_rows(root, count, columns=23, name="yfcc100m_dataset", order=1):
    root.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(row(i, columns)) for i in range(count)][::order]
    content = ("\n".join(lines) + "\n").encode()
    (root / name).write_bytes(bz2.compress(content) if name.endswith("bz2") else content)
    return root


def write_yfcc(root, count, columns=23):
    """Metadata and images; the first pixel of photograph 1000 + i is i."""
    write_rows(root, count, columns)
    for i in range(count):
        name = file_name(url(i)).decode()
        path = root / f"data/images/{name[:3]}/{name[3:6]}/{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (i, i, i)).save(path, quality=100)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_yfcc(tmp_path_factory.mktemp("yfcc"), 50)


def database(path, count):
    with sqlite3.connect(path) as base:
        base.execute(f"CREATE TABLE yfcc100m_dataset ({', '.join(NAMES)})")
        marks = ", ".join("?" * len(NAMES))
        rows = [row(i) for i in range(count)]
        base.executemany(f"INSERT INTO yfcc100m_dataset VALUES ({marks})", rows)
    base.close()
    return path


def test_a_files_name_is_its_urls_md5_without_leading_zeros():
    text = next(t for t in map(str, range(99)) if "0" in md5(t.encode()).hexdigest()[::2])
    digest = md5(text.encode()).hexdigest()
    expected = "".join(
        digest[k + 1] if digest[k] == "0" else digest[k : k + 2] for k in range(0, 32, 2)
    )
    assert file_name(text).decode() == expected
    assert len(expected) < 32


def test_every_form_of_the_metadata_gives_the_same(tmp_path):
    old = list(photos([write_rows(tmp_path / "a", 30) / "yfcc100m_dataset"]))
    assert [x.id for x in old] == [1000 + i for i in range(30) if i % 7 != 6]
    assert old[1] == Photo(1001, file_name(url(1)), "all,Tag+1,tag+1,only1", (1.0, 10.5))
    assert old[2].place is None
    new = write_rows(tmp_path / "b", 30, 25) / "yfcc100m_dataset"
    packed = write_rows(tmp_path / "c", 30, name="yfcc100m_dataset-0.bz2")
    sql = database(tmp_path / "yfcc100m_dataset.sql", 30)
    for path in (new, packed / "yfcc100m_dataset-0.bz2", sql):
        assert list(photos([path])) == old


def test_words():
    assert words("New+York,new+york,caf%C3%A9,,+") == ["new york", "café"]


def test_all_photographs_have_their_pixels(root):
    split = YFCC(count=None)(root, 0)["train"]
    assert len(split) == 43
    for i in range(43):
        assert abs(int(split.image(i)[0, 0, 0]) - (split.ids[i] - 1000)) <= 2
    assert split.labels is None
    name = file_name(url(0)).decode()
    assert split.name(0) == f"data/images/{name[:3]}/{name[3:6]}/{name}.jpg"
    assert split.take(torch.tensor([3, 1])).ids.tolist() == [1003, 1001]


def test_a_subset_is_a_function_of_its_seed_alone(root, tmp_path, monkeypatch):
    def ids(folder, seed=0, **settings):
        layout = YFCC(count=20, subset_seed=seed, **settings)
        return layout(folder, 5)["train"].ids.tolist()

    first = ids(root)
    assert len(set(first)) == 20
    assert all((i - 1000) % 7 != 6 for i in first)
    monkeypatch.setattr(selection, "CHUNK", 7)
    other = tmp_path / "other"
    other.mkdir()
    (other / "data").symlink_to(root / "data")
    write_rows(other, 50, 25, order=-1)
    assert ids(other) == first
    assert ids(root, seed=1) != first
    assert set(ids(root, seed=1)) != set(range(1000, 1020))


def test_every_photograph_is_as_likely(monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 64)
    met = np.zeros(200)
    for seed in range(300):
        rows = iter([Photo(i, b"", "", None) for i in range(200)])
        found = Selection(50, seed, None, 2, 1.0)._subset(rows)
        met[[x.id for x in found]] += 1
    assert met.sum() == 300 * 50
    assert np.abs(met - 75).max() < 5 * np.sqrt(300 * 0.25 * 0.75)


def test_memory_does_not_grow_with_the_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK", 100)

    def peak(count, kept, target=None):
        def rows():
            tags = ("all,tag" + str(i % 9) for i in range(count))
            names = (f"{i:032d}".encode() for i in range(count))
            return (Photo(i, next(names), next(tags), None) for i in range(count))

        folder = tmp_path / f"{count}{kept}{target}"
        folder.mkdir()
        tracemalloc.start()
        Selection(kept, 0, target, 2, 1.0).write(rows, folder)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(20_000, 100) < 1.5 * peak(4_000, 100)
    assert peak(20_000, None) < 1.5 * peak(4_000, None)
    assert peak(8_000, None, "tags") < 1.5 * peak(2_000, None, "tags")
    assert len(np.load(tmp_path / "20000NoneNone/ids.npy", mmap_mode="r")) == 20_000


def test_the_second_start_reads_no_metadata(root, monkeypatch):
    first = YFCC(count=20)(root, 0)["train"]
    monkeypatch.setattr("unlabeled.data.yfcc.photos", lambda files: pytest.fail("read again"))
    assert YFCC(count=20)(root, 0)["train"].identity() == first.identity()


def test_tags_are_labels(root):
    split = YFCC(count=20, target="tags", classes=3)(root, 0)["train"]
    assert split.classes == ("all", "tag 0", "tag 1")
    assert len(split) == 20
    tags = split.annotations["tags"]
    for i in range(20):
        kind = int(split.ids[i] - 1000) % 3
        assert {split.classes[k] for k in tags[i].tolist()} == {"all", f"tag {kind}"}
        assert split.labels[i] in tags[i]
    assert set(split.labels.tolist()) == {0, 1, 2}
    assert split.take(torch.tensor([4])).annotations["tags"][0].tolist() == tags[4].tolist()
    again = YFCC(count=20, target="tags", classes=3)(root, 7)["train"]
    assert again.identity() == split.identity()


def test_places_are_labels(root):
    split = YFCC(count=15, target="geo", classes=100, cell=10)(root, 0)["train"]
    assert all(i % 2 for i in split.ids.tolist())
    cells = [split.classes[k] for k in split.labels.tolist()]
    assert {cell.partition(" column")[0] for cell in cells} == {"row 10"}
    for i, cell in zip(split.ids.tolist(), cells, strict=True):
        column = int(((i - 1000) % 90 + 180) / 360 * 35)  # round(36 cos 15 degrees)
        assert cell == f"row 10 column {column} of 35"
    ends = Selection(1, 0, "geo", 2, 10.0)
    for place in ((180.0, 90.0), (-180.0, -90.0), (359.9, -91.0)):
        assert ends._cell(Photo(0, b"", "", place)).startswith("row")


def test_supervised_data_give_labels(root):
    data = Images(
        root=str(root),
        layout=YFCC(count=16, target="geo", classes=50),
        decode=Crops(size=8),
        eval_decode=Center(size=8),
        batch_size=4,
        workers=0,
        tier="folder",
    )
    data.setup("fit")
    assert "label" in data.gives
    seen = [i for batch in data.train_dataloader() for i in batch["index"].tolist()]
    assert len(set(seen)) == len(seen) == 16


@pytest.mark.parametrize("tier", ["folder", "memory"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_all_tags_of_their_images(root, tier, workers):
    data = Images(
        root=str(root),
        layout=YFCC(count=20, target="tags", classes=3),
        decode=Crops(size=8),
        eval_decode=Center(size=8),
        batch_size=5,
        workers=workers,
        tier=tier,
        size=8,
    )
    data.setup("fit")
    assert {"label", "tags"} <= data.gives
    known = data.annotation("train", "tags")
    for batch in (*data.train_dataloader(), *data.scan("train", batch_size=7)):
        assert batch["tags"].dtype == torch.int64
        for i, tags, label in zip(batch["index"], batch["tags"], batch["label"], strict=True):
            assert tags[tags >= 0].tolist() == known[int(i)].tolist()
            assert label in tags


def test_without_tags_batches_have_none(root):
    data = Images(
        root=str(root),
        layout=YFCC(count=15),
        decode=Crops(size=8),
        eval_decode=Center(size=8),
        batch_size=5,
        workers=0,
        tier="folder",
    )
    data.setup("fit")
    assert "tags" not in data.gives
    assert "tags" not in next(iter(data.train_dataloader()))


RUN = [
    *("data=yfcc1m", "data.layout.count=20", "data.layout.classes=3", "data.limit=null"),
    *("data.batch_size=4", "data.workers=0", "decode.size=8", "data.size=8"),
    *("data.eval_decode.size=8", "data.eval_decode.resize=8"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", ["softmax", "sigmoid"])
def test_supervised_learns_from_tags(tiny, root, targets):
    """From the metadata of the official layout to a network that tells what it was shown."""
    own = [f"data.root={root}", "data.layout.target=tags", f"method.targets={targets}"]
    rate = ["method.optim.lr=0.5", "method.optim.scaling=none", "trainer.max_epochs=30"]
    method, data, trainer = tiny("supervised", *RUN, *own, *rate)
    losses = []
    method.on_train_batch_end = lambda out, *_: losses.append(out["loss"].item())
    trainer.fit(method, data)
    assert method.head.out_features == 3
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert method.head(method.backbone(torch.zeros(2, 3, 8, 8))).argmax(1).tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore")
def test_supervised_learns_places_and_names_missing_tags(tiny, root):
    own = [f"data.root={root}", "data.layout.target=geo", "data.layout.count=15"]
    own += ["data.layout.classes=50"]
    method, data, trainer = tiny("supervised", *RUN, *own, "trainer.max_epochs=1")
    trainer.fit(method, data)
    assert method.head.out_features == len(data.classes) == 15
    many = data.annotation("train", "tags")
    assert [x.tolist() for x in many.several(range(15))] == data._read().split("train").labels[
        :, None
    ].tolist()
    own = [f"data.root={root}", "method.targets=softmax"]
    method, data, trainer = tiny("supervised", *RUN, *own)
    with pytest.raises(ValueError, match=r"needs .*'tags'.*gives \['crops', 'index'\]"):
        trainer.fit(method, data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["tags", "geo"])
def test_a_stream_of_all_photographs_has_targets(tiny, shards, target):
    own = ["data=yfcc100m", f"data.root={shards}", "data.layout.classes=60"]
    own += [f"data.layout.target={target}"]
    own += ["data.layout.shards=shards/*.tar", "method.targets=sigmoid", "trainer.max_epochs=1"]
    run = [x for x in RUN if not x.startswith(("data=", "data.layout", "data.size"))]
    method, data, trainer = tiny("supervised", *run, *own, "trainer.max_steps=3")
    trainer.fit(method, data)
    assert trainer.global_step == 3
    assert method.head.out_features == len(data.classes) > 2


@pytest.fixture(scope="module")
def shards(root, tmp_path_factory):
    """The same photographs in two archives, called by id or by hash; some of them are missing."""
    folder = tmp_path_factory.mktemp("shards")
    shutil.copy(root / "yfcc100m_dataset", folder)
    (folder / "shards").mkdir()
    for number, members in enumerate((range(30, 50), range(2, 30))):
        with tarfile.open(folder / f"shards/{number}.tar", "w") as archive:
            for i in members:
                name = file_name(url(i)).decode()
                path = root / f"data/images/{name[:3]}/{name[3:6]}/{name}.jpg"
                archive.add(path, f"x/{name}.jpg" if i % 4 else f"{1000 + i}.jpg")
            archive.add(path, f"{number}0000000.jpg")  # of no photograph
    return folder


def known_of(split):
    """Photograph -> its label and tags, read off its pixels."""
    tags = split.annotations.get("tags")
    return {
        int(split.image(i)[0, 0, 0]) // 4: (
            None if split.labels is None else split.classes[int(split.labels[i])],
            None if tags is None else sorted(split.classes[k] for k in tags[i].tolist()),
        )
        for i in range(len(split))
    }


@pytest.mark.parametrize("target", [None, "tags", "geo"])
@pytest.mark.parametrize("count", [15, None])
def test_shards_have_the_subset_and_the_targets_of_the_metadata(
    tmp_path, monkeypatch, target, count
):
    root = tmp_path / "yfcc"
    write_rows(root, 50)
    (root / "shards").mkdir()
    for number, members in enumerate((range(30, 50), range(2, 30))):
        with tarfile.open(root / f"shards/{number}.tar", "w") as archive:
            for i in members:
                name = file_name(url(i)).decode()
                content = io.BytesIO()
                Image.new("RGB", (8, 8), (4 * i + 2,) * 3).save(content, "png")
                info = tarfile.TarInfo(f"x/{name}.png" if i % 4 else f"{1000 + i}.png")
                info.size = len(content.getvalue())
                archive.addfile(info, io.BytesIO(content.getvalue()))
    for i in range(50):
        name = file_name(url(i)).decode()
        path = root / f"data/images/{name[:3]}/{name[3:6]}/{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (4 * i + 2,) * 3).save(path, quality=100)
    settings = {"count": count, "target": target, "classes": 60, "cell": 10}
    tree = known_of(YFCC(**settings)(root, 0)["train"])
    layout = YFCC(shards="shards/*.tar", **settings)
    split = layout(root, 0)["train"]
    found = known_of(split)
    if target is None and count is None:
        assert sorted(found) == list(range(2, 50))  # the metadata is not read
        return
    assert found == {i: said for i, said in tree.items() if i >= 2}
    assert len(found) > 10
    some = split.take(torch.tensor([1, 4]))
    assert known_of(some).items() <= found.items()
    monkeypatch.setattr("unlabeled.data.yfcc.photos", lambda files: pytest.fail("read again"))
    monkeypatch.setattr("unlabeled.data.yfcc.join", lambda *_: pytest.fail("joined again"))
    assert layout(root, 0)["train"].identity() == split.identity()


def test_shards_whose_members_are_numbered_are_refused(tmp_path):
    from test_shards import write

    write(tmp_path / "shards")
    write_rows(tmp_path, 50)
    with pytest.raises(ValueError, match=r"none of the 27 images.*id or the hash"):
        YFCC(shards="shards/*.tar", count=9)(tmp_path, 0)
    assert len(YFCC(shards="shards/*.tar", count=9, metadata=None)(tmp_path, 0)["train"]) == 9


@pytest.mark.parametrize("damage", [lambda x: b"", lambda x: x[:-1], lambda x: bytes(len(x))])
def test_damaged_files_of_the_cache_are_made_again(root, tmp_path, damage):
    layout = YFCC(count=20, target="tags", classes=3)
    first = layout(root, 0)["train"].identity()
    files = [p for p in (tmp_path / "cache/yfcc").rglob("*") if p.is_file()]
    assert {p.name for p in files} == {
        *("ids.npy", "hashes.npy", "labels.npy", "tags.npy", "ends.npy", "classes.json")
    }
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
        assert layout(root, 0)["train"].identity() == first
    assert len(list((tmp_path / "cache/yfcc").iterdir())) == 1


def test_the_most_frequent_tags_survive_where_few_are_counted(monkeypatch):
    monkeypatch.setattr(selection, "WORDS", 10)
    rows = (Photo(i, b"", f"often{i % 3},only{i}", None) for i in range(300))
    names = Selection(None, 0, "tags", 3, 1.0)._names(rows)
    assert names == ["often0", "often1", "often2"]


def test_shards_give_a_subset_too(tmp_path):
    from test_shards import COUNT, values, write

    write(tmp_path / "shards")
    whole = YFCC(shards="shards/*.tar", count=None)(tmp_path, 0)["train"]
    assert values(whole) == list(range(COUNT))
    some = YFCC(shards="shards/*.tar", count=9)(tmp_path, 0)["train"]
    assert len(set(values(some))) == 9
    assert values(YFCC(shards="shards/*.tar", count=9)(tmp_path, 3)["train"]) == values(some)
    with pytest.raises(ValueError, match="count=28 is more than the 27 images"):
        YFCC(shards="shards/*.tar", count=28)(tmp_path, 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"target": "title"}, "target must be tags, geo or null"),
        ({"metadata": None}, "metadata may be null for shards"),
        ({"target": "tags", "metadata": None, "shards": "x"}, "metadata may be null for shards"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"cell": 0}, "cell must be in"),
        ({"images": "{name}.jpg"}, "may have {hash}"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        YFCC(**settings)


def test_wrong_files_are_named(root, tmp_path):
    with pytest.raises(ValueError, match=r"no metadata yfcc100m_dataset\*"):
        YFCC()(tmp_path, 0)
    with pytest.raises(ValueError, match="count=44 is more than the 43 photographs"):
        YFCC(count=44)(root, 0)
    with pytest.raises(ValueError, match="22 photographs with geo"):
        YFCC(count=44, target="geo")(root, 0)
    with pytest.raises(ValueError, match=r"first photograph is not there: .*/x/.*data\.layout"):
        YFCC(count=4, images="x/{id}.jpg")(root, 0)
    path = tmp_path / "yfcc100m_dataset"
    path.write_text("\t".join(row(0)) + "\n" + "a\tb\n")
    with pytest.raises(ValueError, match=r"yfcc100m_dataset, line 2: 2 columns"):
        YFCC(count=1)(tmp_path, 0)
    path.write_text("\t".join(["one", *row(0)[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"yfcc100m_dataset, line 1: invalid literal"):
        YFCC(count=1)(tmp_path, 0)
    path.write_bytes(b"SQLite format 3\0" + bytes(100))
    with pytest.raises(ValueError, match="is not the SQLite file"):
        YFCC(count=1)(tmp_path, 0)
    bad = row(0, 25)
    bad[2] = "../../etc/x"
    path.write_text("\t".join(bad) + "\n")
    with pytest.raises(ValueError, match=r"line 1: .*etc/x' is no hash"):
        YFCC(count=1)(tmp_path, 0)
    assert not list((tmp_path / "cache").rglob("*.partial"))
