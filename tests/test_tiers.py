"""Methods run on every tier of data, and a stream refuses those that must meet images again."""

import io
import tarfile

import numpy as np
import pytest
import torch
from conftest import CONF, METHODS, RECORDINGS
from hydra.utils import get_class
from omegaconf import OmegaConf
from PIL import Image
from test_every_yaml import overrides

from unlabeled.errors import InputError
from unlabeled.train import run

COUNT = 12
SIZES = ["data.limit=null", "data.batch_size=4", "data.workers=0", "data.size=16"]
CUT = ["data.eval_decode.size=16", "data.eval_decode.resize=16", "decode=two", "decode.size=16"]
TIERS = {
    "memory": ["data=folder", "data.tier=memory", "data.layout.test_share=0"],
    "folder": ["data=folder", "data.tier=folder", "data.layout.test_share=0"],
    "shards": ["data=shards", "data.tier=folder", "data.layout.train=shards/*.tar"],
    "stream": ["data=stream", "trainer.max_epochs=1"],
}
OWN = {
    "simclr": [],
    "npid": ["decode=one", "decode.size=16", "method.negatives=5"],
    "supervised": ["decode=one", "decode.size=16"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photographs in files, and the same in shards."""
    root = tmp_path_factory.mktemp("tiers")
    (root / "shards").mkdir()
    generator = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = generator.integers(0, 256, (20, 24, 3), np.uint8)
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        path = root / "ab"[i % 2] / f"{i}.jpg"
        Image.fromarray(pixels).save(path)
        with tarfile.open(root / f"shards/{i % 3}.tar", "a") as archive:
            archive.add(path, f"{i:05d}.jpg")
            label = tarfile.TarInfo(f"{i:05d}.cls")
            label.size = 1
            archive.addfile(label, io.BytesIO(str(i % 2).encode()))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))


def lines(tier, root, method):
    return [*TIERS[tier], f"data.root={root}", *SIZES, *CUT, *OWN[method]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", ["simclr", "npid"])
def test_a_method_trains_on_every_tier(tiny, root, name, tier):
    if (name, tier) == ("npid", "stream"):
        pytest.skip("it keeps an embedding of every image: refused, see below")
    method, data, trainer = tiny(name, *lines(tier, root, name))
    before = [p.clone() for p in method.backbone.parameters()]
    losses, met = [], []
    method.on_train_batch_end = lambda out, batch, i: (
        losses.append(out["loss"].item()),
        met.extend(batch["index"].tolist()),
    )
    trainer.fit(method, data)
    epochs = 1 if tier == "stream" else 2
    assert len(losses) == epochs * COUNT // 4
    assert all(torch.tensor(losses).isfinite())
    assert sorted(met) == sorted(epochs * list(range(COUNT)))
    moved = zip(before, method.backbone.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["npid"])
def test_a_stream_refuses_a_memory_bank(tiny, root, name):
    method, data, trainer = tiny(name, *lines("stream", root, name))
    with pytest.raises(
        ValueError, match=r"NPID keeps .* a stream meets each image once: .*=shards"
    ):
        trainer.fit(method, data)


@pytest.mark.filterwarnings("ignore")
def test_what_has_no_labels_is_refused_by_name(tiny, root):
    method, data, trainer = tiny("supervised", *lines("stream", root, "supervised"))
    with pytest.raises(ValueError, match=r"Supervised needs \['label'\] in every batch"):
        trainer.fit(method, data)


def test_methods_that_index_images_say_so():
    """Every method whose file has a buffer for each image is refused on streams."""
    found = {}
    for path in sorted((CONF / "method").glob("*.yaml")):
        target = OmegaConf.load(path).get("_target_")
        if target is not None:
            found[path.stem] = get_class(target).revisits
    banks = {"npid", "pirl", "pirl_mlp", "deepcluster", "deepcluster_v2"}
    assert banks <= {name for name, is_so in found.items() if is_so}
    assert not {"simclr", "swav", "seer", "moco", "byol"} & {
        n for n, is_so in found.items() if is_so
    }


FAST = {("jigsaw", "stream"), ("swav", "folder"), ("pirl", "memory"), ("colorization", "stream")}
EACH = [
    pytest.param(name, tier, marks=() if (name, tier) in FAST else pytest.mark.slow)
    for name in METHODS
    if name not in RECORDINGS
    for tier in TIERS
]


def refused(cfg, tier):
    """Why a stream cannot be what this method learns from, if so."""
    if tier != "stream":
        return None
    if cfg.method._target_.endswith("Supervised"):
        return r"needs \['label'\] in every batch"
    return "a stream meets each image once" if get_class(cfg.method._target_).revisits else None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "tier"), EACH)
def test_every_method_runs_on_every_tier(name, tier, compose, source, teacher, root, tmp_path):
    given = [x for x in overrides(f"method/{name}") if not x.startswith(("data=", "data.tier="))]
    given = [line.replace("SOURCE", str(source)).replace("TEACHER", str(teacher)) for line in given]
    cfg = compose(*given, *TIERS[tier], f"data.root={root}", "data.batch_size=4")
    if reason := refused(cfg, tier):
        with pytest.raises((ValueError, InputError), match=reason):
            run(cfg, tmp_path / "run")
        return
    assert run(cfg, tmp_path / "run") == {}
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(x.isfinite().all() for k, x in saved["state_dict"].items() if k[:9] == "backbone.")
