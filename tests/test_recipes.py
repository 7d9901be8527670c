"""The recipes of conf/experiment/imagenet are the published ones, number by number."""

import re

import pytest
import torch
from conftest import CONF
from hydra.utils import instantiate
from omegaconf import OmegaConf

# name: images of an update and of a device, epochs, lr at that batch, its last value, weight decay
LARGE = {
    "barlow_twins": (2048, 64, 1000, 1.6, 1.6e-3, 1.5e-6),
    "byol": (4096, 128, 1000, 3.2, 0, 1.5e-6),
    "clusterfit": (256, 32, 105, 0.1, 1e-5, 1e-4),
    "deepcluster": (256, 256, 500, 0.05, 0.05, 1e-5),
    "deepcluster_v2": (4096, 64, 800, 4.8, 4.8e-3, 1e-6),
    "dino": (1024, 64, 800, 2e-3, 1e-6, 0.04),
    "distillation": (256, 32, 105, 0.1, 1e-5, 1e-4),
    "jigsaw": (256, 32, 105, 0.1, 1e-5, 1e-4),
    "moco": (256, 32, 200, 0.03, 3e-4, 1e-4),
    "moco_v2": (256, 32, 800, 0.03, 0, 1e-4),
    "npid": (256, 32, 200, 0.03, 3e-4, 1e-4),
    "pirl": (1024, 32, 800, 0.12, 1.2e-4, 1e-4),
    "pirl_jigsaw_rotation": (1024, 32, 400, 0.12, 1.2e-4, 1e-4),
    "pirl_mlp": (1024, 32, 800, 0.12, 1.2e-4, 1e-4),
    "pirl_rotation": (1024, 32, 400, 0.12, 1.2e-4, 1e-4),
    "relative_position_resnet50": (512, 64, 70, 0.2, 2e-3, 1e-4),
    "rotation": (256, 32, 105, 0.1, 1e-5, 1e-4),
    "seer": (8192, 16, 1, 9.6, 9.6e-3, 1e-5),
    "simclr": (4096, 128, 1000, 4.8, 0, 1e-6),
    "simsiam": (512, 64, 100, 0.1, 0, 1e-4),
    "supervised": (256, 32, 105, 0.1, 1e-5, 1e-4),
    "swav": (4096, 64, 800, 4.8, 4.8e-3, 1e-6),
    "vicreg": (2048, 64, 1000, 1.6, 1.6e-3, 1e-6),
}
STEPS = {
    **{
        name: [30, 60, 90, 100]
        for name in ("clusterfit", "distillation", "jigsaw", "rotation", "supervised")
    },
    **{name: [120, 160] for name in ("moco", "npid")},
    "relative_position_resnet50": [30, 50],
}
BICUBIC = {"barlow_twins", "byol", "dino", "simclr", "vicreg"}
IMAGES = 1_281_167


@pytest.fixture(scope="module")
def recipe(compose):
    """A function: name -> the config of a full-scale run, and images per device of its header."""

    def of(name):
        needs = {"clusterfit": ["method.source.path=x"], "distillation": ["method.teacher.path=x"]}
        cfg = compose(f"experiment=imagenet/{name}", "data.root=x", *needs.get(name, []))
        header = (CONF / f"experiment/imagenet/{name}.yaml").read_text()
        found = re.search(r"trainer\.devices=(\d+)(?: trainer\.num_nodes=(\d+))?", header)
        return cfg, cfg.data.batch_size / (int(found[1]) * int(found[2] or 1))

    return of


def rates(cfg, per_epoch):
    """A function: updates made before -> the learning rate; and how many updates there are."""
    optim = instantiate(cfg.method.optim)
    optim.optimizer = torch.optim.SGD
    steps = cfg.trainer.max_epochs * per_epoch
    size = cfg.data.batch_size
    parts = ("hidden", "head")  # that a recipe may name
    net = torch.nn.ModuleDict({part: torch.nn.Linear(2, 2) for part in parts})
    made = optim(net, batch_size=size, steps=steps, steps_per_epoch=per_epoch)
    schedule = made["lr_scheduler"]["scheduler"]
    return lambda step: schedule.base_lrs[0] * schedule.lr_lambdas[0](step), steps


@pytest.mark.parametrize("name", LARGE)
def test_full_scale_recipes_are_the_published_ones(recipe, name):
    cfg, per_device = recipe(name)
    batch, share, epochs, lr, last, decay = LARGE[name]
    got = (cfg.data.batch_size, per_device, cfg.trainer.max_epochs)
    assert got == (batch, share, epochs)
    assert cfg.method.optim.weight_decay == decay
    crops = cfg.decode.get("parts", {"all": cfg.decode}).values()
    kinds = {crop.get("interpolation", "bilinear") for crop in crops}
    assert kinds == {"bicubic" if name in BICUBIC else "bilinear"}
    rate, steps = rates(cfg, 100)
    assert max(map(rate, range(steps))) == pytest.approx(lr, rel=1e-3)
    assert rate(steps) == pytest.approx(last, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("name", STEPS)
def test_steps_fall_at_the_start_of_the_published_epochs(recipe, name):
    cfg, _ = recipe(name)
    for per_epoch in (7, IMAGES // 256):
        rate, steps = rates(cfg, per_epoch)
        starts = range(per_epoch, steps, per_epoch)
        near = range(1, steps) if per_epoch == 7 else [s + i for s in starts for i in (-1, 0, 1)]
        drops = [step for step in near if rate(step) < rate(step - 1) * 0.5]
        assert drops == [epoch * per_epoch for epoch in STEPS[name]]


@pytest.mark.parametrize(
    ("chosen", "updates", "published"),
    [
        ("method=colorization", 450_000, {2e5: (3e-5, 1e-5), 3.75e5: (1e-5, 3e-6)}),
        (
            "experiment=imagenet/colorization",
            500_000,
            {2.25e5: (3e-5, 3e-6), 4.5e5: (3e-6, 3e-7)},
        ),
    ],
)
def test_colorizations_rates_are_the_papers_and_the_official_codes(
    compose, chosen, updates, published
):
    optim = instantiate(compose(chosen, "data=imagenet", "data.root=x").method.optim)
    for step, rates in published.items():
        got = [optim.lr * optim.factor(near / updates) for near in (step - 1, step + 1)]
        assert got == pytest.approx(rates, rel=0.06)


FILES = sorted([*CONF.glob("method/*.yaml"), *CONF.glob("experiment/**/*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_arguments_of_an_optimizer_lie_in_its_group(path):
    """They would stay when the command line chooses another optimizer, which may not take them."""
    given = OmegaConf.load(path)
    nodes = [given, *(given.get("method") or {}, given.get("tasks") or {})]
    assert not [n for n in nodes if "optimizer" in (n.get("optim") or {})]


@pytest.mark.parametrize("method", ["supervised", "mae", "colorization", "diverse_colorization"])
def test_another_optimizer_takes_the_place_of_a_published_one(compose, method):
    plan = compose(f"method={method}", "optim@method.optim=sgd", "data=cifar10").method.optim
    assert set(plan.optimizer) == {"_target_", "_partial_", "momentum", "nesterov"}


def test_simclrs_largest_batch_has_its_similarities_in_parts(recipe):
    cfg, _ = recipe("simclr")
    assert cfg.method.chunk * 2 * cfg.data.batch_size * 4 <= 1 << 25  # bytes; not 256 MiB
