"""Gradients added over batches, and activations computed again, in whole runs."""

import pytest
import torch
import torch.nn.functional as F
from test_ddp import in_double
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from unlabeled.batch import normalize
from unlabeled.methods.simclr import nt_xent

WHOLE = ["decode=mild", "decode.scale=[1.0,1.0]", "decode.ratio=[1.0,1.0]"]  # no random crop


class AsTheyAre(nn.Module):
    """Views that are the crops, so that a batch's halves are what they are in it."""

    def forward(self, batch, draws):
        return {**batch, "views": [normalize(crop) for crop in batch["crops"]]}


def trained(tiny, *more):
    """Weights and buffers after two epochs of four batches of 16, or of as many halves."""
    lines = ["optim@method.optim=sgd", "method.optim.lr=0.05", *more]
    method, data, trainer = tiny("supervised", *lines, precision="64-true")
    method.augment = AsTheyAre()
    hook = register_module_forward_pre_hook(in_double)
    try:
        trainer.fit(method, data)
    finally:
        hook.remove()
    return {k: v.clone() for k, v in method.state_dict().items()}, trainer.global_step


def test_halves_of_a_batch_accumulate_to_its_gradient(tiny):
    still = ["backbone.norm=group", *WHOLE]
    whole, updates = trained(tiny, *still)
    halves, same = trained(tiny, *still, "data.batch_size=8", "trainer.accumulate_grad_batches=2")
    other, _ = trained(tiny, *still, "data.batch_size=8", "method.optim.lr=0.1")
    assert updates == same == 8
    for key, value in whole.items():
        torch.testing.assert_close(
            halves[key], value, rtol=1e-7, atol=1e-8, msg=lambda s, k=key: f"{k}: {s}"
        )
    assert any((other[key] - v).abs().max() > 1e-3 for key, v in whole.items())


def test_an_epochs_last_update_may_have_fewer_batches(tiny):
    """Five batches, two at a time, are three updates: a rate that moves by epochs knows them."""
    step = [f"method.optim.{x}" for x in ("schedule=step", "milestones=[0.25]", "warmup=0")]
    lines = ["data.limit=80", "trainer.max_epochs=4", "trainer.accumulate_grad_batches=2"]
    method, data, trainer = tiny("rotation", *lines, *step, "method.optim.interval=epoch")
    rates = []
    method.after_step = lambda: rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    trainer.fit(method, data)
    assert rates == pytest.approx([rates[0]] * 3 + [0.1 * rates[0]] * 9)


def test_halves_of_a_batch_have_other_negatives():
    """Why a loss that compares images accumulates to another one: docs/scale.md."""
    z = F.normalize(torch.randn(2, 16, 8, dtype=torch.float64), dim=2).requires_grad_()
    whole = nt_xent(z[0], z[1], 0.1)
    halves = (nt_xent(z[0, :8], z[1, :8], 0.1) + nt_xent(z[0, 8:], z[1, 8:], 0.1)) / 2
    assert halves < whole  # 14 negatives instead of 30
    ours, theirs = (torch.autograd.grad(x, z)[0] for x in (whole, halves))
    assert (ours - theirs).norm() > 0.1 * ours.norm()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_computing_activations_again_changes_no_run(tiny, accumulated):
    more = [f"trainer.accumulate_grad_batches={accumulated}", *WHOLE]
    kept, _ = trained(tiny, *more)
    again, _ = trained(tiny, *more, "backbone.checkpoint_activations=true")
    counts = [v for k, v in again.items() if k.endswith("num_batches_tracked")]
    assert len(counts) > 10
    assert all(count == 8 for count in counts)  # once for each batch, not for its backward too
    for key, value in kept.items():
        torch.testing.assert_close(again[key], value, rtol=1e-7, atol=1e-8, msg=key)
