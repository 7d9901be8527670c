"""Runs in real processes that are killed at random moments, and what they leave."""

import csv
import multiprocessing as mp
import os
import random
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils._pytree import tree_leaves

HEAVY = ["torch", "pytorch_lightning", "hydra.utils", "unlabeled.train", "unlabeled.method"]
HEAVY += ["unlabeled.folder", "unlabeled.evaluate.suite", "unlabeled.report.html", "sklearn.svm"]
HEAVY += ["unlabeled.callbacks.online", "unlabeled.callbacks.progress", "unlabeled.data.images"]
PATIENCE = 300.0  # seconds until a process that says nothing counts as hung
CLOCKS = ("perf/",)  # columns that measure time: never the same twice


def _live(config: str, out: Path, trained: Connection) -> None:
    """A process's whole life: one start of a run."""
    from unlabeled import train
    from unlabeled.method import Method

    os.setsid()  # so that workers can be found that a kill left behind
    said = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of its workers: as in a process of its own
    order = os.open(out.with_suffix(".order"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    on_train_start = Method.on_train_start

    def started(self: Method) -> None:
        on_train_start(self)
        trained.send_bytes(b"steps from here")

    def meets(self: Method, batch: Any, batch_idx: int) -> None:
        os.write(order, f"{batch['step']}: {batch['index'].tolist()}\n".encode())

    Method.on_train_start, Method.on_train_batch_start = started, meets
    sys.argv = ["unlabeled"]
    train.run(OmegaConf.create(config), out)  # type: ignore[arg-type]


class Lives:
    """Starts one run again and again.

    Args:
        config: the composed config, as YAML.
        out: the run's folder; what its processes say and read lies beside it.
    """

    def __init__(self, config: str, out: Path) -> None:
        self.config, self.out = config, out
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(HEAVY)  # else every start imports for seconds

    def start(self) -> tuple[Any, Connection]:
        """A process, and where it tells that its first step is next."""
        here, there = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_live, args=(self.config, self.out, there))
        process.start()
        there.close()
        return process, here

    def whole(self) -> tuple[float, float]:
        """Lets it live to its end; seconds until the first step, and from there."""
        began = time.monotonic()
        process, tells = self.start()
        first = time.monotonic() if _told(tells) else began
        process.join(PATIENCE)
        assert process.exitcode == 0, self.said()
        return first - began, time.monotonic() - first

    def killed(self, kills: int, seconds: tuple[float, float], rng: random.Random) -> int:
        """Kills it at up to so many random moments, a fifth of them before its first step.

        `seconds` are those of `whole`: moments are chosen so that it rarely ends before.
        Gives the number of kills that met it alive.
        """
        done, groups = 0, []
        for _ in range(kills):
            process, tells = self.start()
            groups.append(process.pid)
            if rng.random() < 0.2:
                time.sleep(rng.uniform(0, seconds[0]))
            elif _told(tells):
                time.sleep(rng.uniform(0, 1.2 * seconds[1] / kills))
            process.kill()
            process.join(PATIENCE)
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, self.said()
            done += 1
        for group in groups:
            # A worker that was forked as its parent died waits for ever.
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        return done

    def said(self) -> str:
        """What its processes printed."""
        return self.out.with_suffix(".log").read_text()


def _told(tells: Connection) -> bool:
    """Waits until training starts; False if the process ended instead."""
    try:
        return tells.poll(PATIENCE) and bool(tells.recv_bytes())
    except EOFError:
        return False


def same(whole: Path, killed: Path) -> None:
    """Asserts that two runs ended alike, bit for bit, whatever interrupted the second."""
    saved = [torch.load(x / "checkpoints/last.ckpt", weights_only=True) for x in (whole, killed)]
    for content in saved:
        content["callbacks"] = {
            name: state for name, state in content["callbacks"].items() if "Throughput" not in name
        }
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        first, second = (tree_leaves(content[part]) for content in saved)
        assert len(first) == len(second), part
        for a, b in zip(first, second, strict=True):
            equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert equal, f"{part} differs"
    assert saved[0]["state_dict"].keys() == saved[1]["state_dict"].keys()
    assert rows(whole) == rows(killed)
    expected = _order(whole)
    for step, index in _lines(killed):
        assert expected[step] == index, f"batch {step} is of other images"
    assert _order(killed).keys() == expected.keys()


def rows(run: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv` in their order, without what a clock measured."""
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {name: cell for name, cell in row.items() if not name.startswith(CLOCKS)}
            for row in csv.DictReader(file)
        ]


def _lines(run: Path) -> list[tuple[int, str]]:
    pairs = (line.split(": ") for line in run.with_suffix(".order").read_text().splitlines())
    return [(int(step), index) for step, index in pairs]


def _order(run: Path) -> dict[int, str]:
    return dict(_lines(run))
