"""Images per second from files to updates: this package against other frameworks' recipes.

SimCLR, ResNet-18, crops of 224 from JPEGs, and one core that reads, augments and trains, so that
nobody's workers run while another is measured. Each framework as a user starts it on a CPU: here
`trainer.precision=auto`, which takes bfloat16 and channels_last where the CPU computes it fast,
there float32. A second row gives the peer bfloat16 and channels_last too: what is left is the
input. `bench_peers` lists the peers' settings.
"""

import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from bench_peers import SIDE, Peer, lightly_loop, solo_loop
from bench_photos import photographs
from bench_rows import Row, per_round
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from unlabeled.callbacks.metrics import MetricsCSV
from unlabeled.cli import conf_dir
from unlabeled.train import _trainer

BATCH, BAR = 16, 2.0
PEERS: dict[str, Callable[..., Peer]] = {"lightly": lightly_loop, "solo-learn, rebuilt": solo_loop}
RECIPE = [
    "method=simclr",
    "backbone=resnet18",
    "data=folder",
    "data.workers=0",
    "data.tier=folder",
    "optim@method.optim=sgd",
    "trainer=cpu",
    "callbacks.checkpoint.every_n_epochs=null",  # saving is no part of a step
]


class Turns(pl.Callback):
    """After every step of the framework, one of each peer; CPU seconds of all."""

    def __init__(self, peers: Mapping[str, Peer]) -> None:
        self.peers = peers
        self.spent: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.spent["ours"].append(time.process_time() - self._start)
        for name, peer in self.peers.items():
            start = time.process_time()
            peer.step()
            self.spent[name].append(time.process_time() - start)
        self._start = time.process_time()


def rows(rounds: int = 4) -> list[Row]:
    """Ours against each peer as it is, and against the same peer in bfloat16.

    Args:
        rounds: steps of each, after one that is not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "photographs")
        which = photographs(root, (rounds + 2) * BATCH)
        peers, absent = {}, {}
        for name, build in PEERS.items():
            for said, bf16 in ((name, False), (f"{name}, in bfloat16 too", True)):
                try:
                    peers[said] = build(root / "train", BATCH, bf16=bf16)
                except ImportError as error:
                    absent[said] = str(error)
        spent, precision = train(Turns(peers), root, Path(folder), rounds + 1)
    note = (
        f"SimCLR, ResNet-18, {SIDE}x{SIDE}, batch {BATCH}, {which}, one core does all, "
        f"ours {precision}; median of {rounds} steps' CPU time"
    )
    title = "from files to updates, images/s: here /"
    found = [Row(f"{title} {name}", note=f"skipped: {why}") for name, why in absent.items()]
    rates = {name: [BATCH / t for t in times[1:]] for name, times in spent.items()}
    for name in peers:
        bar = None if "bfloat16" in name else BAR
        ratios = per_round(rates["ours"], rates[name])
        said = {"ours": _rate(rates["ours"]), "other": _rate(rates[name]), "note": note}
        found.append(Row(f"{title} {name}", ratios, bar=bar, **said))
    return found


def train(
    turns: Turns, root: Path, out: Path, steps: int, *more: str
) -> tuple[dict[str, list[float]], str]:
    """Seconds of every step of each side, and the precision that was chosen here."""
    given = [f"data.root={root}", f"data.batch_size={BATCH}", f"trainer.max_steps={steps}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=[*RECIPE, *given, *more])
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data, method = instantiate(cfg.data), instantiate(cfg.method)
        trainer = _trainer(cfg, out, [MetricsCSV(out)])
        trainer.callbacks.append(turns)  # type: ignore[attr-defined]
        trainer.fit(method, data)
    return turns.spent, str(trainer.precision)


def _rate(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.1f} images/s"
