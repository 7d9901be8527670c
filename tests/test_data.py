"""Trees of files in every layout, every image mode, what is unreadable, and the data module."""

import gzip
import hashlib
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from unlabeled.data import files, layouts, rgb, sampler
from unlabeled.data.clips import Recordings
from unlabeled.data.decode import Center, Crops, RandomCrop
from unlabeled.data.images import Images
from unlabeled.data.layouts import (
    CIFAR10,
    Embedded,
    FashionMNIST,
    Folder,
    HeldOut,
    ImageNet,
    List,
)
from unlabeled.data.recordings import Kept
from unlabeled.data.splits import Array, divide
from unlabeled.draws import Draws

CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UNLABELED_CACHE", str(folder))
    return folder


def write(path, value=0, size=(12, 10), mode="RGB"):
    """A noisy image (its number in the first pixel), so that no two are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def tree(root, paths):
    for value, path in enumerate(paths):
        write(root / path, value)
    return root


def classes_of(root, folders, per_class=3):
    return tree(root, [f"{folder}/{i}.png" for folder in folders for i in range(per_class)])


def images(root, layout=None, **changes):
    given = {"batch_size": 4, "workers": 0, "size": 8, **changes}
    crops, center = Crops(size=8, count=2), Center(size=8)
    layout = layout or Folder(test_share=0)
    return Images(root=str(root), layout=layout, decode=crops, eval_decode=center, **given)


def names(split):
    return [split.name(i) for i in range(len(split))]


@pytest.mark.parametrize("kind", [Center, RandomCrop])
def test_strips_are_cut_before_they_are_enlarged(kind):
    class Noted(kind):
        def resized(self, image, height, width):
            sides.append(max(height, width))
            return super().resized(image, height, width)

    sides = []
    strip = torch.zeros(3, 2, 20_001, dtype=torch.uint8)
    strip[:, :, 10_000] = 255
    for image in (strip, strip.transpose(1, 2)):
        (crop,) = Noted(size=8, resize=16)(image, 0)
        assert crop.shape == (3, 8, 8)
        assert kind is RandomCrop or crop.max() > 100  # the middle
    assert max(sides) == 16 * 32


# Files: modes, orientation, damage.


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_the_rgb_it_shows(tmp_path, mode):
    colour = Image.new("RGB", (6, 5), (250, 250, 250))
    if mode == "I;16":
        image = Image.fromarray(np.full((5, 6), 250 * 257, np.uint16))
    else:
        image = colour.quantize(2) if mode == "P" else colour.convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    image.save(path)
    with Image.open(path) as saved:
        assert saved.mode.startswith(mode[0])
    read = rgb.read(path)
    assert read.mode == "RGB"
    shown = 255 if mode == "1" else 250
    assert np.abs(np.asarray(read).astype(int) - shown).max() <= 1


def test_transparent_pixels_show_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = [200, 0, 0, 255]
    pixels[1] = [200, 0, 0, 0]
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert rgb.read(tmp_path / "rgba.png").getpixel((0, 0)) == (200, 0, 0)
    assert rgb.read(tmp_path / "rgba.png").getpixel((0, 1)) == (255, 255, 255)
    assert rgb.read(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)
    assert rgb.read(tmp_path / "palette.png").getpixel((1, 1)) == (0, 200, 0)


def test_float_images_are_scaled_by_their_range(tmp_path):
    for name, values in (("unit", [0.0, 0.5, 1.0]), ("byte", [0.0, 100.0, 300.0])):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / f"{name}.tif")
    read = [np.asarray(rgb.read(tmp_path / f"{name}.tif"))[0, :, 0] for name in ("unit", "byte")]
    assert read[0].tolist() == [0, 128, 255]
    assert read[1].tolist() == [0, 100, 255]


def test_photographs_stand_upright(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.paste((255, 255, 255), (0, 0, 8, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by a quarter
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    read = rgb.read(tmp_path / "x.jpg")
    assert read.size == (4, 8)
    assert min(read.getpixel((3, 4))) > 200
    assert max(read.getpixel((0, 4))) < 50


def test_damaged_files_are_unreadable(tmp_path, monkeypatch):
    write(tmp_path / "good.jpg", size=(64, 64))
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.jpg", "empty.jpg", "text.jpg", "missing.jpg"):
        with pytest.raises(rgb.UnreadableError):
            rgb.read(tmp_path / name)
    monkeypatch.setattr(rgb, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(rgb.UnreadableError, match="64 x 64 pixels"):
        rgb.read(tmp_path / "good.jpg")


# The index.


def test_index_is_sorted_and_ignores_what_is_hidden_or_no_image(tmp_path):
    found = ["b/2.JPEG", "a/1.png", "a/deep/er/3.webp", "a-b/4.bmp"]
    tree(tmp_path, [*found, ".hidden/5.png", "a/.6.png"])
    (tmp_path / "a/notes.txt").write_text("no image")
    (tmp_path / "c.png").mkdir()
    os.symlink(tmp_path, tmp_path / "a/loop")
    listing = files.index(tmp_path)
    assert [path.decode() for path in listing.paths] == sorted(found)
    assert listing.sizes.tolist() == [(tmp_path / path).stat().st_size for path in sorted(found)]


def aged(root, ns):
    for folder, _, _ in os.walk(root):
        os.utime(folder, ns=(ns, ns))


def test_index_is_cached_until_a_folder_changes(tmp_path, cache, monkeypatch):
    root = tree(tmp_path / "data", ["a/1.png", "b/2.png"])
    files.index(root)
    assert not list(cache.rglob("*.npz"))  # changed a moment ago: not to be trusted yet
    aged(root, 10**18)
    first = files.index(root)
    (saved,) = cache.rglob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(files, "walk", None)
        again = files.index(root)
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    write(root / "b/3.png")
    assert len(files.index(root).paths) == 3
    aged(root, 10**18 + 1)
    assert len(files.index(root).paths) == 3
    for damage in (b"", b"rubbish", saved.read_bytes()[:200]):
        saved.write_bytes(damage)
        assert len(files.index(root).paths) == 3
        assert saved.read_bytes() != damage
    assert [path.name for path in cache.rglob("*.*")] == [saved.name]  # no scraps


# Layouts.


def test_class_folders_become_labels(tmp_path):
    splits = Folder(test_share=0)(classes_of(tmp_path, ["dog", "cat"]), 0)
    assert set(splits) == {"train"}
    assert splits["train"].classes == ("cat", "dog")
    assert names(splits["train"])[::3] == ["cat/0.png", "dog/0.png"]
    assert splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "paths", [["1.png", "2.png"], ["x/1.png", "x/2.png"], ["a/1.png", "b/2.png", "3.png"]]
)
def test_without_class_folders_there_are_no_labels(tmp_path, paths):
    split = Folder(test_share=0)(tree(tmp_path, paths), 0)["train"]
    assert split.labels is None
    assert split.classes == ()
    assert names(split) == sorted(paths)


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("test", ["val", "valid", "validation", "TEST"])
def test_folders_named_as_splits_are_splits(tmp_path, train, test):
    classes_of(tmp_path, [f"{train}/a", f"{train}/b", f"{test}/b", f"{test}/c", "extra"])
    splits = Folder()(tmp_path, 0)
    assert splits["train"].classes == splits["test"].classes == ("a", "b", "c")
    assert splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits["test"].labels.tolist() == [1, 1, 1, 2, 2, 2]
    assert names(splits["test"])[0] == f"{test}/b/0.png"


def test_a_test_folder_beside_classes_is_no_class(tmp_path):
    splits = Folder()(classes_of(tmp_path, ["a", "b", "val/a", "val/b"]), 0)
    assert splits["train"].classes == ("a", "b")
    assert (len(splits["train"]), len(splits["test"])) == (6, 6)


def test_images_beside_splits_are_counted(tmp_path, caplog):
    for split in ("train", "val"):
        classes_of(tmp_path / split, "ab")
    Folder()(tmp_path, 0)
    assert not caplog.messages
    tree(tmp_path, ["scans/one.png", "two.png"])
    Folder()(tmp_path, 0)
    assert [m for m in caplog.messages if "beside" in m] == [
        f"2 images of {tmp_path} lie beside its folders of splits and are not read "
        "(such as scans/one.png)"
    ]


def test_of_two_test_folders_the_labelled_one_is_taken(tmp_path):
    classes_of(tmp_path, ["train/a", "train/b", "val/a", "val/b"])
    tree(tmp_path, ["test/1.png", "test/2.png"])  # as ImageNet's, without labels
    assert names(Folder()(tmp_path, 0)["test"])[0] == "val/a/0.png"


def test_a_seeded_split_takes_a_share_of_every_class(tmp_path):
    classes_of(tmp_path, ["a", "b"], per_class=10)
    write(tmp_path / "rare/1.png")
    one, two = (Folder(test_share=0.2)(tmp_path, seed) for seed in (0, 1))
    assert one["test"].labels.bincount(minlength=3).tolist() == [2, 2, 0]
    assert one["train"].labels.bincount(minlength=3).tolist() == [8, 8, 1]
    assert not {*names(one["train"])} & {*names(one["test"])}
    assert names(one["test"]) == names(two["test"])  # another run must not train on it
    other = Folder(test_share=0.2, split_seed=1)(tmp_path, 0)
    assert names(one["test"]) != names(other["test"])


def test_training_images_stand_for_test_images(tmp_path):
    classes_of(tmp_path, ["train/a", "train/b"], per_class=10)
    classes_of(tmp_path, ["test/a", "test/b"], per_class=3)
    whole = Folder()(tmp_path, 0)
    one, two = (HeldOut(layout=Folder())(tmp_path, seed) for seed in (0, 1))
    assert one["test"].labels.tolist() == [0, 0, 1, 1]
    assert sorted(names(one["train"]) + names(one["test"])) == sorted(names(whole["train"]))
    assert names(one["test"]) == names(two["test"])  # another run must not train on it
    other = HeldOut(layout=Folder(), split_seed=1)(tmp_path, 0)
    assert names(one["test"]) != names(other["test"])
    for share in (0, 1):
        with pytest.raises(ValueError, match=rf"data\.layout\.share must be in .* got {share}"):
            HeldOut(layout=Folder(), share=share)


@pytest.mark.parametrize(
    ("make", "layout", "named"),
    [
        (lambda root: root / "nowhere", Folder(), "nowhere does not exist.*data.root"),
        (lambda root: root, Folder(), "no images under"),
        (lambda root: classes_of(root, ["val/a", "val/b"]), Folder(), "add a folder named train"),
        (lambda root: root, ImageNet(), "no folder train"),
        (lambda root: classes_of(root, ["train/a", "train/b"]), ImageNet(), "no folder val"),
        (
            lambda root: tree(classes_of(root, ["train/a", "train/b"]), ["val/1.png"]),
            ImageNet(),
            "one folder of images for every wnid",
        ),
        (lambda root: root, CIFAR10(download=False), "no CIFAR-10 under.*not downloaded"),
    ],
)
def test_wrong_roots_are_one_clear_error(tmp_path, make, layout, named):
    with pytest.raises(ValueError, match=named):
        images(make(tmp_path), layout).setup("fit")


def test_imagenet_takes_val_even_where_test_lies(tmp_path):
    classes_of(tmp_path, [f"{side}/n0{i}" for side in ("train", "val", "test") for i in range(2)])
    assert names(ImageNet()(tmp_path, 0)["test"])[0] == "val/n00/0.png"


def test_cifar10_reads_official_pickles(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10 as Official

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), np.uint8)

    def put(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    train = [
        put(f"data_batch_{i}", {"data": pixels[2 * i : 2 * i + 2], "labels": [i, 1 - i]})
        for i in range(2)
    ]
    test = [put("test_batch", {"data": pixels[4:], "labels": [1, 1]})]
    meta = put("batches.meta", {"label_names": ["plane", "car"]})
    monkeypatch.setattr(Official, "train_list", train)
    monkeypatch.setattr(Official, "test_list", test)
    monkeypatch.setattr(Official, "meta", {**Official.meta, "md5": meta[1]})
    splits = CIFAR10()(tmp_path, 0)
    assert splits["train"].labels.tolist() == [0, 1, 1, 0]
    assert splits["test"].classes == ("plane", "car")
    assert torch.equal(splits["train"].pixels[3].flatten(), torch.from_numpy(pixels[3]))
    (folder / "data_batch_1").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"no CIFAR-10 under .* corrupted"):
        CIFAR10()(tmp_path, 0)


def test_cifar10_reads_class_folders(tmp_path):
    classes_of(tmp_path, [f"{side}/{name}" for side in ("train", "test") for name in "ab"])
    splits = CIFAR10()(tmp_path, 0)
    assert [len(splits[side]) for side in ("train", "test")] == [6, 6]


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_reads_idx_files(tmp_path, zipped):
    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    for side in ("train", "t10k"):
        for name, array in (
            *((f"{side}-images-idx3-ubyte", pixels),),
            *((f"{side}-labels-idx1-ubyte", np.array([9, 0, 1], np.uint8)),),
        ):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            data = head + array.tobytes()
            path = folder / (name + ".gz" * zipped)
            path.write_bytes(gzip.compress(data) if zipped else data)
    split = FashionMNIST()(tmp_path, 0)["train"]
    assert split.labels.tolist() == [9, 0, 1]
    assert np.array_equal(split.pixels[2, 1], pixels[2])
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"t10k-labels.* is damaged"):
        FashionMNIST()(tmp_path, 0)


def test_the_embedded_set_is_small_and_balanced():
    splits = Embedded()(Path("nowhere"), 0)
    assert splits["train"].pixels.shape == (12_000, 3, 28, 28)
    assert splits["train"].labels.bincount().tolist() == [1200] * 10
    assert splits["test"].labels.bincount().tolist() == [200] * 10
    assert len(splits["test"].classes) == 10
    folder = Path(files.__file__).parent / "embedded"
    assert (folder / "fashion_mnist.npz").stat().st_size < 10 * 2**20
    assert "MIT" in (folder / "LICENSE").read_text()
    means = torch.stack([x.float().mean() for x in splits["train"].pixels[:, 0].split(3000)])
    assert ((means - 73).abs() < 4).all()  # of the whole set: 72.94


# The data module.


@pytest.mark.parametrize("tier", ["memory", "folder"])
def test_scan_gives_every_image_once_in_order(tmp_path, tier):
    classes_of(tmp_path, ["train/a", "train/b", "test/a", "test/b"], per_class=5)
    data = images(tmp_path, tier=tier)
    data.setup()
    assert data.gives == {"crops", "index", "label"}
    assert (data.count, data.classes) == (10, ["a", "b"])
    assert (data.size("test"), data.has("test"), data.has("train")) == (10, True, True)
    whole = list(data.scan("test", batch_size=4))
    assert [len(batch["index"]) for batch in whole] == [4, 4, 2]
    assert torch.cat([batch["index"] for batch in whole]).tolist() == list(range(10))
    assert torch.cat([b["label"] for b in whole]).equal(data.labels("test"))
    assert "step" not in whole[0]
    crops = torch.cat([batch["crops"][0] for batch in whole])
    for i, crop in enumerate(crops):
        name = f"test/{'ab'[i // 5]}/{i % 5}.png"
        (expected,) = Center(size=8)(rgb.pixels(tmp_path / name))
        assert torch.equal(crop, expected)
    part = list(data.scan("test", 3, 8, batch_size=4))
    assert torch.cat([batch["crops"][0] for batch in part]).equal(crops[3:8])
    assert data.thumbnail("test", 6).equal(crops[6])


def test_tiers_crop_on_their_side_of_the_copy(tmp_path):
    classes_of(tmp_path, ["a", "b"], per_class=5)
    folder, memory = images(tmp_path, tier="folder"), images(tmp_path, tier="memory")
    folder.setup("fit")
    memory.setup("fit")
    batch = next(iter(folder.train_dataloader()))
    assert [x.shape for x in batch["crops"]] == [(4, 3, 8, 8)] * 2
    assert folder.on_after_batch_transfer(batch, 0) is batch
    whole = next(iter(memory.train_dataloader()))
    assert torch.equal(whole["index"], batch["index"])
    assert len(whole["crops"]) == 1
    plain = next(iter(memory.scan("train")))["crops"][0]
    assert torch.equal(whole["crops"][0], plain[whole["index"]])
    cut = memory.on_after_batch_transfer(whole, 0)["crops"]
    expected = Crops(size=8, count=2).batched(whole["crops"][0], Draws(0, "crop", 0, rows=4))
    assert all(torch.equal(a, b) for a, b in zip(cut, expected, strict=True))


def test_unlabelled_images_give_no_label(tmp_path):
    data = images(tree(tmp_path, [f"{i}.png" for i in range(8)]))
    data.setup("fit")
    assert data.gives == {"crops", "index"}
    assert data.classes == []
    assert data.labels("train") is None
    assert "label" not in next(iter(data.train_dataloader()))
    assert "label" not in next(iter(data.scan("train")))
    fit, val = images(tmp_path, val_share=0.25).selection()
    assert sorted([*fit.tolist(), *val.tolist()]) == list(range(8))
    assert len(val) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 7}, "data.batch_size=7 is more than the 6"),
        ({"limit": 3}, "data.batch_size=4 is more than the 3"),
        ({"limit": 7}, "data.limit=7 is more than the 6"),
        ({"limit": 0}, "data.limit"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"workers": -1}, "data.workers"),
        ({"tier": "disk"}, "data.tier"),
        ({"val_share": 1.0}, "data.val_share"),
        ({"tier": "memory", "size": None}, "data.size"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, named):
    classes_of(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=named):
        images(tmp_path, **changes).setup("fit")


def test_a_set_smaller_than_a_batch_can_be_evaluated(tmp_path):
    data = images(classes_of(tmp_path, ["a", "b"]), batch_size=100)
    data.setup()
    assert len(next(iter(data.scan("train")))["index"]) == 6


def test_limit_is_balanced_fixed_and_spares_the_test_set(tmp_path):
    classes_of(tmp_path, [f"{side}/{c}" for side in ("train", "test") for c in "abc"], 6)

    def kept(**changes):
        data = images(tmp_path, limit=7, **changes)
        return data, torch.cat([batch["crops"][0] for batch in data.scan("train")])

    data, crops = kept()
    assert data.labels("train").bincount().tolist() == [3, 2, 2]
    assert (data.count, data.size("test")) == (7, 18)
    assert torch.equal(kept()[1], crops)
    assert not torch.equal(kept(seed=1)[1], crops)
    assert images(tmp_path).fingerprint("train") != data.fingerprint("train")


def test_selection_is_a_share_of_every_class_and_hashed(tmp_path):
    classes_of(tmp_path, ["a", "b"], per_class=10)
    data = images(tmp_path, val_share=0.3)
    fit, val = data.selection()
    assert data.labels("train")[val].bincount().tolist() == [3, 3]
    assert sorted([*fit.tolist(), *val.tolist()]) == list(range(20))
    assert data.split_hash() == images(tmp_path, val_share=0.3).split_hash()
    others = images(tmp_path, val_share=0.3, seed=1), images(tmp_path, val_share=0.2)
    assert len({data.split_hash(), *(x.split_hash() for x in others)}) == 3
    rest, chosen = divide(torch.tensor([0, 1, 1]), 3, 0.9, 0)
    assert chosen.tolist() in ([1], [2])  # a class never goes over completely
    assert 0 in rest


def test_fingerprints_tell_images_and_transforms_apart(tmp_path):
    classes_of(tmp_path / "one", ["a", "b"])
    classes_of(tmp_path / "two", ["a", "b"])
    prints = [images(tmp_path / name).fingerprint("train") for name in ("one", "two")]
    assert prints[0] == prints[1]  # wherever they lie
    (tmp_path / "two/a/0.png").rename(tmp_path / "two/b/9.png")
    prints.append(images(tmp_path / "two").fingerprint("train"))
    other = images(tmp_path / "one")
    other.eval_decode = Center(size=6)
    prints.append(other.fingerprint("train"))
    prints.append(images(tmp_path / "one", tier="memory").fingerprint("train"))
    assert len(set(prints)) == 4
    for name in ("one", "two"):  # a list says nothing of what is in its files
        (tmp_path / name / "list.txt").write_text("a/1.png\nb/0.png\n")
        listed = images(tmp_path / name, layout=List(train="list.txt"))
        prints.append(listed.fingerprint("train"))
    assert len(set(prints)) == 6
    pixels, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    array = Array(pixels.expand(-1, 3, -1, -1), labels, ("a", "b"))
    before = array.identity()
    assert Array(pixels.expand(-1, 3, -1, -1), labels.flip(0), ("a", "b")).identity() != before
    pixels[1, 0, 3, 3] = 1
    assert array.identity() != before


# Unreadable images.


def broken(tmp_path, bad=(3,), n=12):
    tree(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(n // 2)])
    for i in bad:
        (tmp_path / "ab"[i // (n // 2)] / f"{i % (n // 2)}.png").write_bytes(b"broken")
    return tmp_path


@pytest.mark.parametrize(("tier", "workers"), [("folder", 0), ("folder", 2), ("memory", 0)])
def test_unreadable_images_are_counted_named_and_replaced(tmp_path, caplog, tier, workers):
    data = images(broken(tmp_path, [3, 4]), tier=tier, workers=workers, max_unreadable=0.2)
    data.setup("fit")
    batches = [data.on_after_batch_transfer(b, 0) for b in data.train_dataloader()]
    assert set(data.unreadable["train"]) == {3, 4}
    assert sum("a/3.png" in record.getMessage() for record in caplog.records) == 1
    index = torch.cat([batch["index"] for batch in batches])
    assert sorted(index.tolist()) == sorted([*range(3), 5, 5, 5, *range(6, 12)])
    labels = torch.cat([batch["label"] for batch in batches])
    assert torch.equal(labels, data.labels("train")[index])
    crops = torch.cat([batch["crops"][0] for batch in batches])
    assert len({x.numpy().tobytes() for x in crops[index == 5]}) == 3
    scanned = torch.cat([batch["crops"][0] for batch in data.scan("train")])
    assert (scanned[[3, 4]] == 128).all()
    assert len(data.unreadable["train"]) == 2  # each counts once


@pytest.mark.parametrize(("tier", "workers"), [("folder", 0), ("folder", 2), ("memory", 0)])
def test_too_many_unreadable_images_stop_the_run(tmp_path, tier, workers):
    data = images(broken(tmp_path, [0, 7, 11]), tier=tier, workers=workers, max_unreadable=0.2)
    said = r"3 of 12 images .*data.max_unreadable=0.2(.|\n)*b/1.png"
    with pytest.raises(ValueError, match=said):
        list(data.train_dataloader())
    with pytest.raises(ValueError, match=said):
        list(data.scan("train"))


def test_a_whole_image_that_cannot_be_read_is_named(tmp_path):
    data = images(broken(tmp_path, [3]), max_unreadable=0.5)
    assert data.image("train", 2).shape[0] == 3
    with pytest.raises(ValueError, match=r"cannot read a/3.png under .*repair it"):
        data.image("train", 3)


def test_a_completely_unreadable_set_stops_at_once(tmp_path):
    data = images(broken(tmp_path, range(12)), max_unreadable=0)
    data.setup("fit")
    with pytest.raises(ValueError, match="1 of 12 images"):
        next(iter(data.train_dataloader()))


# Settings.


# All but their layouts is as in video_folder.
ALIKE = {"audio_video_folder", "ucf101", "hmdb51", "kinetics", "kinetics_sounds", "audioset"}
ALIKE |= {"audio_folder", "esc50"}
PAIRS = [
    (path, decode)
    for decode in sorted((CONF / "decode").glob("*.yaml"))
    for path in sorted((CONF / "data").glob("*.yaml"))
    if path.stem not in ALIKE or decode.stem == "picture_sound"
    if decode.stem != "multitask"  # it has no crops before a method's tasks bring theirs
]


@pytest.mark.parametrize(("path", "decode"), PAIRS, ids=lambda p: p.stem)
def test_settings_build(path, decode, monkeypatch):
    monkeypatch.delenv("UNLABELED_DATA", raising=False)
    nodes = {"data": OmegaConf.load(path), "decode": OmegaConf.load(decode), "seed": 3}
    config = OmegaConf.create(nodes)
    if path.stem.endswith("folder"):
        assert OmegaConf.is_missing(config.data, "root")
        config.data.root = "somewhere"
    else:
        shared = {
            **{"yfcc1m": "yfcc100m", "cifar10_held_out": "cifar10", "kinetics_sounds": "kinetics"},
            **dict.fromkeys(("voc07", "voc0712", "voc12_segmentation"), "VOCdevkit"),
        }
        assert config.data.root == f"data/{shared.get(path.stem, path.stem)}"
    if decode.stem == "track_pair" and "tracks" in config.data:
        with pytest.raises(InstantiationException, match=r"set data\.tracks to the folder"):
            instantiate(config.data)
        return
    data = instantiate(config.data)
    assert data.seed == 3
    image = torch.zeros(3, 280, 300, dtype=torch.uint8)
    recorded = isinstance(data, Recordings)
    if hasattr(instantiate(config.decode), "gives") and not recorded:
        return  # of clips, which images are not
    frames = image.expand(90, -1, -1, -1)
    given = Kept(frames, 30.0, torch.ones(3 * 48000) / 2, 48000) if recorded else image
    found, fixed_crops = data.decode(given, 0), data.eval_decode(given)
    if recorded:
        found, fixed_crops = found["crops"], fixed_crops["crops"]
    crops = {x.shape[-1] for x in found}
    size = config.data.eval_decode.size
    fixed = {"pirl": {224, 255}, "jigsaw": {255}, "relative_position": {400}}
    fixed |= {"relative_position_cells": {255}, "cpc": {256}, "cpc_v2": {260}}
    fixed |= {name: {224, 96} for name in ("multicrop", "multicrop_dino", "seer")}
    assert crops == fixed.get(decode.stem, {size})
    assert fixed_crops[0].shape == (3, size, size)


def test_readers_satisfy_what_loaders_ask():
    """A loader's keys survive as they are: `Batches` gives tuples, not tensors."""
    keys = next(iter(sampler.Batches(8, 4, 0, position=lambda: 0)))
    assert [type(x) for x in keys[0]] == [int, int, int]


@pytest.mark.parametrize("tier", ["memory", "folder"])
def test_images_are_cut_by_position_and_key(tmp_path, tier):
    for i in range(8):
        write(tmp_path / f"train/{'ab'[i % 2]}/{i}.png", i)
        write(tmp_path / f"test/{'ab'[i % 2]}/{i}.png", i + 50)
    center = Center(size=8)
    data = Images(
        root=str(tmp_path),
        layout=Folder(),
        decode=Crops(size=8),
        eval_decode=center,
        batch_size=4,
        tier=tier,
        size=16,
        workers=0,
    )
    data.setup()
    parts = [[5, 1], [7, 0, 2]]
    batches = list(data.cut("train", parts, center))
    assert [b["index"].tolist() for b in batches] == parts
    assert [b["label"].tolist() for b in batches] == [
        data.labels("train")[torch.tensor(part)].tolist() for part in parts
    ]
    whole = next(iter(data.scan("train", batch_size=8)))["crops"][0]
    for batch in batches:
        assert torch.equal(batch["crops"][0], whole[batch["index"]])
    crops = Crops(size=8)
    first, again, other = (
        torch.cat([b["crops"][0] for b in data.cut("train", parts, crops, "x", epoch)])
        for epoch in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


OWN = {  # data that readers bring themselves, or that are made: there is nowhere to get them
    *("audio_folder", "audio_video_folder", "fashion_mnist_mini", "folder", "list", "scenes"),
    *("scenes_audio_video", "scenes_video", "shards", "stream", "video_folder"),
}
NAMED = sorted({path.stem for path in (CONF / "data").glob("*.yaml")} - OWN)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("there", [True, False])
def test_a_wrong_root_says_what_was_looked_for_and_where_to_get_it(
    compose, tmp_path, monkeypatch, name, there
):
    monkeypatch.setattr(layouts, "find_idx", lambda root: None)  # Debian's, where it is installed
    root = tmp_path if there else tmp_path / "gone"
    layout = compose(f"data={name}", f"data.root={root}").data.layout
    for node in (layout, layout.get("layout", {})):
        if "download" in node:
            node.download = False
    with pytest.raises(ValueError, match=r"https?://") as error:
        instantiate(layout)(root, 0)
    assert str(root) in str(error.value)
    assert re.search(
        r"no [\w-]+ under|has no (file|folder|\w+/)|not there|cannot read|metadata",
        str(error.value),
    )
