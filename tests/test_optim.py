"""Optimizers against their formulas, schedules at their corners."""

import math

import pytest
import torch
from torch import nn

from unlabeled.lars import LARS
from unlabeled.optim import Optim, cosine


def build(steps=100, batch_size=512, **kwargs):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optim = Optim(lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9), **kwargs)
    made = optim(module, batch_size=batch_size, steps=steps, steps_per_epoch=10)
    return made["optimizer"], made["lr_scheduler"]["scheduler"], module


def rates(optimizer, schedule, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_with_warm_up_and_linear_scaling():
    lr = rates(*build(lr=0.1, warmup=0.1, final=0.01)[:2], 101)
    assert lr[0] == 0
    assert lr[5] == pytest.approx(0.1)  # half of 0.2, the rate for 512 images
    assert lr[10] == pytest.approx(0.2)
    assert lr[55] == pytest.approx(0.2 * (0.01 + 0.99 / 2))
    assert lr[100] == pytest.approx(0.2 * 0.01)


def test_steps_by_epoch_and_square_root_scaling():
    lr = rates(*build(lr=0.1, scaling="sqrt", schedule="step", milestones=[0.5, 0.75])[:2], 100)
    peak = 0.1 * math.sqrt(2)
    assert lr[49] == pytest.approx(peak)
    assert lr[50] == pytest.approx(peak / 10)
    assert lr[75] == pytest.approx(peak / 100)
    by_epoch = rates(*build(lr=0.1, interval="epoch")[:2], 100)
    assert len(set(by_epoch)) == 10
    assert by_epoch[10] == by_epoch[19] < by_epoch[9]


def test_biases_and_norms_are_left_out_of_decay():
    optimizer, _, module = build(lr=0.1, weight_decay=1e-3, decay_all=False, norm_bias_lr=0.01)
    groups = {g["params"][0].ndim: g for g in optimizer.param_groups}
    assert groups[2]["weight_decay"] == 1e-3
    assert groups[2]["adapt"]
    assert groups[1]["weight_decay"] == 0
    assert not groups[1]["adapt"]
    assert groups[1]["lr"] == pytest.approx(0.02)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(module.parameters()))


def test_biases_may_decay_where_norms_do_not():
    optimizer, _, module = build(lr=0.1, weight_decay=1e-3, decay_all=False, decay_biases=True)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[id(p)] for p in module[0].parameters()] == [1e-3, 1e-3]
    assert [decays[id(p)] for p in module[1].parameters()] == [0, 0]


def test_decay_may_differ_by_part():
    optim = {"lr": 0.1, "weight_decay": 1e-3, "decay_factors": {"0": 5.0, "1.bias": 0.0}}
    optimizer, _, module = build(**optim, decay_all=True, weight_decay_end=2e-3, steps=10)

    def decays():
        found = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        return [found[id(p)] for p in module.parameters()]

    assert decays() == [5e-3, 5e-3, 1e-3, 0]
    optimizer.step()
    assert decays() == [5e-3, 5e-3, 1e-3, 0]  # the first of ten: still at the start
    with pytest.raises(ValueError, match=r"'nowhere'.*trained are \['0', '1'\]"):
        build(lr=0.1, decay_factors={"nowhere": 2.0})
    with pytest.raises(ValueError, match=r"must not be negative, got \{'0': -1"):
        build(lr=0.1, decay_factors={"0": -1.0})


def test_a_constant_part_keeps_its_rate():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "predictor": nn.Linear(2, 2)})
    optim = Optim(lambda g: torch.optim.SGD(g, lr=1), lr=0.1, constant=["predictor"])
    made = optim(module, batch_size=256, steps=10, steps_per_epoch=5)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for _ in range(10):
        optimizer.step()
        schedule.step()
    fixed = {id(p) for p in module["predictor"].parameters()}
    for group in optimizer.param_groups:
        constant = id(group["params"][0]) in fixed
        assert group["lr"] == pytest.approx(0.1 if constant else 0, abs=1e-9)


def test_weight_decay_follows_a_cosine_and_goes_on_after_a_checkpoint():
    def make():
        return build(lr=0.1, weight_decay=0.04, weight_decay_end=0.4, decay_all=False)[:2]

    def decays(optimizer, schedule, steps):
        found = []
        for _ in range(steps):
            optimizer.step()
            found.append({g["params"][0].ndim: g["weight_decay"] for g in optimizer.param_groups})
            schedule.step()
        return found

    optimizer, schedule = make()
    whole = decays(optimizer, schedule, 100)
    assert whole[0] == {2: pytest.approx(0.04), 1: 0.0}
    assert whole[50] == {2: pytest.approx(0.22), 1: 0.0}
    assert whole[99][2] == pytest.approx(0.4, abs=1e-4)
    first = make()
    decays(*first, 37)
    second = make()
    for part, saved in zip(second, first, strict=True):
        part.load_state_dict(saved.state_dict())
    assert decays(*second, 63) == whole[37:]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"lr": 0}, "lr"),
        ({"lr": 1, "warmup": 1}, "warmup"),
        ({"lr": 1, "schedule": "cosin"}, "cosin"),
        ({"lr": 1, "scaling": "log"}, "log"),
        ({"lr": 1, "weight_decay": -1}, "weight_decay"),
        ({"lr": 1, "weight_decay_end": -1}, "weight_decay_end must not be negative, got -1"),
        ({"lr": 1, "milestones": [30]}, "30"),
        ({"lr": 1, "reference_batch": 0}, "reference_batch must be positive, got 0"),
        ({"lr": 1, "gamma": 0}, "gamma must be positive, got 0"),
        ({"lr": 1, "final": 1.5}, r"final is a share of lr, in \[0, 1\], got 1.5"),
        ({"lr": 1, "warmup_start": -0.1}, "warmup_start is a share"),
        ({"lr": 1, "norm_bias_lr": 0}, "norm_bias_lr must be positive"),
        ({"lr": 1, "interval": "epochs"}, "'epochs'"),
    ],
)
def test_bad_values_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        Optim(torch.optim.SGD, **bad)


@pytest.mark.parametrize("inside", [True, False])
def test_lars_is_its_formula(inside):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 3))
    b = nn.Parameter(torch.randn(3))
    zero = nn.Parameter(torch.zeros(2, 2))
    groups = [
        {"params": [w, zero], "weight_decay": 0.1},
        {"params": [b], "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = LARS(groups, lr=0.5, momentum=0.9, eta=0.02, lr_in_momentum=inside)
    ref = [p.detach().clone() for p in (w, b, zero)]
    velocity = [torch.zeros_like(p) for p in ref]
    for step in range(3):
        lr = 0.5 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in (w, b, zero):
            p.grad = torch.randn_like(p)
        for i, (p, adapt) in enumerate(((w, True), (b, False), (zero, True))):
            g = p.grad.clone()
            if adapt:
                g += 0.1 * ref[i]
                if ref[i].norm() > 0 and g.norm() > 0:
                    g *= 0.02 * ref[i].norm() / g.norm()
            velocity[i] = 0.9 * velocity[i] + (lr * g if inside else g)
            ref[i] = ref[i] - (velocity[i] if inside else lr * velocity[i])
        optimizer.step()
    for p, r in zip((w, b, zero), ref, strict=True):
        torch.testing.assert_close(p.detach(), r)


def test_cosine_ends():
    assert cosine(0.996, 1, 0) == pytest.approx(0.996)
    assert cosine(0.996, 1, 0.5) == pytest.approx(0.998)
    assert cosine(0.996, 1, 1) == 1
    assert cosine(0.996, 1, 2) == 1


def test_a_schedule_in_a_checkpoint_is_plain_data(tmp_path):
    optimizer, schedule, _ = build(lr=0.1)
    torch.save({"o": optimizer.state_dict(), "s": schedule.state_dict()}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["s"]["last_epoch"] == 0
