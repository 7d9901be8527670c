"""What loggers see of a run on several processes: means over them, where updates are logged."""

from types import SimpleNamespace

import pytest
import torch
from processes import on_processes

from unlabeled.dist import rank
from unlabeled.method import Method

pytestmark = [pytest.mark.ddp, pytest.mark.xdist_group("ddp")]


class Shares(Method):
    """Its loss is 1 in the first process, 2 in the next."""

    def __init__(self):
        backbone = torch.nn.Linear(1, 1)
        backbone.dim = 1
        super().__init__(backbone, lambda batch, draws: batch, None)

    def loss(self, batch):
        share = torch.tensor(1.0 + rank())
        self.note("accuracy", share / 10)
        return {"first": share, "second": 2 * share}


def logged():
    """Numbers of four updates of which every second one is logged, and what each step returns."""
    method, found = Shares(), []
    method.log = lambda name, value, **options: found[-1].update({name: value})
    for step in range(4):
        method._trainer = SimpleNamespace(log_every_n_steps=2, global_step=step)
        found.append({})
        found[-1]["returned"] = method.training_step({"step": step, "index": torch.zeros(2)}, 0)
    return found


def test_means_over_processes_are_logged():
    alone = logged()
    assert all(step["train/loss"] == 3 for step in alone)
    shares = on_processes(2, logged)
    for number, found in enumerate(shares, 1):
        assert [step["train/loss"].item() for step in found] == [3 * number, 4.5] * 2
        assert [step["train/first"].item() for step in found] == [number, 1.5] * 2
        assert [step["train/second"].item() for step in found] == [2 * number, 3] * 2
        accuracies = [step["train/accuracy"].item() for step in found]
        assert accuracies == pytest.approx([number / 10, 0.15] * 2)
        assert [step["returned"].item() for step in found] == [3 * number] * 4  # for the gradient
