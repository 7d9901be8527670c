"""How cost grows with batch, crops, workers and images: worse than in proportion shows.

A row's ratio is the cost of one item (image, crop, file) at the largest size over that at the
smallest: 1 where cost is in proportion, below it where a fixed cost is spread, and about the
factor between the sizes where cost is quadratic.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from bench_augment import CONF
from bench_loops import SimCLR
from bench_photos import photographs
from bench_rows import Row, per_round
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from unlabeled.cli import conf_dir
from unlabeled.data.decode import Center, Crops
from unlabeled.data.files import walk
from unlabeled.data.images import Images
from unlabeled.data.layouts import Folder
from unlabeled.draws import Draws
from unlabeled.evaluate.knn import search
from unlabeled.parts.clustering import kmeans_alone

MOST = 1.5  # the cost of an item may grow by this factor: caches end, noise remains
BATCHES, CROPS, WORKERS, IMAGES = (64, 256, 1024), (2, 4, 8), (0, 1, 2), (10_000, 30_000, 100_000)
Work = Callable[[], object]


def rows(rounds: int = 3) -> list[Row]:
    """A row for everything that grows.

    Args:
        rounds: turns of all sizes, after one that is not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        works: dict[str, tuple[str, Mapping[int, Work]]] = {
            "a step of SimCLR, by batch": ("images", {n: step(n) for n in BATCHES}),
            "crops and views, by crops": ("crops", {n: views(n) for n in CROPS}),
            "kNN, by images": ("images", {n: neighbours(n) for n in IMAGES}),
            "k-means, by images": ("images", {n: clusters(n) for n in IMAGES}),
            "the index of a folder, by files": (
                "files",
                {n: listing(root / f"files{n}", n) for n in IMAGES},
            ),
        }
        found = [grown(name, *given, rounds) for name, given in works.items()]
        return [*found, *workers(root / "photographs", rounds)]


def grown(name: str, item: str, works: Mapping[int, Work], rounds: int) -> Row:
    """The row of one work of several sizes."""
    spent: dict[int, list[float]] = {n: [] for n in works}
    for turn in range(rounds + 1):
        for n, work in works.items():
            start = time.process_time()
            work()
            if turn:
                spent[n].append(time.process_time() - start)
    least, most = min(works), max(works)
    each = {n: [t / n for t in times] for n, times in spent.items()}
    return Row(
        f"{name}: an item's cost at {most:,} / at {least:,}",
        per_round(each[most], each[least]),
        bar=MOST,
        better="low",
        ours=_each(each[most], item),
        other=_each(each[least], item),
        note=f"one thread; median of {rounds} rounds of CPU time",
        curve=[(n, statistics.median(times)) for n, times in spent.items()],
    )


def _each(times: Sequence[float], item: str) -> str:
    return f"{statistics.median(times) * 1e6:,.1f} µs for each of {item}"


def step(batch_size: int) -> Work:
    """A training step with a tiny backbone, so that the loss is not lost beside it."""
    overrides = ["experiment=cifar10/simclr", "backbone.width=8"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=overrides)
    pixels = torch.randint(0, 256, (max(BATCHES), 3, 32, 32), dtype=torch.uint8)
    return SimCLR(instantiate(cfg.method), instantiate(cfg.decode), pixels, batch_size, 1000).step


def views(count: int) -> Work:
    """Crops and their views of 128 images."""
    recipe = OmegaConf.load(CONF / "simclr.yaml")
    recipe.repeat = [count]
    augment, decode = instantiate(recipe), Crops(size=32, count=count)
    pixels = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8)

    def work() -> object:
        draws = Draws(0, "bench", rows=len(pixels))
        return augment({"crops": decode.batched(pixels, draws.fork("crop"))}, draws)

    return work


def neighbours(count: int) -> Work:
    """The 20 nearest of `count` rows for 500 others."""
    bank, queries = torch.randn(count, 64), torch.randn(500, 64)
    return lambda: search(queries, bank, 20)


def clusters(count: int) -> Work:
    """Five iterations over all rows: faiss samples above 256 rows of a cluster."""
    x = torch.randn(count, 32)
    return lambda: kmeans_alone(x, max(IMAGES) // 250, iterations=5)


def listing(root: Path, count: int) -> Work:
    """A walk over `count` empty files, a hundred in a folder."""
    for i in range(count):
        place = root / str(i // 100)
        if i % 100 == 0:
            place.mkdir(parents=True)
        (place / f"{i}.jpg").touch()
    return lambda: walk(root)


def workers(root: Path, rounds: int) -> list[Row]:
    """Images per second from JPEGs with several workers against none, in wall time."""
    photographs(root)
    rates: dict[int, list[float]] = {n: [] for n in WORKERS}
    for turn in range(rounds + 1):
        for n in WORKERS:
            data = Images(
                root=str(root),
                layout=Folder(test_share=0.0),
                decode=Crops(size=224, count=2),
                eval_decode=Center(size=224),
                batch_size=8,
                workers=n,
            )
            data.setup("fit")
            start = time.perf_counter()
            read = sum(len(batch["index"]) for batch in data.train_dataloader())
            if turn:
                rates[n].append(read / (time.perf_counter() - start))
    some = max(WORKERS)
    text = {n: f"{statistics.median(values):,.0f} images/s" for n, values in rates.items()}
    return [
        Row(
            f"JPEGs to crops: {some} workers / none",
            per_round(rates[some], rates[0]),
            ours=text[some],
            other=text[0],
            note=f"64 images with the workers' start, in wall time ({text[1]} with one); "
            f"median of {rounds} rounds",
            curve=[(n, 1 / statistics.median(values)) for n, values in rates.items()],
        )
    ]
