"""The feature store: shared by processes and runs, bounded, whole or not there at all."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import on_processes
from test_evaluate import Fake, Net
from torch import nn

from unlabeled import dist
from unlabeled.batch import normalize
from unlabeled.evaluate import feature_file
from unlabeled.evaluate.contract import FINAL, Request, Shapes
from unlabeled.evaluate.store import FeatureStore, opened, shapes_of

WANTED = (Request("one", 4), Request("two"), FINAL)
RESNET50 = Shapes(
    maps={
        "conv1": (64, 112, 112),
        "res2": (256, 56, 56),
        "res3": (512, 28, 28),
        "res4": (1024, 14, 14),
        "res5": (2048, 7, 7),
    },
    dim=2048,
    pooled=True,
)
SVMS = [Request(s, g) for s, g in zip(RESNET50.maps, (12, 6, 4, 3, 2), strict=True)]  # ~ 9 000 each


def net(**settings):
    torch.manual_seed(0)
    return Net(**settings)


def extracted(folder, dtype="float32", train=121):
    """The features of a network, of an odd number of images."""
    if dist.rank():
        time.sleep(0.2)  # the other comes first, or last
    store = FeatureStore(folder, dtype=dtype, batch_size=16)
    found = store.extract(net(end=True), Fake(train=train), "train", WANTED)
    return [found[request].clone() for request in WANTED]


@pytest.mark.ddp
def test_two_processes_keep_what_one_does(tmp_path):
    alone = extracted(tmp_path / "one")
    for found in on_processes(2, partial(extracted, tmp_path / "two")):
        for several, one in zip(found, alone, strict=True):
            assert len(several) == 121
            torch.testing.assert_close(several, one, rtol=1e-5, atol=1e-6)
    assert len(list((tmp_path / "two").rglob("*.npy"))) == 3
    assert not list((tmp_path / "two").rglob("*.partial"))


def failing(folder):
    """What each process says where the second one's images end too soon."""
    data = Fake(train=100)
    scan = data.scan
    if dist.rank():
        data.scan = lambda split, start, stop, **more: scan(split, start, stop - 1, **more)
    try:
        FeatureStore(folder, batch_size=16).extract(
            net(), data, "train", [FINAL], shapes=Shapes({"two": (6, 3, 3)}, 6, True)
        )
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.ddp
def test_an_error_in_one_process_ends_all(tmp_path):
    first, second = on_processes(2, partial(failing, tmp_path))
    assert first.startswith("another process could not extract")
    assert second == "images 50 to 100 of train were due, got 49"
    assert not list(tmp_path.rglob("*.npy*"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_are_those_of_torch(tmp_path, dtype):
    exact, found = extracted(tmp_path / "a"), extracted(tmp_path / "b", dtype)
    for kept, x in zip(found, exact, strict=True):
        assert kept.dtype == getattr(torch, dtype)
        assert torch.equal(kept, x.to(getattr(torch, dtype)))
    sizes = [sum(f.stat().st_size for f in (tmp_path / x).rglob("*.npy")) for x in "ab"]
    header = 3 * 128
    assert sizes[1] - header == (sizes[0] - header) // (1 if dtype == "float32" else 2)
    shapes = shapes_of(net(end=True), Fake(), "cpu")
    assert FeatureStore(tmp_path, dtype=dtype).size(121, WANTED, shapes) == sizes[1] - header


def test_an_output_of_its_own_needs_no_second_forward(tmp_path):
    backbone, data = net(end=True), Fake()
    shapes = shapes_of(backbone, data, "cpu")
    assert not shapes.pooled
    backbone.images = 0
    found = FeatureStore(tmp_path).extract(backbone, data, "train", WANTED, shapes=shapes)
    assert backbone.images == 120
    with torch.no_grad():
        x = normalize(data.pixels["train"])
        torch.testing.assert_close(found[FINAL].flatten(1), backbone.eval()(x))
        torch.testing.assert_close(
            found[Request("two")].flatten(1), backbone.stages(x)["two"].mean((2, 3))
        )
    assert "stages" not in vars(backbone)


class Halves(nn.Module):
    """Its forward looks at parts of an image only: their stages are not the image's."""

    dim = 3

    def stages(self, x):
        return {"all": x}

    def forward(self, x):
        return torch.stack([self.stages(h)["all"].mean((2, 3)) for h in x.chunk(2, 3)]).amax(0)


def test_stages_of_parts_are_not_taken_for_the_images(tmp_path):
    data = Fake()
    found = FeatureStore(tmp_path).extract(Halves(), data, "test", [FINAL, Request("all", 8)])
    x = normalize(data.pixels["test"])
    torch.testing.assert_close(found[Request("all", 8)], x)
    torch.testing.assert_close(found[FINAL].flatten(1), Halves()(x))


# Killed, full, damaged.

KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_feature_store import FINAL, Fake, FeatureStore, net
folder, data = Path({folder!r}), Fake()
scan = data.scan
def slow(split, start=0, stop=None, batch_size=256):
    for i, batch in enumerate(scan(split, start, stop, batch_size)):
        if i == 3:
            (folder / "half").touch()
            time.sleep(60)
        yield batch
data.scan = slow
FeatureStore(folder, batch_size=20).extract(net(), data, "train", [FINAL])
"""


def script(code, **values):
    """A process that runs some code, which may import this file."""
    code = code.format(tests=str(Path(__file__).parent), **values)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(there, seconds=60):
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_killed_pass_leaves_nothing_that_looks_whole(tmp_path):
    process = script(KILLED, folder=str(tmp_path))
    wait_for((tmp_path / "half").exists)
    # While it lives another run waits for it; the system frees the lock of the dead.
    said = []
    answer = []
    data = Fake()
    store = FeatureStore(tmp_path, batch_size=20)

    def other():
        answer.append(
            store.extract(net(), data, "train", [FINAL], progress=lambda *x: said.append(x))
        )

    thread = threading.Thread(target=other)
    thread.start()
    wait_for(lambda: said)
    assert said == [("train features of another run", 0, 120)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    thread.join(30)
    whole = FeatureStore(tmp_path / "fresh").extract(net(), Fake(), "train", [FINAL])[FINAL]
    torch.testing.assert_close(answer[0][FINAL], whole, rtol=1e-5, atol=1e-6)
    assert said[1:] == [("train features", 20 * i, 120) for i in range(1, 7)]
    assert len(list(tmp_path.glob("train_*/*.npy"))) == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_a_partial_file_is_no_features(tmp_path):
    process = script(KILLED, folder=str(tmp_path))
    wait_for((tmp_path / "half").exists)
    process.kill()
    process.wait()
    assert list(tmp_path.rglob("*.npy.partial"))
    assert not list(tmp_path.rglob("*.npy"))
    assert FeatureStore(tmp_path).find(net(), Fake(), "train", FINAL) is None


def test_what_another_run_made_meanwhile_is_taken(tmp_path):
    backbone, data = net(), Fake()
    FeatureStore(tmp_path).extract(backbone, data, "train", [FINAL])
    path = next(tmp_path.rglob("*.npy"))
    hidden, backbone.images = path.with_suffix(".hidden"), 0
    path.rename(hidden)
    lock = (path.parent / "lock").open("a")
    assert feature_file._locked(lock)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            FeatureStore(tmp_path).extract(
                backbone, data, "train", [FINAL], progress=lambda *_: hidden.rename(path)
            )
        )
    )
    thread.start()
    wait_for(path.exists)
    lock.close()
    thread.join(30)
    assert found[0][FINAL].shape == (120, 6, 1, 1)
    assert backbone.images <= 2  # for the shapes


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_feature_store import FINAL, Fake, FeatureStore, Request, net
if not {reserved}:
    import os
    del os.posix_fallocate
    os.ftruncate = lambda *_: None
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
store = FeatureStore(Path({folder!r}), batch_size=20)
try:
    store.extract(net(), Fake(), "train", [Request("one", 8), FINAL])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("reserved", [True, False])
def test_a_full_disk_is_an_error_that_says_so(tmp_path, reserved):
    out, _ = script(FULL, folder=str(tmp_path), reserved=reserved).communicate()
    assert f"cannot keep the features of 120 train images in {tmp_path}: " in out
    assert "They take 0.000117 GiB as float32" in out  # 120 x (4 x 8 x 8 + 6) numbers
    assert "features=DIR" in out
    assert "feature_dtype=bfloat16" in out
    assert not list(tmp_path.rglob("*.npy*")), "what is no use takes no room"


def test_room_is_reserved_before_the_first_image(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    backbone, data = net(), Fake()
    shapes, backbone.images = shapes_of(backbone, data, "cpu"), 0
    with pytest.raises(OSError, match="No space left on device"):
        FeatureStore(tmp_path).extract(backbone, data, "train", [FINAL], shapes=shapes)
    assert backbone.images == 0


def test_a_damaged_file_is_named(tmp_path):
    FeatureStore(tmp_path).extract(net(), Fake(), "train", [FINAL])
    path = next(tmp_path.rglob("*.npy"))
    whole = path.read_bytes()
    for cut in (0, 60, len(whole) - 8):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"two_1_float32.npy are damaged .*: delete it"):
            FeatureStore(tmp_path).extract(net(), Fake(), "train", [FINAL])
    path.write_bytes(whole)
    assert len(FeatureStore(tmp_path).extract(net(), Fake(), "train", [FINAL])[FINAL]) == 120


def test_features_survive_what_is_done_to_them(tmp_path):
    first = FeatureStore(tmp_path).extract(net(), Fake(), "train", [FINAL])[FINAL]
    kept = first.clone()
    first.zero_()
    again = FeatureStore(tmp_path).extract(net(), Fake(), "train", [FINAL])[FINAL]
    assert torch.equal(again, kept)


def test_a_shared_folder_must_be_writable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"features=.*file/here: nothing can be written there"):
        opened(str(tmp_path / "file/here"), tmp_path, "float32")
    assert opened(str(tmp_path / "new"), tmp_path, "bfloat16").folder.is_dir()
    assert opened(None, tmp_path / "own", "float32").folder == tmp_path / "own"
    assert not (tmp_path / "own").exists()


# How much.


@pytest.mark.parametrize(
    ("images", "requests", "dtype", "gib"),
    [
        # VOC07 trainval and test: the five stages of the SVMs
        (5011 + 4952, SVMS, "float32", 1.63),
        (5011 + 4952, SVMS, "bfloat16", 0.82),
        # ImageNet-1k, both splits
        (1_281_167 + 50_000, [FINAL], "float32", 10.2),
        (1_281_167 + 50_000, [FINAL], "bfloat16", 5.1),
        # ... with the last two stages of the linear probe besides
        (1_281_167 + 50_000, [FINAL, Request("res5", 2)], "bfloat16", 25.4),
    ],
)
def test_sizes_are_those_of_the_readme(tmp_path, images, requests, dtype, gib):
    size = FeatureStore(tmp_path, dtype=dtype).size(images, requests, RESNET50)
    assert size / 2**30 == pytest.approx(gib, abs=0.06)
    if len(requests) != 2:
        assert size < 24 * 2**30


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_feature_store import FINAL, FeatureStore, Shapes, Wide, peak
from unlabeled.evaluate import knn
knn.NUMBERS = 1 << 20
store = FeatureStore(Path({folder!r}), batch_size=128)
for images in (10_000, 40_000):
    data, found = Wide(images), []
    def extract():
        shapes = Shapes({{}}, 2048, False)
        found.append(store.extract(data.backbone, data, "train", [FINAL], shapes=shapes)[FINAL])
    first = peak(extract)
    x = found[0].flatten(1)
    second = peak(lambda: knn.search(x[:64], x, 5, by="torch"))
    third = peak(lambda: knn.search(x[:64], x, 5, by="faiss"))
    print(x.nbytes, first, second, third)
"""


class Wide:
    """Many small images, made as they are asked for, and a backbone of 2048 features."""

    classes = ("a",)

    def __init__(self, n):
        self.n = n
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 2048))

    def size(self, split):
        return self.n

    def fingerprint(self, split):
        return f"wide {self.n}"

    def scan(self, split, start=0, stop=None, batch_size=256):
        generator = torch.Generator().manual_seed(0)
        for first in range(start, stop, batch_size):
            size = (min(batch_size, stop - first), 3, 4, 4)
            yield {"crops": [torch.randint(0, 256, size, generator=generator).to(torch.uint8)]}


def peak(work):
    """The most memory (bytes) that a function takes that is not a mapped file."""
    most, done = [0], threading.Event()

    def own():
        with open("/proc/self/status") as status:
            lines = [line.split() for line in status]
        return 1024 * sum(int(x[1]) for x in lines if x[0] in ("RssAnon:", "RssShmem:"))

    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], own())

    start, thread = own(), threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return most[0] - start


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_images(tmp_path):
    process = script(MEMORY, folder=str(tmp_path))
    out, _ = process.communicate()
    assert process.returncode == 0, out
    few, many = [list(map(int, line.split())) for line in out.splitlines()[-2:]]
    assert many[0] == 4 * few[0] == 40_000 * 2048 * 4
    for before, after in zip(few[1:], many[1:], strict=True):
        assert after - before < (many[0] - few[0]) / 4, (few, many)  # allocators keep some MB


def test_plain_files_are_written_not_mapped(tmp_path):
    # A full disk would end the process that writes through a map, by a signal.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "x.npy"
    feature_file.reserve(path, "float32", (40_000, 1024))
    writer = feature_file.Writer(path, "float32", 39_000)
    writer.write(torch.arange(1000.0)[:, None].expand(1000, 1024))
    writer.close()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB
    found = feature_file.read(path, "float32", 40_000)
    assert found[:39_000:1000].abs().sum() == 0
    assert torch.equal(found[39_000:, 7], torch.arange(1000.0))
