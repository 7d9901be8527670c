"""Runs killed with SIGKILL at random moments end as if nothing had happened, bit for bit."""

import random

import pytest
from conftest import METHODS, RECORDINGS, small
from lives import Lives, rows, same
from omegaconf import OmegaConf

EVERYTHING = [
    *("callbacks=default", "callbacks.health.every_n_steps=1", "callbacks.held_out.limit=32"),
    *("callbacks.learning_rate.every_n_steps=2", "callbacks.throughput.every_n_steps=2"),
    *("callbacks.held_out.every_n_epochs=2", "callbacks.checkpoint.every_n_steps=3"),
    *("trainer.log_every_n_steps=1", "trainer.precision=32-true", "trainer.max_epochs=6"),
    *("data.tier=folder", "data.workers=2"),
]


@pytest.fixture
def config(compose, source, teacher):
    """A function: method, more overrides -> the config of a tiny run with workers, as YAML."""

    def composed(method, *more):
        own = {"clusterfit": [f"method.source.path={source}"]}
        own["distillation"] = [f"method.teacher.path={teacher}"]
        lines = [*small(method), *own.get(method, []), *EVERYTHING, *more]
        if method in RECORDINGS:  # which have one tier
            lines.remove("data.tier=folder")
        last = {line.partition("=")[0]: line for line in lines}  # the later ones win
        cfg = compose(*(line for line in lines if last[line.partition("=")[0]] is line))
        return OmegaConf.to_yaml(cfg, resolve=True)

    return composed


def outlives(config, folder, kills, seed):
    """Kills a run again and again, until it was killed so often, and compares each time."""
    rng, alive = random.Random(seed), 0
    whole = Lives(config, folder / "whole")
    seconds = whole.whole()
    for attempt in range(kills):
        lives = Lives(config, folder / f"killed{attempt}")
        alive += lives.killed(kills - alive, seconds, rng)
        lives.whole()
        same(folder / "whole", folder / f"killed{attempt}")
        if alive == kills:
            break
    assert alive == kills
    return rows(folder / "whole")


def test_five_kills(config, tmp_path):
    found = outlives(config("moco_v2"), tmp_path, kills=5, seed=0)
    assert [int(row["step"]) for row in found] == list(range(24))
    assert all(float(row["train/loss"]) for row in found)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_twenty_kills_of_every_method(config, tmp_path, method):
    outlives(config(method), tmp_path, kills=20, seed=METHODS.index(method))
