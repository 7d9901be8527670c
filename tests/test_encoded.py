"""Images that are decoded on the device: here a CPU stands for it, where no GPU is asked for."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.data import encoded
from unlabeled.data.decode import Center, Crops
from unlabeled.data.encoded import EncodedRows, cropped
from unlabeled.data.images import Images
from unlabeled.data.layouts import Embedded, Folder
from unlabeled.data.reading import TrainingRows
from unlabeled.data.rgb import UnreadableError, pixels
from unlabeled.data.shards import Shards

CPU = torch.device("cpu")
NOT_JPEG = {3: "png", 5: "webp"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path):
    """Smooth pictures: grey, turned by EXIF, CMYK, progressive, and in other formats."""
    generator = np.random.default_rng(0)
    for i in range(8):
        small = Image.fromarray(generator.integers(0, 256, (5, 6, 3), np.uint8))
        image = small.resize((72 + i, 64), Image.Resampling.BICUBIC)
        image = {1: image.convert("L"), 4: image.convert("CMYK")}.get(i, image)
        exif = Image.Exif()
        exif[0x0112] = {2: 6, 6: 3}.get(i, 1)
        more = {"exif": exif, "progressive": i == 7} if i not in NOT_JPEG else {}
        image.save(tmp_path / f"{i}.{NOT_JPEG.get(i, 'jpg')}", **more)
    return tmp_path


def splits(root):
    return Folder(test_share=0)(root, 0)["train"]


KEYS = [(i, 4, 9) for i in (5, 0, 7, 1, 6, 2, 3, 4)]


def both(split, decode, tries=1, keys=KEYS):
    """Crops by way of the device, those of workers, and what was found unreadable by each."""
    batch, bad = EncodedRows(split, decode, 1, tries)[keys]
    found, late = cropped(batch, decode, CPU)
    wanted, known = TrainingRows(split, decode, 1, tries)[keys]
    return found, wanted, (bad, late, known)


@pytest.mark.parametrize("decode", [Crops(size=24, count=2), Center(size=32, resize=40)])
def test_crops_are_those_of_workers(root, decode):
    found, wanted, bad = both(splits(root), decode)
    assert bad == ([], [], [])
    assert found["index"].tolist() == wanted["index"].tolist()
    assert found["step"] == wanted["step"] == 9
    assert len(found["crops"]) == len(wanted["crops"])
    for a, b in zip(found["crops"], wanted["crops"], strict=True):
        assert a.shape == b.shape
        assert (a.int() - b.int()).abs().max() <= 2


def test_only_what_a_gpu_cannot_read_is_decoded_before(root):
    batch, _ = EncodedRows(splits(root), Crops(size=24), 1, 1)[KEYS]
    here = [
        key[2]
        for key, shape in zip(batch["crops"].keys, batch["crops"].shapes, strict=True)
        if shape
    ]
    assert sorted(here) == sorted([*NOT_JPEG, 4])  # other formats, and four channels
    assert batch["crops"].data.is_contiguous()


def test_shards_give_the_same(root, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for path in sorted(root.glob("?.*")):
            if path.suffix != ".tar":
                archive.add(path, f"0000{path.name}")
    shards = Shards(train=str(tmp_path / "0.tar"))(tmp_path, 0)["train"]
    found, wanted, _ = both(shards, Crops(size=24))
    plain, _, _ = both(splits(root), Crops(size=24))
    torch.testing.assert_close(found["crops"][0], plain["crops"][0], rtol=0, atol=0)
    assert found["index"].tolist() == wanted["index"].tolist()


def test_damaged_files_are_replaced_as_workers_do(root):
    whole = (root / "1.jpg").read_bytes()
    (root / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "6.jpg").write_bytes(b"")
    found, wanted, (bad, late, known) = both(splits(root), Crops(size=24), tries=3)
    assert [i for i, _ in bad] == [i for i, _ in known] == [1, 6]
    assert not late
    assert found["index"].tolist() == wanted["index"].tolist() == [5, 0, 7, 2, 7, 2, 3, 4]


def test_what_the_device_fails_at_is_decoded_by_the_cpu(root, monkeypatch, caplog):
    hard, broken = ((root / name).stat().st_size for name in ("2.jpg", "0.jpg"))
    decode, calls = encoded._decoded, []

    def fails(jpegs, device):
        calls.append(len(jpegs))
        if any(len(x) in (hard, broken) for x in jpegs):
            raise RuntimeError("nvjpegDecodeBatched failed")
        return decode(jpegs, device)

    def read(file):
        if len(file.getvalue()) == broken:
            raise UnreadableError("no use")
        return pixels(file)

    batch, _ = EncodedRows(splits(root), Crops(size=24), 1, 1)[KEYS]
    monkeypatch.setattr(encoded, "_decoded", fails)
    monkeypatch.setattr(encoded, "pixels", read)
    found, late = cropped(batch, Crops(size=24), CPU)
    wanted, _ = TrainingRows(splits(root), Crops(size=24), 1, 1)[KEYS]
    assert calls == [5, 1, 1, 1, 1, 1]
    assert caplog.text.count("nvjpegDecodeBatched failed") == 1
    assert late == [(0, "no use")]
    for crop, plain, (i, _, _) in zip(found["crops"][0], wanted["crops"][0], KEYS, strict=True):
        if i == 0:
            assert (crop == 128).all()
        else:
            assert (crop.int() - plain.int()).abs().max() <= 2


def test_pictures_that_wait_keep_workers_handles_few(root):
    batch, _ = EncodedRows(splits(root), Crops(size=24), 1, 1)[KEYS]
    tensors = [x for x in vars(batch["crops"]).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 1


def images(root, layout=None, **changes):
    given = {"batch_size": 4, "workers": 0, "tier": "gpu", "max_unreadable": 0.5} | changes
    cuts = {"decode": Crops(size=24, count=2), "eval_decode": Center(size=24)}
    return Images(root=str(root), layout=layout or Folder(test_share=0), **cuts, **given)


def test_without_a_gpu_it_is_refused(root):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"data\.tier=gpu needs a CUDA device"):
        images(root)


def test_arrays_are_refused(root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = images(root, Embedded())
    with pytest.raises(ValueError, match=r"not in files: choose data\.tier=memory"):
        data.train_dataloader()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_data_module_crops_and_counts(root, monkeypatch, workers):
    whole = (root / "1.jpg").read_bytes()
    (root / "1.jpg").write_bytes(whole[: len(whole) // 2])
    loader = images(root, tier="folder", workers=workers).train_dataloader()
    wanted = list(loader)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        data = images(root, workers=workers)
    data.setup("fit")
    found = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    assert len(found) == len(wanted) == 2
    for a, b in zip(found, wanted, strict=True):
        assert a["index"].tolist() == b["index"].tolist()
        for x, y in zip(a["crops"], b["crops"], strict=True):
            assert (x.int() - y.int()).abs().max() <= 2
    assert list(data.unreadable["train"]) == [1]


@pytest.mark.gpu
def test_a_gpu_decodes_as_a_cpu_does(root):
    split, decode = splits(root), Crops(size=24, count=2)
    batch, _ = EncodedRows(split, decode, 1, 1)[KEYS]
    found, late = cropped(batch, decode, torch.device("cuda"))
    wanted, _ = TrainingRows(split, decode, 1, 1)[KEYS]
    assert not late
    for a, b in zip(found["crops"], wanted["crops"], strict=True):
        assert a.is_cuda
        assert (a.cpu().int() - b.int()).abs().float().mean() < 2
