"""The frozen suite in one pass, against plain passes and against one evaluation at a time."""

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_rows import Row, per_round, seconds

from unlabeled.augment.probes import Shuffle, Turn, Zoom
from unlabeled.backbones.resnet import ResNet
from unlabeled.data.decode import Center, Crops
from unlabeled.data.images import Images
from unlabeled.data.splits import Array, Split
from unlabeled.evaluate.clustering import Clustering
from unlabeled.evaluate.forward import images
from unlabeled.evaluate.health import Health
from unlabeled.evaluate.invariance import Invariance
from unlabeled.evaluate.knn import KNN
from unlabeled.evaluate.linear import Linear
from unlabeled.evaluate.lowshot import LowShot
from unlabeled.evaluate.retrieval import Retrieval
from unlabeled.evaluate.suite import evaluate
from unlabeled.evaluate.svm_voc07 import SVMVOC07
from unlabeled.truth import Kept

SIDE, TRAIN, TEST, WIDTH, BAR = 32, 512, 256, 32, 1.25


def suite() -> dict[str, Any]:
    """Evaluations of frozen features, with short heads: these are not what is measured."""
    return {
        "knn": KNN(k=[1, 20]),
        "knn_npid": KNN(k=[200]),
        "linear": Linear(epochs=1, lrs=[0.1], max_features=1024),
        "linear_vissl": Linear(epochs=1, lrs=[0.01], weight_decays=[5e-4], max_features=2048),
        "clustering": Clustering(starts=1, iterations=5),
        "svm_voc07": SVMVOC07(costs=[1.0], folds=2, max_iter=3, max_features=256, jobs=1),
        "lowshot": LowShot(k=[1, 4], draws=2, costs=[1.0], max_features=256, jobs=1),
    }


def looking() -> dict[str, Any]:
    """Evaluations that look at views of the test images as well."""
    return {
        "health": Health(decode=Crops(size=SIDE, count=2, scale=(0.2, 1.0))),
        "retrieval": Retrieval(patches=2),
        "invariance": Invariance(transforms={"turn": Turn(), "shuffle": Shuffle(), "zoom": Zoom()}),
    }


VIEWS = 2 + 2 + 3  # of a test image: what `looking` cannot do without, beside the image itself


class Timed:
    """An evaluation of frozen features whose own work is counted apart."""

    def __init__(self, evaluation: Any) -> None:
        self.evaluation, self.spent = evaluation, 0.0
        self.data, self.splits = evaluation.data, evaluation.splits
        self.requests = evaluation.requests

    def __call__(self, features: Any) -> Any:
        start = time.process_time()
        try:
            return self.evaluation(features)
        finally:
            self.spent += time.process_time() - start


class Counting(ResNet):
    """A ResNet-18 that counts the images that it and its copies see."""

    seen = 0

    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        Counting.seen += len(x)
        return super().stages(x)


def data() -> Images:
    """Random images of ten classes, in memory."""
    return Images(
        root=".",
        layout=_layout,
        decode=Center(size=SIDE),
        eval_decode=Center(size=SIDE),
    )


def _layout(root: Path, seed: int) -> dict[str, Split]:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Split] = {}
    for name, n in (("train", TRAIN), ("test", TEST)):
        shape = (n, 3, SIDE, SIDE)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.arange(n) % 10
        presence = Kept(2 * torch.nn.functional.one_hot(labels, 10) - 1)
        found[name] = Array(pixels, labels, tuple("abcdefghij"), {"presence": presence})
    return found


def plain(net: torch.nn.Module, source: Images, *, views: int = 0) -> None:
    """Every image once through the backbone, test images so many times more, and nothing else."""
    net.eval()
    with torch.no_grad():
        for split in ("train", "test", *["test"] * views):
            for batch in source.scan(split):
                net(images(batch["crops"][0], "cpu"))


def run(net: torch.nn.Module, source: Images, evals: Mapping[str, Any]) -> float:
    """A suite with a store of its own: the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"backbone": net, "data": source, "out": Path(folder), "seed": 0}
        return _seconds(lambda: evaluate(evals, pixels=False, **given))


def rows(rounds: int = 3) -> list[Row]:
    """The suite's features against a plain pass, and the suite against its parts.

    Args:
        rounds: of all sides, after one that is not counted.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    net, source = Counting(depth=18, width=WIDTH, stem="small"), data()
    source.setup("test")
    kinds = ("plain", "features", "plain views", "all", "all features", "one by one")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        timed = {name: Timed(evaluation) for name, evaluation in suite().items()}
        once = _seconds(lambda: plain(net, source))
        features = run(net, source, timed) - sum(e.spent for e in timed.values())
        timed = {name: Timed(evaluation) for name, evaluation in suite().items()}
        viewed = _seconds(lambda: plain(net, source, views=VIEWS))
        whole = run(net, source, {**timed, **looking()})
        heads = sum(e.spent for e in timed.values())
        apart = sum(run(net, source, {name: e}) for name, e in {**suite(), **looking()}.items())
        if turn:
            values = (once, features, viewed, whole, whole - heads, apart)
            for name, value in zip(times, values, strict=True):
                times[name].append(value)
    Counting.seen = 0
    run(net, source, {**suite(), **looking()})
    needed = TRAIN + TEST + VIEWS * TEST
    note = (
        f"ResNet-18 of width {WIDTH}, {TRAIN + TEST} images of {SIDE}x{SIDE}, one thread, CPU "
        f"time; median of {rounds} rounds; {', '.join(suite())}"
    )
    views = f"{', '.join(looking())}: {VIEWS} views (crops, patches, transforms) of each test image"
    return [
        Row(
            "the frozen suite without its heads' training / one plain forward pass",
            per_round(times["features"], times["plain"]),
            bar=BAR,
            better="low",
            ours=seconds(times["features"]),
            other=seconds(times["plain"]),
            note=note,
        ),
        Row(
            "with health, retrieval and invariance / one plain pass over images and views",
            per_round(times["all features"], times["plain views"]),
            bar=BAR,
            better="low",
            ours=seconds(times["all features"]),
            other=seconds(times["plain views"]),
            note=f"{note}; {views} that only these need, whose own work counts as ours",
        ),
        Row(
            "all of these / one by one",
            per_round(times["all"], times["one by one"]),
            better="low",
            ours=seconds(times["all"]),
            other=seconds(times["one by one"]),
            note=f"{note}; {', '.join(looking())}",
        ),
        Row(
            "with health, retrieval and invariance: images forwarded / images and views",
            [Counting.seen / needed],
            bar=BAR,
            better="low",
            ours=f"{Counting.seen:,} images",
            other=f"{needed:,} images",
            note=f"every image once; {views} that only these need; a count",
        ),
    ]


def _seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
