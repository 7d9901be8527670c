"""Input that nobody meant: it is refused in clear words, quickly, and without much memory.

How many inputs are tried is `INPUTS` per test, or `UNLABELED_FUZZ` times as many (a run of
`UNLABELED_FUZZ=50 pytest tests/faults/test_fuzz.py -s` says how many and how long).
"""

import importlib
import io
import os
import pickle
import pkgutil
import resource
import struct
import tarfile
import time
import zipfile
import zlib

import pytest
import torch
from conftest import CONF
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import unlabeled
from unlabeled import checkpoints
from unlabeled.backbones import load
from unlabeled.data.rgb import MAX_PIXELS, UnreadableError, read
from unlabeled.data.shards import Shards
from unlabeled.data.voc import read_objects
from unlabeled.overrides import mistakes
from unlabeled.redact import HIDDEN, hidden

TIMES = int(os.environ.get("UNLABELED_FUZZ", "1"))
SLOWEST = 20.0  # seconds for one input: more is a hang
MOST = 192 << 20  # bytes for one input: far more than it is long


def inputs(count):
    """Settings of a test with so many inputs, the same ones every time."""
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


pytestmark = [
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


@pytest.fixture(autouse=True)
def told(request):
    """Says how many inputs a test tried in what time, and watches every one of them."""
    tried, began = [], time.monotonic()
    request.node.tried = tried
    yield
    print(f"\n{request.node.name}: {len(tried)} inputs in {time.monotonic() - began:.1f} s")
    assert max(tried, default=0) < SLOWEST


@pytest.fixture
def watched(request):
    """A function that calls another, within bounds of time and memory."""

    def call(function, *arguments):
        before, began = _memory(), time.monotonic()
        try:
            return function(*arguments)
        finally:
            request.node.tried.append(time.monotonic() - began)
            assert _memory() - before < MOST

    return call


def _memory():
    """The most this process has held until now, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# Overrides.

KEYS = st.sampled_from(
    [
        *("method", "backbone", "data", "trainer", "evals", "callbacks", "experiment", "decode"),
        *("method.temperature", "method.optim.lr", "data.batch_size", "data.root", "seed"),
        *("trainer.max_epochs", "trainer.devices", "resume", "backbone.width", "method.hidden"),
        *("callbacks.checkpoint.keep", "callbacks.finite.policy", "optim@method.optim", "hydra"),
        *("augment@method.augment", "method._target_", "hydra.run.dir", "", "a.b.c", "data.limit"),
    ]
)
VALUES = st.one_of(
    st.sampled_from(
        [
            *("simclr", "byol", "none", "null", "true", "???", "${seed}", "${nothing}", "-1"),
            *("1e400", "nan", "[1,2", "{a:1}", "[[[[[]]]]]", "os.system", "builtins.eval", "1,2"),
            *("range(3)", "choice(1,2)", "${oc.env:PATH}", "${hydra:job.num}", "../../etc/passwd"),
            *("__import__('os').system('true')", "!!python/object/apply:os.system ['true']", "''"),
        ]
    ),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)
WORDS = st.one_of(
    st.builds("{}{}={}".format, st.sampled_from(["", "", "", "", "+", "++", "~"]), KEYS, VALUES),
    st.text(max_size=20),
)


@pytest.fixture(scope="module")
def imported():
    """What a check imports once is not of the input."""
    for module in pkgutil.walk_packages(unlabeled.__path__, "unlabeled."):
        importlib.import_module(module.name)
    assert mistakes(CONF, "train", ["method=byol", "backbone=torchvision"])  # it needs a name


@inputs(8)
@given(st.lists(WORDS, min_size=1, max_size=3))
def test_overrides(imported, watched, words):
    found = watched(lambda: mistakes(CONF, "train", words))
    assert all(isinstance(line, str) and line for line in found)
    for line in found:
        assert "Traceback" not in line


# Images.


def encoded(kind):
    image = Image.effect_noise((48, 40), 80).convert("RGB")
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


WHOLE = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}


def damaged(draw, whole):
    """A file cut short, with bytes changed, put in or taken out, or another file's start."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["cut", "change", "insert", "remove", "zero", "start"]))
        if how == "cut":
            del content[at:]
        elif how == "change" and content:
            content[at] = draw(st.integers(0, 255))
        elif how == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif how == "remove":
            del content[at : at + draw(st.integers(1, 64))]
        elif how == "zero":
            content[at : at + 32] = bytes(len(content[at : at + 32]))
        else:
            content[:8] = draw(st.sampled_from([*WHOLE.values(), b"PK\x03\x04....", b"%PDF-1.4"]))[
                :8
            ]
    return bytes(content)


def unreadable_or_whole(path):
    try:
        image = read(path)
    except UnreadableError:
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= MAX_PIXELS


@inputs(300)
@given(data=st.data(), kind=st.sampled_from(sorted(WHOLE)))
def test_image_files(watched, tmp_path, data, kind):
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(damaged(data.draw, WHOLE[kind]))
    watched(unreadable_or_whole, path)


def png(width, height, body):
    """A PNG file that says how large it is, whatever it holds."""

    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (("IHDR", header), ("IDAT", body), ("IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(n.encode(), c) for n, c in parts)


@inputs(60)
@given(st.integers(1, (1 << 31) - 1), st.integers(1, (1 << 31) - 1))
@example((1 << 31) - 1, (1 << 31) - 1)
@example(MAX_PIXELS + 1, 1)
def test_image_bombs(watched, tmp_path, width, height):
    """Few bytes that say they are an image of many pixels."""
    if width * height <= MAX_PIXELS:
        width = MAX_PIXELS // height + 1
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, zlib.compress(bytes(1 << 20))))
    with pytest.raises(UnreadableError, match=r"pixels|MemoryError|DecompressionBomb|size"):
        watched(read, path)


# Annotations of VOC.

BOX = "<xmin>3</xmin><ymin>5.5</ymin><xmax>20</xmax><ymax>30</ymax>"
OBJECT = f"<object><name>dog</name><bndbox>{BOX}</bndbox><difficult>1</difficult></object>"
DOGS = f"<annotation><filename>x.jpg</filename>{OBJECT}{OBJECT}</annotation>"
ODD = st.sampled_from(
    [
        *("", "nan", "-inf", "1e9999", "9" * 400, "dog", "\u0663", "0x10", "1,5", "-7", " 4 "),
        *("&a;", "&#0;", "&lt;", "<![CDATA[3]]>", "<!-- -->", "<x>" * 50, "]]>", "<object>"),
        *(
            '<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
            '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
            '<?xml version="1.0" encoding="utf-7"?>',
        ),
    ]
)
PARTS = ("3", "5.5", "20", "30", "dog", "1", "<object>", "</bndbox>", "<annotation>", "bndbox")


def tried(function, path):
    """What a function makes of a path, or None where it refuses it, by its name."""
    try:
        return function(path)
    except ValueError as error:
        said = str(error)
    assert str(path) in said
    return None


def objects_or_named(path):
    found = tried(read_objects, path)
    if found is None:
        return
    left, top, right, bottom = found.boxes.unbind(1)
    assert found.boxes.isfinite().all()
    assert ((left < right) & (top < bottom)).all()
    assert len(found.boxes) == len(found.labels) == len(found.difficult)


@inputs(300)
@given(data=st.data())
def test_annotations(watched, tmp_path, data):
    text = DOGS
    for _ in range(data.draw(st.integers(0, 3))):
        text = text.replace(data.draw(st.sampled_from(PARTS)), data.draw(ODD), 1)
    content = text.encode()
    if data.draw(st.booleans()):
        content = damaged(data.draw, content)
    path = tmp_path / "x.xml"
    path.write_bytes(content)
    watched(objects_or_named, path)


# Archives.

NAMES = st.sampled_from(
    [
        *("a/0.jpg", "0.cls", "0.jpg", "1.PNG", "../up.jpg", "/root.jpg", "a/../../b.png", ".jpg"),
        *("x" * 300 + ".jpg", "\u00e9.jpg", "..", "2.cls", "2.jpg", "c\\..\\d.jpg"),
    ]
)
KINDS = st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])


def archived(draw):
    """An archive of a few members with odd names, sizes and kinds."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for _ in range(draw(st.integers(1, 5))):
            member = tarfile.TarInfo(draw(NAMES))
            member.type, member.linkname = draw(KINDS), draw(NAMES)
            body = draw(st.sampled_from([WHOLE["JPEG"], WHOLE["PNG"], b"7", b"-3", b"x" * 30, b""]))
            member.size = len(body) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(body))
    return file.getvalue()


def images_or_named(folder):
    """Reads all images of the archives of a folder. Nothing is ever written beside them."""
    splits = tried(lambda root: Shards()(root, 0), folder)
    if splits is None:
        return
    split = splits["train"]
    for i in range(len(split)):
        try:
            image = split.image(i)
        except UnreadableError:
            continue
        assert image.dtype == torch.uint8
        assert image.shape[0] == 3


@inputs(200)
@given(data=st.data())
def test_archives(watched, tmp_path_factory, monkeypatch, data):
    home = tmp_path_factory.mktemp("archives")
    monkeypatch.setenv("UNLABELED_CACHE", str(home / "cache"))
    folder = home / "shards"
    folder.mkdir()
    content = archived(data.draw)
    if data.draw(st.booleans()):
        content = damaged(data.draw, content)
    (folder / "0.tar").write_bytes(content)
    watched(images_or_named, folder)
    assert [path.name for path in folder.iterdir()] == ["0.tar"]
    assert {path.name for path in home.iterdir()} <= {"shards", "cache"}


# Checkpoints.


@pytest.fixture(scope="module")
def saved():
    file = io.BytesIO()
    layer = torch.nn.Linear(4, 3)
    state = {f"backbone.{name}": x for name, x in layer.state_dict().items()}
    whole = {"state_dict": state, "optimizer_states": [], "lr_schedulers": [], "loops": {}}
    torch.save({**whole, "global_step": 3, "epoch": 1, "backbone_config": None}, file)
    return file.getvalue()


def refused_or_whole(path, reader):
    try:
        content, said = reader(path), ""
    except (checkpoints.DamagedError, ValueError) as error:
        content, said = None, str(error)
    assert content or str(path) in said


@inputs(200)
@given(data=st.data())
def test_checkpoint_files(watched, tmp_path, saved, data):
    path = tmp_path / "x.ckpt"
    path.write_bytes(damaged(data.draw, saved))
    watched(refused_or_whole, path, checkpoints.read)
    watched(refused_or_whole, path, load.read)


@inputs(100)
@given(st.binary(max_size=400))
@example(b"")
@example(pickle.dumps({"state_dict": {}}))
def test_files_that_are_anything(watched, tmp_path, content):
    for suffix in (".ckpt", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(content)
        watched(refused_or_whole, path, checkpoints.read)
        watched(refused_or_whole, path, load.read)


CODE = [b"cos\nsystem\n(S'touch {}'\ntR.", b'cbuiltins\neval\n(S\'open("{}","w")\'\ntR.']
CODE += [b"cposix\nsystem\n(S'touch {}'\ntR.", b"csubprocess\nPopen\n((S'touch'\nS'{}'\nltR."]


@inputs(60)
@given(st.sampled_from(CODE), st.binary(max_size=8), st.booleans())
def test_pickles_that_run_code(watched, tmp_path, saved, code, junk, inside):
    """Pickles that would touch a file, alone or as a checkpoint's contents."""
    mark, path = tmp_path / "ran", tmp_path / "x.ckpt"
    code = code.replace(b"{}", str(mark).encode()) + junk
    if inside:
        with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, code if name.endswith("data.pkl") else old.read(name))
    else:
        path.write_bytes(code)
    for reader in (checkpoints.read, load.read):
        with pytest.raises((checkpoints.DamagedError, ValueError), match=r"x\.ckpt"):
            watched(reader, path)
    assert not mark.exists()


# Secrets.


@inputs(100)
@given(st.text("abcdef0123456789", min_size=40, max_size=40), st.text(max_size=30))
def test_secrets(watched, monkeypatch, key, around):
    monkeypatch.setenv("WANDB_API_KEY", key)
    texts = [f"{around}{key}{around}", f"logger.wandb.api_key={key}", f"WANDB_API_KEY={key} x"]
    said = watched(hidden, {"command": texts, key: {"deep": [key, 3, None]}})
    assert key not in repr(said)
    assert said["command"][1] == f"logger.wandb.api_key={HIDDEN}"
    assert hidden("method.temperature=0.1 class_token=true") == (
        "method.temperature=0.1 class_token=true"
    )
