"""Photographs at 224: the workers' half against whole pipelines, the device's against kornia."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import bench_decode
import torch
from bench_augment import CONF, kornia_ops
from bench_peers import SIDE, Pair, lightly_views, solo_views
from bench_rows import Row, per_round
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from unlabeled.batch import normalize
from unlabeled.data.decode import Crops
from unlabeled.data.layouts import Folder
from unlabeled.data.reading import TrainingRows
from unlabeled.draws import Draws

IMAGES, DEVICE_BATCH = 64, 32


def photographs(root: Path, count: int = IMAGES) -> str:
    """`count` JPEGs of about 500x375, as large as ImageNet's, in two folders.

    Pascal VOC's, where `UNLABELED_DATA` has them, over and over if they are few; else made-up ones
    that cost a decoder about as much. Returns which.
    """
    real = bench_decode.photographs("VOCdevkit")
    made = real or bench_decode.noise()
    for i in range(count):
        place = root / "train" / "ab"[i % 2] / f"{i:05}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(made[i % len(made)])
    return "JPEGs of Pascal VOC" if real else "JPEGs of noise"


def rows(root: Path, rounds: int = 5, images: int = 16) -> list[Row]:
    """Views per second and core.

    Args:
        root: an empty folder.
        rounds: turns of every way, after one that is not counted.
        images: of a turn.
    """
    return [*worker_rows(root, rounds, images), *device_rows(rounds)]


def worker_rows(root: Path, rounds: int, images: int) -> list[Row]:
    """From JPEGs to batches, in a worker: crops here, finished views elsewhere."""
    which = photographs(root, IMAGES)
    split = Folder()(root, 0)["train"]
    ours = TrainingRows(split, Crops(size=SIDE, count=2), 0, 1)
    turns = iter(range(1 << 40))

    def crops() -> int:
        turn = next(turns)
        keys = [(i % len(split), turn, turn) for i in range(turn * images, (turn + 1) * images)]
        return len(ours[keys][0]["crops"]) * images  # type: ignore[index]

    ways: dict[str, Callable[[], int]] = {"ours": crops}
    absent: dict[str, str] = {}
    for name, build in {"lightly": lightly_views, "solo-learn, rebuilt": solo_views}.items():
        try:
            ways[name] = _pipeline(build(), root, images)
        except ImportError as error:
            absent[name] = str(error)
    note = (
        f"{which}, one core, {images} images a turn; median of {rounds} "
        f"rounds of CPU time; theirs include colours and blur, which here are the device's"
    )
    return _compared(
        "JPEG to two crops at 224: a worker / the Pillow pipeline of",
        ways,
        absent,
        5.0,
        note,
        rounds,
    )


def _pipeline(views: Pair, root: Path, images: int) -> Callable[[], int]:
    files = sorted((root / "train").rglob("*.jpg"))
    position = iter(range(1 << 40))

    def way() -> int:
        made = []
        for _ in range(images):
            with Image.open(files[next(position) % len(files)]) as image:
                made.append(views(image.convert("RGB")))
        return sum(len(torch.stack(list(view))) for view in zip(*made, strict=True))

    return way


def device_rows(rounds: int) -> list[Row]:
    """SimCLR's colours and blur of one batch of crops, with normalisation."""
    recipe = OmegaConf.load(CONF / "simclr.yaml")
    views = instantiate(recipe)
    generator = torch.Generator().manual_seed(0)
    shape = (2, DEVICE_BATCH, 3, SIDE, SIDE)
    crops = list(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    step = iter(range(1 << 40))

    def ours() -> int:
        draws = Draws(0, "bench", next(step), rows=DEVICE_BATCH)
        return sum(map(len, views({"crops": list(crops)}, draws)["views"]))

    ways: dict[str, Callable[[], int]] = {"ours": ours}
    absent: dict[str, str] = {}
    try:
        chain = nn.Sequential(*kornia_ops(recipe, SIDE))
    except ImportError as error:
        absent["kornia"] = str(error)
    else:
        ways["kornia"] = lambda: sum(len(normalize(chain(x.float() / 255))) for x in crops)
    note = (
        f"flip, jitter, grey, blur of 23 pixels and normalisation of uint8 crops at 224, batch "
        f"{DEVICE_BATCH}, one thread; median of {rounds} rounds of CPU time"
    )
    return _compared("the device's half at 224: here /", ways, absent, 2.0, note, rounds)


def _compared(
    title: str,
    ways: Mapping[str, Callable[[], int]],
    absent: Mapping[str, str],
    bar: float,
    note: str,
    rounds: int,
) -> list[Row]:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            made = way()
            if turn:
                rates[name].append(made / (time.process_time() - start))
    found = [Row(f"{title} {name}", note=f"skipped: {why}") for name, why in absent.items()]
    for name in list(ways)[1:]:
        ratios = per_round(rates["ours"], rates[name])
        said = {"ours": _rate(rates["ours"]), "other": _rate(rates[name]), "note": note}
        found.append(Row(f"{title} {name}", ratios, bar=bar, **said))
    return found


def _rate(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:,.0f} views/s"
