"""The lasso over stages."""

import pytest
import torch
import torch.nn.functional as F

from unlabeled.draws import shuffled
from unlabeled.evaluate.contract import Features, Request, Shapes
from unlabeled.evaluate.lasso import Lasso, Try, _weights


def given(n=240, classes=3, seed=0, grid=1):
    """Two stages of noise, and one between them whose features tell the classes apart."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, 6, 1, 1, generator=torch.Generator().manual_seed(9))
    shape = {"a": 8, "b": 6, "c": 5}
    maps = {k: torch.randn(n, dim, grid, grid, generator=g) for k, dim in shape.items()}
    maps["b"] = 3 * centres[y] + maps["b"]
    cut, requests = n // 3, {k: Request(k, grid) for k in shape}
    order = shuffled(n - cut, "selection")
    return Features(
        splits={
            "test": {requests[k]: x[:cut] for k, x in maps.items()},
            "train": {requests[k]: x[cut:] for k, x in maps.items()},
        },
        labels={"test": y[:cut], "train": y[cut:]},
        classes=classes,
        selection=(order[40:], order[:40]),
        shapes=Shapes(maps={k: (dim, grid, grid) for k, dim in shape.items()}, dim=5, pooled=True),
        seed=0,
        device=torch.device("cpu"),
        progress=lambda *_: None,
    )


def test_updates_are_those_of_the_formula():
    features = given(grid=2)
    lasso = Lasso(epochs=1, batch_size=60, momentum=0.5, weight_decay=0.01)
    x, y = [*features.splits["train"].values()], features.labels["train"]
    rows, tries = torch.arange(100), [Try(0.5, 0.0), Try(2.0, 0.3)]
    made = lasso.train(x, y, rows, tries, features)
    for h, (lr, l1) in enumerate(tries):  # the same by autograd, stage by stage, one by one
        w = [_weights(z[0].numel(), 3, 0, "lasso", s).double() for s, z in enumerate(x)]
        learned = [
            v.requires_grad_() for v in (*w, torch.ones(3).double(), torch.zeros(3).double())
        ]
        velocity = [torch.zeros_like(v) for v in learned]
        order = shuffled(100, 0, "lasso", 0)
        for step, batch in enumerate((order[:60], order[60:])):
            logits = learned[-1].expand(len(batch), 3)
            for s, z in enumerate(x):
                seen = z[rows].double()
                var, mean = torch.var_mean(seen, (0, 2, 3), correction=0, keepdim=True)
                normed = ((z[batch].double() - mean) / (var + 1e-5).sqrt()).flatten(1)
                normed = normed / normed.shape[1] ** 0.5
                logits = logits + learned[-2][s] * (normed @ learned[s])
            decay = sum(0.005 * v.square().sum() for v in learned[:-2])
            grads = torch.autograd.grad(F.cross_entropy(logits, y[batch]) + decay, learned)
            rate = lr * (1.0 if step == 0 else 0.5)  # a cosine over two updates
            with torch.no_grad():
                for v, g, m in zip(learned, grads, velocity, strict=True):
                    v.sub_(rate * m.mul_(0.5).add_(g))
                alpha = learned[-2]
                alpha.copy_(alpha.sign() * (alpha.abs() - rate * l1 / (1 - 0.5)).clamp(min=0))
        torch.testing.assert_close(made.alpha[h].double(), learned[-2].detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(made.bias[h].double(), learned[-1].detach(), atol=1e-5, rtol=0)
        for s in range(3):
            own = made.weights[s].view(-1, 2, 3)[:, h].double()
            torch.testing.assert_close(own, learned[s].detach(), atol=1e-5, rtol=0)


def test_it_reads_the_stage_that_tells_classes_apart_and_no_other():
    features = given()
    result = Lasso(lrs=[1.0], l1=[0.01], epochs=40, batch_size=40)(features)
    alpha = result.details["top1"]["alpha"]
    assert alpha["a"] == alpha["c"] == 0.0  # exactly
    assert alpha["b"] > 0.5
    assert result.scores["top1"] > 0.95
    assert result.per_image["top1"].double().mean() == pytest.approx(result.scores["top1"])
    assert result.details["top1"]["stage"] == "a+b+c"
    dense = Lasso(lrs=[1.0], l1=[0.0], epochs=40, batch_size=40)(features)
    assert all(value != 0 for value in dense.details["top1"]["alpha"].values())
    shown = result.figures["alpha"]
    assert shown["ticks"].tolist() == ["a", "b", "c"]
    assert shown["y"][0].tolist() == [0.0, pytest.approx(alpha["b"]), 0.0]


def test_the_setting_is_chosen_on_held_out_images_only():
    features = given()
    made = Lasso(lrs=[0.1, 1.0], l1=[0.0, 0.01], epochs=5, batch_size=40)
    details = made(features).details["top1"]
    assert len(details["tried"]) == 4
    best = max(details["tried"], key=lambda each: each["held_out_top1"])
    assert [details["hyperparameters"][k] for k in ("lr", "l1")] == [best["lr"], best["l1"]]
    other = given()
    other.labels["test"].copy_(other.labels["test"].flip(0))
    assert made(other).details["top1"]["tried"] == details["tried"]


@pytest.mark.parametrize(
    "bad", [{"lrs": []}, {"l1": [-1.0]}, {"weight_decay": -1.0}, {"epochs": 0}, {"stages": "some"}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Lasso(**bad)
