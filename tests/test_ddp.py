"""Whole runs in two processes against one, by the command line."""

import csv
import json
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.ddp, pytest.mark.xdist_group("ddp")]

RUN = [
    *("backbone.width=16", "backbone.norm=sync", "data.batch_size=16", "data.limit=64"),
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"),
    *(
        "trainer.max_epochs=1",
        "trainer.log_every_n_steps=1",
        "callbacks=none",
        "evals=knn",
        "optim@method.optim=sgd",
    ),
    "method.optim.lr=0.01",  # small: rounding must not grow over the four updates
]


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_two_processes_train_as_one_does(method, tmp_path):
    states, losses, scores = [], [], []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        lines = [f"method={method}", "method.hidden=32", f"trainer.devices={devices}", *RUN]
        command = [sys.executable, "-m", "unlabeled.train", *lines, f"hydra.run.dir={out}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        checkpoint = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 4
        states.append(checkpoint["state_dict"])
        scores.append(json.loads((out / "scores.json").read_text()))
        with (out / "metrics.csv").open() as file:
            losses.append([float(row["train/loss"]) for row in csv.DictReader(file)])
    assert len(losses[0]) == 4
    if method == "simclr":  # of the global batch; BYOL's is logged for the first process's share
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    first, second = states
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=1e-2, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}"
        )
    assert scores[0].keys() == scores[1].keys()
