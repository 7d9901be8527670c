"""Every kind of image file, decoded alike wherever it lies: folder, memory and shards."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.data import rgb
from unlabeled.data.decode import Center, Crops, Several
from unlabeled.data.images import Images
from unlabeled.data.layouts import Folder
from unlabeled.data.shards import Shards

SIDE = 24
COLOUR = (200, 120, 40)
HEIGHT, WIDTH = 40, 56


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))


def photograph(seed=0):
    """Smooth, so that JPEG keeps it, with no symmetry."""
    rough = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(rough).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def saved(image, kind="JPEG", **settings):
    file = io.BytesIO()
    image.save(file, kind, **{"quality": 95} | settings if kind == "JPEG" else settings)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def files():
    """Name -> bytes of images, and of two that are cut off."""
    photo, grey = photograph(), photograph().convert("L")
    deep = np.asarray(grey).astype(np.uint16) * 257
    cmyk = saved(Image.new("CMYK", (WIDTH, HEIGHT), (*(255 - x for x in COLOUR), 0)))
    adobe = cmyk.index(b"Adobe")
    seen = photo.copy()
    seen.putalpha(Image.linear_gradient("L").resize(photo.size))
    made = {
        "rgb.jpg": saved(photo),
        "progressive.jpg": saved(photo, progressive=True),
        "full.jpg": saved(photo, subsampling=0),
        "grey.jpg": saved(grey),
        "cmyk.jpg": cmyk,
        "ycck.jpg": cmyk[: adobe + 11] + b"\x02" + cmyk[adobe + 12 :],
        "deep.png": saved(Image.fromarray(deep), "PNG"),
        "deep.tif": saved(Image.fromarray(deep), "TIFF"),
        "palette.png": saved(photo.quantize(32), "PNG"),
        "palette.gif": saved(photo.quantize(32), "GIF"),
        "alpha.png": saved(seen, "PNG"),
        "grey_alpha.png": saved(seen.convert("LA"), "PNG"),
        "lossless.webp": saved(seen, "WEBP", lossless=True),
        "one_bit.png": saved(grey.convert("1"), "PNG"),
    }
    for i in range(1, 9):
        made[f"turned{i}.jpg"] = saved(photo, exif=turned(i))
        made[f"turned{i}.png"] = saved(photo, "PNG", exif=turned(i))
        made[f"turned{i}.tif"] = saved(photo, "TIFF", exif=turned(i))
    for name in ("rgb.jpg", "palette.png"):
        made[f"cut_{name}"] = made[name][: len(made[name]) // 2]
    return dict(sorted(made.items()))


FILES = files()
CUT = [i for i, name in enumerate(FILES) if name.startswith("cut_")]


def as_folder(root):
    root.mkdir(parents=True)
    for name, data in FILES.items():
        (root / name).write_bytes(data)
    return Folder(test_share=0, labels=False)


def as_shards(root):
    root.mkdir(parents=True)
    with tarfile.open(root / "0.tar", "w") as archive:
        for i, (name, data) in enumerate(FILES.items()):
            info = tarfile.TarInfo(f"{i:03d}.{name.rpartition('.')[2]}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return Shards(train="0.tar", test=None)


def data(root, layout, tier, **changes):
    given = {"batch_size": 6, "workers": 0, "tier": tier, "size": SIDE, "max_unreadable": 0.2}
    given |= {"decode": Crops(size=SIDE, count=2), "eval_decode": Center(size=SIDE)}
    return Images(root=str(root), layout=layout, **given | changes)


def test_every_tier_sees_the_same_pixels(tmp_path):
    folder, shards = as_folder(tmp_path / "a"), as_shards(tmp_path / "b")
    made = {
        "folder": data(tmp_path / "a", folder, "folder"),
        "memory": data(tmp_path / "a", folder, "memory"),
        "shards": data(tmp_path / "b", shards, "folder"),
        "shards in memory": data(tmp_path / "b", shards, "memory"),
    }
    seen = {}
    for name, each in made.items():
        seen[name] = torch.cat([batch["crops"][0] for batch in each.scan("train")])
        assert seen[name].shape == (len(FILES), 3, SIDE, SIDE)
        assert sorted(each.unreadable["train"]) == CUT, name
    for name, pixels in seen.items():
        assert torch.equal(pixels, seen["folder"]), name
    assert (seen["folder"][CUT] == 128).all()
    assert len({x.numpy().tobytes() for x in seen["folder"]}) > 15  # they do differ


def test_folders_and_shards_train_on_the_same_crops(tmp_path):
    folder, shards = as_folder(tmp_path / "a"), as_shards(tmp_path / "b")
    met = []
    for root, layout in ((tmp_path / "a", folder), (tmp_path / "b", shards)):
        module = data(root, layout, "folder", batch_size=len(FILES))
        (batch,) = module.train_dataloader()
        crops = torch.stack(batch["crops"], 1)
        met.append({i: x for i, x in zip(batch["index"].tolist(), crops, strict=True)})
        assert len(batch["index"]) == len(FILES)
        assert not set(CUT) & set(batch["index"].tolist())  # replaced by the next
    # Of an image that stands in for others too, any may have come last.
    alone = set(met[0]) - {CUT[-1] + 1}
    assert len(alone) == len(FILES) - len(CUT) - 1
    assert all(torch.equal(met[0][i], met[1][i]) for i in alone)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("cut_")])
def test_they_look_as_they_should(name):
    found = rgb.pixels(io.BytesIO(FILES[name]))
    photo = rgb.tensor(photograph())
    grey = rgb.tensor(photograph().convert("L").convert("RGB"))
    assert found.dtype == torch.uint8
    stem = name.partition(".")[0]
    if stem == "one_bit":
        assert set(found.unique().tolist()) == {0, 255}
        return
    if stem == "ycck":  # the same numbers as CMYK, read as luminance and colour
        assert found.shape == photo.shape
        return
    if stem == "cmyk":
        truth = torch.tensor(COLOUR)[:, None, None].expand_as(photo)
    elif stem.startswith(("grey.", "deep", "grey")) and stem != "grey_alpha":
        truth = grey
    elif "alpha" in stem or stem == "lossless":
        base = grey if stem == "grey_alpha" else photo
        a = rgb.tensor(Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB")) / 255
        truth = base * a + 255 * (1 - a)  # on white
    elif stem == "palette":
        truth = rgb.tensor(photograph().quantize(32).convert("RGB"))
    else:
        truth = photo
    if stem.startswith("turned"):
        truth = shown(photograph(), int(stem[-1]))
    assert found.shape == truth.shape
    error = (found.float() - truth.float()).abs()
    assert error.mean() <= 3
    if stem.startswith(("turned", "deep", "alpha", "lossless")) and not name.endswith(".jpg"):
        assert error.max() <= 1.01


def shown(image, orientation):
    """By the definition: where the stored first row and column are in the picture shown."""
    x = torch.from_numpy(np.array(image))
    if orientation >= 5:
        x = x.transpose(0, 1)  # the first row is on the left or right side
    right = orientation in (2, 3, 6, 7)
    bottom = orientation in (3, 4, 7, 8)
    x = x.flip(1) if right else x
    x = x.flip(0) if bottom else x
    return x.permute(2, 0, 1)


def test_jpegs_are_those_of_pillow_also_damaged_ones():
    """What decides a pixel is the file, not who decodes it."""
    generator = np.random.default_rng(1)
    kinds = [FILES[f"{x}.jpg"] for x in ("rgb", "progressive", "full", "grey", "turned6")]
    kinds.append(saved(photograph(), restart_marker_rows=1, quality=40))
    read = alike = 0
    for turn in range(600):
        data = bytearray(kinds[turn % len(kinds)])
        for _ in range(int(generator.integers(0, 3))):
            data[int(generator.integers(2, len(data)))] = int(generator.integers(0, 256))
        if turn % 7 == 0:
            del data[int(generator.integers(2, len(data))) :]
        try:
            with Image.open(io.BytesIO(data)) as image:
                expected = rgb.tensor(rgb._read(image))
        except Exception:
            with pytest.raises(rgb.UnreadableError):
                rgb.pixels(io.BytesIO(data))
            continue
        read += 1
        alike += torch.equal(rgb.pixels(io.BytesIO(data)), expected)
    assert alike == read
    assert 300 < read < 590


def test_the_fast_decoder_reads_jpegs_and_pillow_the_rest(monkeypatch):
    """So that it is known which of them was tested above."""
    met = []
    monkeypatch.setattr(rgb, "_read", lambda image: met.append(image) or Image.new("RGB", (1, 1)))
    fast = {name for name, data in FILES.items() if rgb.pixels(io.BytesIO(data)).shape[1] > 1}
    jpegs = {n for n in FILES if n.endswith(".jpg")} - {"cmyk.jpg", "ycck.jpg", "cut_rgb.jpg"}
    assert fast == jpegs
    assert len(met) == len(FILES) - len(jpegs)


def test_bombs_are_refused_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(rgb, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    monkeypatch.setattr(rgb, "decode_jpeg", lambda *a, **k: pytest.fail("decoded"))
    monkeypatch.setattr(rgb, "_read", lambda image: pytest.fail("decoded"))
    for name in ("rgb.jpg", "deep.png", "cmyk.jpg", "lossless.webp"):
        with pytest.raises(rgb.UnreadableError, match=f"{WIDTH} x {HEIGHT} pixels"):
            rgb.pixels(io.BytesIO(FILES[name]))


def test_huge_files_are_left_to_pillow(monkeypatch):
    monkeypatch.setattr(rgb, "MOST_BYTES", 10)
    monkeypatch.setattr(rgb, "decode_jpeg", lambda *a, **k: pytest.fail("read as a whole"))
    assert rgb.pixels(io.BytesIO(FILES["rgb.jpg"])).shape == (3, HEIGHT, WIDTH)


class Who:
    """A decode that cuts nothing, and says which process ran it."""

    def __call__(self, image, *key):
        return [torch.tensor(os.getpid())]

    def batched(self, images, draws):
        raise AssertionError("not in this tier")


def test_an_image_is_decoded_once_for_all_its_crops(tmp_path, monkeypatch):
    as_folder(tmp_path / "a")
    for i in CUT:
        (tmp_path / "a" / list(FILES)[i]).unlink()
    met = []
    original = rgb.pixels
    for place in ("splits", "shards"):
        monkeypatch.setattr(
            f"unlabeled.data.{place}.pixels", lambda file: met.append(file) or original(file)
        )
    many = Several(parts={"a": Crops(size=8, count=2), "b": Crops(size=4, count=6)})
    layout = Folder(test_share=0, labels=False)
    module = data(tmp_path / "a", layout, "folder", decode=many, batch_size=6)
    batches = list(module.train_dataloader())
    assert [len(batch["crops"]) for batch in batches] == [8] * 6
    assert len(met) == len({str(file) for file in met}) == 36


def test_workers_decode_and_stay(tmp_path):
    layout = as_folder(tmp_path / "a")
    module = data(tmp_path / "a", layout, "folder", decode=Who(), batch_size=6, workers=2)
    loader = module.train_dataloader()
    assert loader.prefetch_factor == 2
    assert loader.pin_memory is torch.cuda.is_available()
    ids = [{int(i) for batch in loader for i in batch["crops"][0]} for _ in range(2)]
    assert len(ids[0]) == 2
    assert ids[0] == ids[1]
    assert os.getpid() not in ids[0]
