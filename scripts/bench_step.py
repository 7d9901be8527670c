"""A training step in the framework against a bare loop."""

import contextlib
import copy
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from bench_rows import Row, per_round, seconds
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from unlabeled.cli import conf_dir
from unlabeled.data.decode import Center
from unlabeled.data.images import Images
from unlabeled.data.splits import Array, Split
from unlabeled.draws import Draws, shuffled
from unlabeled.methods.simclr import nt_xent
from unlabeled.train import _trainer

SIDE, IMAGES, LEAST = 32, 4096, 0.3  # the bar is for steps of so many seconds and more
BLOCK = 20  # steps of a round: as many as the rarest callback waits for
Clock = tuple[float, float]  # wall time, and the processor's spent in this process
RECIPE = [
    "experiment=cifar10/simclr",
    "backbone=resnet18_tiny",
    "trainer=cpu",
    "trainer.max_epochs=1000",
    "trainer.precision=32-true",
    "callbacks=default",
    "callbacks.checkpoint.every_n_epochs=null",  # saving is no part of a step
]


def pixels() -> Tensor:
    """As many random colour images as a few hundred steps' batches are drawn from."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


class Bare:
    """The training loop as a script would write it."""

    def __init__(self, method: Any, decode: Any, batch_size: int, steps: int) -> None:
        self.method, self.decode, self.batch_size = method.train(), decode, batch_size
        self.pixels = pixels()
        self.batches = IMAGES // batch_size
        made = method.optim(
            method, batch_size=batch_size, steps=steps, steps_per_epoch=self.batches
        )
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.steps = count()

    def step(self) -> None:
        step, b, method = next(self.steps), self.batch_size, self.method
        epoch, at = divmod(step, self.batches)
        if at == 0:
            self.order = shuffled(IMAGES, 0, "order", epoch)
        images = self.pixels[self.order[at * b : (at + 1) * b]]
        with torch.no_grad():
            crops = self.decode.batched(images, Draws(0, "crop", step, rows=b))
            batch = method.augment({"crops": crops}, Draws(0, "augment", step, rows=b))
        features = method.backbone(torch.cat(batch["views"]))
        first, second = F.normalize(method.projector(features), dim=1).chunk(2)
        loss = method.scale * nt_xent(first, second, method.temperature)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


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


def rows(rounds: int = 5) -> list[Row]:
    """A step of `Trainer`, `Method`, the default callbacks and `metrics.csv`, against `Bare`.

    Args:
        rounds: of some steps each, after one that is not counted.
    """
    batch_size = _batch_size()
    turns, _ = fit(batch_size, (rounds + 1) * BLOCK)
    note = (
        f"SimCLR, narrow ResNet-18, {SIDE}x{SIDE}, batch {batch_size}, float32, one thread, steps "
        f"in turns; median of {rounds} rounds of {BLOCK} steps"
    )
    name = "one training step: in the framework / bare PyTorch"
    return [
        _row(f"{name}, wall time", 1.05, turns, 0, note),
        _row(f"{name}, CPU time", None, turns, 1, note),
    ]


def fit(batch_size: int, steps: int, *more: str) -> tuple[Turns, Any]:
    """Trains one method in the framework and its copy in the bare loop, in turns.

    Args:
        batch_size: images.
        steps: of each.
        more: overrides of the config.

    Returns:
        the times, with the bare loop, and the method that the framework trained.
    """
    cfg = _config(*more, f"trainer.max_steps={steps}")
    decode, method = instantiate(cfg.decode), instantiate(cfg.method)
    turns = Turns(Bare(copy.deepcopy(method), decode, batch_size, steps))
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
        trainer = _trainer(cfg, SimpleNamespace(path=Path(folder)))  # type: ignore[arg-type]
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


def _batch_size() -> int:
    """The batch for which a step is not too short."""
    cfg, size = _config(), 16
    decode = instantiate(cfg.decode)
    while True:
        bare = Bare(instantiate(cfg.method), decode, size, 4)
        bare.step()
        start = time.process_time()
        bare.step()
        # some more, as a step that is slowed by chance must not choose a batch too small
        if time.process_time() - start >= 1.1 * LEAST or 4 * size > IMAGES:
            return size
        size *= 2
