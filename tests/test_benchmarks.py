"""Official layouts of transfer data sets, written small."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.data.benchmarks import CIFAR100, STL10, INaturalist, Places205, Wnids


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(str(path)) % 255, 1, 2)).save(path)


def test_cifar100_reads_official_pickles(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100 as Official

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)

    def put(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    train = [put("train", {"data": pixels[:3], "fine_labels": [1, 0, 1]})]
    monkeypatch.setattr(Official, "train_list", train)
    test = [put("test", {"data": pixels[3:], "fine_labels": [1]})]
    monkeypatch.setattr(Official, "test_list", test)
    meta = put("meta", {"fine_label_names": ["apple", "bee"]})
    monkeypatch.setattr(Official, "meta", {**Official.meta, "md5": meta[1]})
    splits = CIFAR100()(tmp_path, 0)
    assert splits["train"].labels.tolist() == [1, 0, 1]
    assert splits["test"].classes == ("apple", "bee")
    assert torch.equal(splits["test"].pixels[0].flatten(), torch.from_numpy(pixels[3]))
    with pytest.raises(ValueError, match="no CIFAR-100 under"):
        CIFAR100(download=False)(tmp_path / "nowhere", 0)


def stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 96, 96), np.uint8)  # N C W H
    pixels[:3].tofile(folder / "train_X.bin")
    pixels[3:5].tofile(folder / "unlabeled_X.bin")
    pixels[5:].tofile(folder / "test_X.bin")
    np.array([10, 1, 3], np.uint8).tofile(folder / "train_y.bin")
    np.array([2], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0 1\n" + "2 0\n" * 9)
    return torch.from_numpy(pixels).transpose(2, 3)


def test_stl10_reads_its_binary_files(tmp_path):
    pixels = stl10(tmp_path)
    pretrain, labelled = STL10()(tmp_path, 0), STL10(train="train")(tmp_path, 0)
    assert torch.equal(pretrain["train"].pixels, pixels[3:5])
    assert pretrain["train"].labels is None
    assert torch.equal(labelled["train"].pixels, pixels[:3])
    assert labelled["train"].labels.tolist() == [9, 0, 2]
    assert labelled["test"].labels.tolist() == [1]
    fold = STL10(train="train", fold=1)(tmp_path, 0)["train"]
    assert fold.labels.tolist() == [2, 9]
    assert torch.equal(fold.pixels, pixels[[2, 0]])


def test_stl10_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"stl10_binary has no file unlabeled_X.bin.*get it from"):
        STL10()(tmp_path, 0)
    stl10(tmp_path)
    (tmp_path / "stl10_binary/test_X.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"test_X.bin has 5 bytes"):
        STL10()(tmp_path, 0)
    with pytest.raises(ValueError, match="fold"):
        STL10(fold=3)
    with pytest.raises(ValueError, match="train must be"):
        STL10(train="both")


def places(root):
    lists = root / "trainvalsplit_places205"
    lists.mkdir(parents=True)
    (lists / "train_places205.csv").write_text("b/bar/1.jpg 1\na/abbey/1.jpg 0\n")
    (lists / "val_places205.csv").write_text("b/bar/2.jpg 1\n")
    for name in ("b/bar/1.jpg", "a/abbey/1.jpg", "b/bar/2.jpg"):
        write(root / "images256" / name)


def test_places205_follows_its_lists(tmp_path):
    places(tmp_path)
    splits = Places205()(tmp_path, 0)
    assert splits["train"].classes == ("a/abbey", "b/bar")
    assert splits["train"].labels.tolist() == [1, 0]
    assert splits["test"].name(0) == "b/bar/2.jpg"
    assert splits["test"].image(0).shape == (3, 8, 8)


def test_places205_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"no file train_places205.csv.*places.csail.mit.edu"):
        Places205()(tmp_path, 0)
    places(tmp_path)
    path = tmp_path / "trainvalsplit_places205/train_places205.csv"
    path.write_text("b/bar/1.jpg 1\nb/bar/2.jpg one\n")
    with pytest.raises(ValueError, match=r"train_places205.csv, line 2: expected `path label`"):
        Places205()(tmp_path, 0)
    path.write_text("b/bar/9.jpg 1\n")
    with pytest.raises(ValueError, match=r"not there: .*9.jpg"):
        Places205()(tmp_path, 0)


def inaturalist(root):
    kinds = [{"id": 7, "name": "wren"}, {"id": 3, "name": "oak"}]
    for side, ids in (("train", [0, 1, 2]), ("val", [5])):
        images = [{"id": i, "file_name": f"train_val2018/x/{i}.jpg"} for i in ids]
        notes = [{"image_id": i, "category_id": 7 if i % 2 else 3} for i in reversed(ids)]
        content = {"images": images[::-1], "annotations": notes, "categories": kinds}
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{side}2018.json").write_text(json.dumps(content))
        for image in images:
            write(root / image["file_name"])


def test_inaturalist_joins_images_and_annotations(tmp_path):
    inaturalist(tmp_path)
    splits = INaturalist()(tmp_path, 0)
    assert splits["train"].classes == ("oak", "wren")
    assert splits["train"].labels.tolist() == [0, 1, 0]
    assert [splits["train"].name(i) for i in range(3)] == [
        f"train_val2018/x/{i}.jpg" for i in range(3)
    ]
    assert splits["test"].labels.tolist() == [1]


@pytest.mark.parametrize("content", ["no json", "[]", '{"images": [], "annotations": []}'])
def test_inaturalist_says_what_is_wrong(tmp_path, content):
    with pytest.raises(ValueError, match=r"no file train2018.json.*inat_comp"):
        INaturalist()(tmp_path, 0)
    inaturalist(tmp_path)
    (tmp_path / "val2018.json").write_text(content)
    with pytest.raises(ValueError, match=r"val2018.json is not the file of the competition"):
        INaturalist()(tmp_path, 0)


def test_imagenet22k_is_folders_of_synsets(tmp_path):
    for wnid in ("n1", "n2", "n3"):
        for i in range(4):
            write(tmp_path / wnid / f"{i}.jpg")
    whole = Wnids(test_share=0.25)(tmp_path, 0)
    assert [len(whole[side]) for side in ("train", "test")] == [9, 3]
    assert whole["train"].classes == ("n1", "n2", "n3")
    (tmp_path / "wnids.txt").write_text("n3\nn1\n")
    part = Wnids(wnids="wnids.txt", test_share=0.25)(tmp_path, 0)
    assert part["train"].classes == ("n1", "n3")
    names = [part["test"].name(i) for i in range(2)]
    assert sorted(name[:2] for name in names) == ["n1", "n3"]
    for i in range(len(part["train"])):
        wnid = part["train"].classes[part["train"].labels[i]]
        assert part["train"].name(i).startswith(wnid)
    (tmp_path / "wnids.txt").write_text("n3\nn9\n")
    with pytest.raises(ValueError, match=r"1 of the 2 synsets .* have no folder .*: n9"):
        Wnids(wnids="wnids.txt")(tmp_path, 0)
    with pytest.raises(ValueError, match=r"has no file other.txt"):
        Wnids(wnids="other.txt")(tmp_path, 0)
