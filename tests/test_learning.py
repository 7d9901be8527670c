"""Minutes of training on real images: every method learns something (marker `slow`).

Each learns from 5 000 images of CIFAR-10 with its settings of conf/experiment/cifar10, only
shorter. Pretext accuracies are those on test images, all others those of the last epoch's updates.
"""

import csv
import json
import os
from pathlib import Path

import pytest
from conftest import CONF, PRETEXT

from unlabeled.train import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HOME = Path(os.environ.get("UNLABELED_DATA") or Path.home() / ".cache/unlabeled-data")
METHODS = sorted(p.stem for p in (CONF / "experiment/cifar10").glob("*.yaml"))
EPOCHS = {"rotation": 4, "pirl": 5}  # they see each image more than twice
EPOCHS |= {"byol": 16, "mae": 12}  # their first hundreds of updates lead away from chance
CHANCE = {"rotation": 1 / 4, "jigsaw": 1 / 24, "clusterfit": 1 / 50, "supervised": 1 / 10}
SOURCE = {  # what a method starts from, and the key that names it
    "clusterfit": ("simclr", "method.source.path"),
    "distillation": ("supervised", "method.teacher.path"),
}
EARLY = {"rotation", "jigsaw", "relative_position"}  # answers not about classes, that early
EARLY |= {"diverse_colorization"}
CHANCE |= {"cpc": 1 / 1152, "cpc_v2": 1 / 1152}  # patches of a batch
CHANCE |= {"relative_position": 1 / 6, "deepcluster": 1 / 50, "distillation": 1 / 10}
# Held-out answers far above chance: these had 0.50, 0.50 and 0.52.
LEAST = {"rotation": 0.4, "jigsaw": 0.25, "relative_position": 0.4}
LEAST |= {"cpc": 10 / 1152, "cpc_v2": 10 / 1152}
OWN = {"clusterfit": ["method.clusters=50"], "deepcluster": ["method.clusters=50"]}
OWN |= {"mae": ["data.batch_size=64"]}  # as in its settings: it takes many updates


@pytest.fixture(scope="module")
def trained(compose, tmp_path_factory):
    """A function: method -> the folder of its run, which is made once."""
    root = HOME / "cifar10"
    if not (root / "train").is_dir() and not (root / "cifar-10-batches-py").is_dir():
        pytest.skip(f"needs CIFAR-10 in {root}: set UNLABELED_DATA")
    folder = tmp_path_factory.mktemp("learning")

    def made(method):
        out = folder / method
        if out.exists():
            return out
        source = []
        if method in SOURCE:
            source_of, key = SOURCE[method]
            source = [f"{key}={made(source_of)}"]
        cfg = compose(
            f"experiment=cifar10/{method}",
            *(f"data.root={root}", "data.layout.download=false", "data.limit=5000"),
            *(
                [] if method in ("cpc", "cpc_v2", "mae", "seer") else ["backbone.width=16"]
            ),  # of ResNets
            *("data.batch_size=128", f"trainer.max_epochs={EPOCHS.get(method, 8)}"),
            *("trainer=cpu", "trainer.log_every_n_steps=1", "evals=knn"),
            *(*OWN.get(method, []), *source),
        )
        run(cfg, out)
        return out

    return made


def last_epoch(out, name):
    """Mean of a metric over the updates of the last epoch."""
    with (out / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    last = max(int(float(row["epoch"])) for row in rows)
    values = [float(row[name]) for row in rows if int(float(row["epoch"])) == last]
    return sum(values) / len(values)


@pytest.mark.parametrize("method", METHODS)
def test_learns(trained, method):
    out = trained(method)
    scores = json.loads((out / "scores.json").read_text())
    name = "knn/k20_t0.07/top1"
    gain = scores[name] - scores[f"baseline/random/{name}"]
    print(f"{method}: kNN {scores[name]:.3f}, gain over random initialisation {gain:+.3f}")
    if method in CHANCE:
        side = "held_out" if method in PRETEXT else "train"
        accuracy = last_epoch(out, f"{side}/accuracy")
        print(f"{method}: accuracy {accuracy:.3f}, by chance {CHANCE[method]:.3f}")
        assert accuracy > LEAST.get(method, 1.5 * CHANCE[method])
    if method == "multitask":
        accuracy = last_epoch(out, "held_out/relative_position/accuracy")
        print(f"{method}: relative position {accuracy:.3f}, by chance {1 / 6:.3f}")
        assert accuracy > 0.25
    if method == "diverse_colorization":  # several fields an image are worth more than one colour
        best, mean = (last_epoch(out, f"held_out/error_of_{x}") for x in ("best_8", "mean"))
        print(f"{method}: error of the best of 8 {best:.2f}, of the mean colour {mean:.2f}")
        assert best < 0.9 * mean
    if method not in PRETEXT:
        assert last_epoch(out, "health/std") > 0.1  # 0: collapsed
    if method not in EARLY:
        assert gain > 0.02
