"""Training steps of five methods in the framework against bare loops."""

import contextlib
import copy
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from bench_loops import BYOL, PIRL, Bare, MoCo, SimCLR, SwAV
from bench_rows import Row, per_round, seconds
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from unlabeled.callbacks.metrics import MetricsCSV
from unlabeled.cli import conf_dir
from unlabeled.data.decode import Center
from unlabeled.data.images import Images
from unlabeled.data.splits import Array, Split
from unlabeled.train import _trainer

SIDE, IMAGES, BATCH, BAR = 32, 4096, 128, 1.03
BLOCK = 20  # steps of a round: as many as the rarest callback waits for
Clock = tuple[float, float]  # wall time, and the processor's spent in this process
RECIPE = [
    "backbone=resnet18_tiny",
    "trainer=cpu",
    "trainer.max_epochs=1000",
    "trainer.precision=32-true",
    "callbacks=default",
    "callbacks.checkpoint.every_n_epochs=null",  # saving is no part of a step
]
# Each with the settings of its experiment, but for what a bare loop has no use for.
LOOPS: dict[str, tuple[str, type[Bare], list[str]]] = {
    "simclr": ("SimCLR", SimCLR, []),
    "moco_v2": ("MoCo v2", MoCo, ["method.shuffle_bn=false", "backbone.bn_splits=1"]),
    "byol": ("BYOL", BYOL, []),
    "swav": (
        "SwAV 2+6",
        SwAV,
        [
            "decode.parts.local.count=6",
            "method.augment.repeat=[8]",
            "method.epsilon=0.05",
            "method.freeze=0",
        ],
    ),
    "pirl": ("PIRL", PIRL, []),
}


def pixels() -> Tensor:
    """As many random colour images as a few hundred steps' batches are drawn from."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


class Turns(pl.Callback):
    """Stops the framework after every step, for a step of the bare loop.

    A step of the framework lasts from here to here, so that all it does between two steps
    counts, other callbacks and loggers included.
    """

    def __init__(self, bare: Bare) -> None:
        self.bare = bare
        self.ours: list[Clock] = []
        self.other: list[Clock] = []
        self._start = _now()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.ours.append(_since(self._start))
        start = _now()
        self.bare.step()
        self.other.append(_since(start))
        self._start = _now()


def _now() -> Clock:
    return time.perf_counter(), time.process_time()


def _since(start: Clock) -> Clock:
    wall, cpu = _now()
    return wall - start[0], cpu - start[1]


def _rounds(clocks: Sequence[Clock], which: int) -> list[float]:
    """The mean step of every round but the first."""
    times = [clock[which] for clock in clocks]
    starts = range(BLOCK, len(times), BLOCK)
    return [sum(times[i : i + BLOCK]) / BLOCK for i in starts]


def rows(rounds: int = 2) -> list[Row]:
    """A step of `Trainer`, `Method`, the default callbacks and `metrics.csv`, against `Bare`.

    Args:
        rounds: of some steps each, after one that is not counted.
    """
    found = []
    for name, (title, *_) in LOOPS.items():
        turns, _ = fit(name, BATCH, (rounds + 1) * BLOCK)
        note = (
            f"narrow ResNet-18, {SIDE}x{SIDE}, batch {BATCH}, float32, one thread, steps in "
            f"turns; median of {rounds} rounds of {BLOCK} steps"
        )
        for which, clock in enumerate(("wall", "CPU")):
            bar = BAR if which else None  # on a busy machine wall time is chance
            title_of_row = f"a step of {title}: in the framework / bare PyTorch, {clock} time"
            found.append(_row(title_of_row, bar, turns, which, note))
    return found


def fit(name: str, batch_size: int, steps: int, *more: str) -> tuple[Turns, Any]:
    """Trains a method in the framework and its copy in the bare loop, in turns.

    Args:
        name: of the method, in `LOOPS`.
        batch_size: images.
        steps: of each.
        more: overrides of the config.

    Returns:
        the times, with the bare loop, and the method that the framework trained.
    """
    _, loop, settings = LOOPS[name]
    cfg = _config(f"experiment=cifar10/{name}", *settings, *more, f"trainer.max_steps={steps}")
    decode, method = instantiate(cfg.decode), instantiate(cfg.method)
    turns = Turns(loop(copy.deepcopy(method), decode, pixels(), batch_size, steps))
    data = Images(
        root=".",
        layout=_layout,
        decode=decode,
        eval_decode=Center(size=SIDE),
        batch_size=batch_size,
    )
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        out = Path(folder)
        trainer = _trainer(cfg, out, [MetricsCSV(out)])
        trainer.callbacks.append(turns)  # type: ignore[attr-defined]
        trainer.fit(method, data)
    return turns, method


def _config(*more: str) -> Any:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=[*RECIPE, *more])


def _row(name: str, bar: float | None, turns: Turns, which: int, note: str) -> Row:
    ours, other = _rounds(turns.ours, which), _rounds(turns.other, which)
    said = {"ours": seconds(ours), "other": seconds(other), "note": note}
    return Row(name, per_round(ours, other), bar=bar, better="low", **said)


def _layout(root: Path, seed: int) -> dict[str, Split]:
    return {"train": Array(pixels(), None, ())}
