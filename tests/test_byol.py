"""BYOL: its loss, its target, its momentum, and what is left without each of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes
from test_moco import Flat
from test_papers import batch_of
from test_simsiam import four
from torch import nn

from unlabeled.backbones.resnet import ResNet
from unlabeled.dist import mine
from unlabeled.methods.byol import BYOL, byol_loss
from unlabeled.methods.simsiam import simsiam_loss
from unlabeled.optim import cosine
from unlabeled.parts import ema


def byol(backbone, **kwargs):
    return BYOL(backbone, nn.Identity(), lambda *_: None, **kwargs)


def online(method):
    return [*method.backbone.parameters(), *method.projector.parameters()]


def test_the_loss_is_its_formula():
    p1, p2, z1, z2 = given = four()
    total = 0.0
    for p, z in ((p1, z2), (p2, z1)):
        for a, b in zip(p, z, strict=True):
            total += sum(((a / a.norm() - b / b.norm()) ** 2).tolist()) / len(p)
    for stop in (True, False):
        loss = byol_loss(*given, stop_gradient=stop).item()
        assert loss == pytest.approx(total, rel=1e-12)
        simsiam = simsiam_loss(*given, stop_gradient=stop).item()
        assert loss == pytest.approx(4 + 4 * simsiam, rel=1e-12)


def test_the_loss_at_its_ends():
    p1, p2, _, _ = four()
    assert byol_loss(p1, p2, 3 * p2, p1 / 2).item() == pytest.approx(0, abs=1e-12)
    assert byol_loss(p1, p2, -p2, -p1).item() == pytest.approx(8, rel=1e-12)
    assert 0 < byol_loss(*four()).item() < 8


def test_the_loss_ignores_lengths_and_the_order_of_views():
    p1, p2, z1, z2 = four()
    loss = byol_loss(p1, p2, z1, z2)
    torch.testing.assert_close(byol_loss(p2, p1, z2, z1), loss)
    torch.testing.assert_close(byol_loss(p1 * 3, p2 / 7, z1 * 0.2, z2 * 9), loss)


def test_gradients_reach_targets_only_without_the_stop():
    p1, p2, z1, z2 = given = four(grad=True)
    byol_loss(*given).backward()
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad.abs().sum() > 0
    assert p2.grad.abs().sum() > 0
    byol_loss(*given, stop_gradient=False).backward()
    assert z1.grad.abs().sum() > 0
    assert z2.grad.abs().sum() > 0


def test_heads_are_the_official_ones():
    method = byol(Flat(2048))
    for head, width in ((method.projector, 2048), (method.predictor, 256)):
        kinds = [type(m).__name__ for m in head]
        assert kinds == ["Linear", "SyncBatchNorm", "ReLU", "Linear"]
        assert (head[0].in_features, head[0].out_features, head[3].out_features) == (
            *(width, 4096),
            256,
        )
        assert head[0].bias is not None
        assert head[3].bias is None


def test_the_momentum_rises_along_a_cosine():
    for tau, middle in ((0.996, 0.998), (0.97, 0.985), (0.0, 0.5)):
        assert cosine(tau, 1, 0) == tau
        assert cosine(tau, 1, 0.5) == pytest.approx(middle, rel=1e-12)
        assert cosine(tau, 1, 1) == 1
    k, n = 37, 100
    formula = 1 - (1 - 0.996) * (math.cos(math.pi * k / n) + 1) / 2
    assert cosine(0.996, 1, k / n) == pytest.approx(formula, rel=1e-12)


def test_the_target_gets_no_gradient_at_all(tiny):
    method, *rest = tiny("byol")
    batch = batch_of(method, *rest)
    before = [p.clone() for p in method.target.parameters()]
    batch["views"] = [v.requires_grad_() for v in batch["views"]]
    method.loss(batch)["regression"].backward()
    names = dict(method.target.named_parameters())
    assert any("bn1.weight" in n for n in names)  # norms too
    assert not any(p.requires_grad or p.grad is not None for p in names.values())
    assert all(map(torch.equal, before, method.target.parameters()))
    assert all(p.grad is not None for p in [*online(method), *method.predictor.parameters()])


@pytest.mark.parametrize("joint", [True, False])
def test_a_step_is_its_definition(tiny, joint):
    method, *rest = tiny("byol", f"method.joint={joint}", "method.initial=anew")
    batch = batch_of(method, *rest)
    method.double()
    views = batch["views"] = [v.double() for v in batch["views"]]
    loss = method.loss(batch)["regression"]

    def through(network, xs):
        return network(torch.cat(xs)).chunk(2) if joint else [network(x) for x in xs]

    p = through(method.predictor, through(method.projector, through(method.backbone, views)))
    z = [x.detach() for x in through(method.target, views)]
    expected = sum(
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
        for a, b in ((p[0], z[1]), (p[1], z[0]))
    )
    torch.testing.assert_close(loss, expected)
    weights = [*online(method), *method.predictor.parameters()]
    for got, want in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-10)


def test_the_target_is_in_training_mode_with_statistics_of_its_own(tiny):
    method, data, trainer = tiny("byol", "trainer.max_steps=3")
    start = {n: b.clone() for n, b in method.target.named_buffers()}
    trainer.fit(method, data)
    moved = {n for n, b in method.target.named_buffers() if not torch.equal(b, start[n])}
    assert moved == start.keys()
    fast = [*method.backbone.buffers(), *method.projector.buffers()]
    slow = [*method.target.buffers()]
    pairs = [(a, b) for a, b in zip(fast, slow, strict=True) if a.is_floating_point()]
    assert any(not torch.allclose(a, b) for a, b in pairs)  # neither copied nor averaged


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_without_momentum_the_target_is_the_online_network(tiny, schedule):
    method, data, trainer = tiny("byol", "method.tau=0", f"method.schedule={schedule}")
    equal = []
    method.on_train_batch_end = lambda *_: equal.append(
        all(map(torch.equal, method.target.parameters(), online(method)))
    )
    trainer.fit(method, data)
    # A cosine ends at 1, wherever it starts.
    assert equal == [True] * 8 if schedule == "constant" else [True, *[False] * 7]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_with_full_momentum_the_target_never_moves(tiny, schedule):
    method, data, trainer = tiny("byol", "method.tau=1", f"method.schedule={schedule}")
    before = [p.clone() for p in method.target.parameters()]
    trainer.fit(method, data)
    assert all(map(torch.equal, before, method.target.parameters()))
    assert not any(map(torch.equal, before, online(method)))


def test_a_constant_momentum_has_its_closed_form(tiny):
    method, *rest = tiny("byol", "method.tau=0.9", "method.schedule=constant")
    batch_of(method, *rest)
    first = [p.clone() for p in method.target.parameters()]
    with torch.no_grad():
        for p in online(method):
            p.add_(torch.randn_like(p))
    for _ in range(7):
        method.after_step()
    for p, start, theta in zip(method.target.parameters(), first, online(method), strict=True):
        torch.testing.assert_close(p, 0.9**7 * start + (1 - 0.9**7) * theta)


def test_the_target_moves_after_the_optimizer_once_per_update(tiny):
    method, data, trainer = tiny(
        *("byol", "method.tau=0", "method.schedule=constant"),
        *("trainer.accumulate_grad_batches=2", "trainer.max_epochs=1", "method.optim.warmup=0"),
    )
    targets = []
    method.on_train_batch_end = lambda *_: targets.append(
        torch.cat([p.flatten().clone() for p in method.target.parameters()])
    )
    start = torch.cat([p.flatten() for p in online(method)]).detach().clone()
    trainer.fit(method, data)
    assert torch.equal(targets[0], start)  # no update yet
    assert not torch.equal(targets[1], start)
    assert torch.equal(targets[2], targets[1])
    end = torch.cat([p.flatten() for p in online(method)])
    assert torch.equal(targets[3], end)  # what the optimizer made


def test_a_target_may_start_as_a_copy_or_be_drawn_anew():
    def made(initial):
        torch.manual_seed(0)
        return byol(ResNet(depth=18, width=8, stem="small"), hidden=16, dim=8, initial=initial)

    copied, anew = made("copy"), made("anew")
    assert all(map(torch.equal, copied.target.parameters(), online(copied)))
    assert all(map(torch.equal, online(copied), online(anew)))  # the online network is the same
    for p, theta in zip(anew.target.parameters(), online(anew), strict=True):
        assert not p.requires_grad
        assert torch.equal(p.flatten().sort().values, theta.flatten().sort().values)
        if theta.std(correction=0) > 0 and theta.numel() > 200:
            x, y = (t.detach().flatten() - t.mean().detach() for t in (p, theta))
            assert abs(float((x @ y) / x.norm() / y.norm())) < 4 / math.sqrt(p.numel())
        elif theta.std(correction=0) == 0:
            assert torch.equal(p, theta)  # norm layers


def test_drawing_anew_reaches_every_order():
    torch.manual_seed(0)
    linear = nn.Linear(3, 1, bias=False)
    seen = set()
    for _ in range(60):
        ema.draw_anew(linear)
        seen.add(tuple(linear.weight[0].tolist()))
    assert len(seen) == 6


def test_without_the_stop_there_is_no_target_and_gradients_flow_both_ways(tiny):
    method, *rest = tiny("byol", "method.stop_gradient=false")
    batch = batch_of(method, *rest)
    assert method.target is None
    assert not any(name.startswith("target") for name in method.state_dict())
    method.double()
    views = batch["views"] = [v.double() for v in batch["views"]]
    loss = method.loss(batch)["regression"]
    z = method.projector(method.backbone(torch.cat(views)))
    p1, p2 = method.predictor(z).chunk(2)
    z1, z2 = z.chunk(2)
    expected = 4 - 2 * (F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)).mean()
    torch.testing.assert_close(loss, expected)
    stopped = byol_loss(p1, p2, z1, z2)
    weight = method.projector[0].weight
    free, want, not_this = (
        torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (loss, expected, stopped)
    )
    torch.testing.assert_close(free, want)
    assert not torch.allclose(free, not_this)
    method.after_step()  # nothing to move


@pytest.mark.parametrize("kind", ["mlp", "random", "none"])
@pytest.mark.parametrize("stop", [True, False])
def test_the_predictor_is_trained_kept_or_absent(tiny, kind, stop):
    method, data, trainer = tiny(
        *("byol", f"method.predictor={kind}", f"method.stop_gradient={stop}"),
        "trainer.max_steps=2",
    )
    before = [p.clone() for p in method.predictor.parameters()]
    assert len(before) == (0 if kind == "none" else 5)
    trainer.fit(method, data)
    moved = [
        not torch.equal(p, old)
        for p, old in zip(method.predictor.parameters(), before, strict=True)
    ]
    assert all(m == (kind == "mlp") for m in moved)


def test_the_published_recipe(compose):
    from hydra.utils import instantiate

    cfg = compose("experiment=imagenet/byol")
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (4096, 1000)
    assert (cfg.method.hidden, cfg.method.dim, cfg.method.tau) == (4096, 256, 0.996)
    optim = instantiate(cfg.method.optim)
    assert optim.lr * 4096 / 256 == pytest.approx(3.2)
    assert optim.weight_decay == 1.5e-6
    assert not optim.decay_all
    assert not optim.optimizer.keywords["lr_in_momentum"]
    assert optim.factor(0.01) == 1
    chains = cfg.method.augment.chains
    assert (chains.first.blur.p, chains.second.blur.p) == (1.0, 0.1)
    assert (chains.first.solarize.p, chains.second.solarize.p) == (0.0, 0.2)
    assert (chains.first.jitter.saturation, chains.first.jitter.p) == (0.2, 0.8)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"tau": -0.1}, "tau.*-0.1"),
        ({"schedule": "linear"}, "schedule.*'linear'"),
        ({"initial": "copied"}, "initial.*'copied'"),
        ({"predictor": "mpl"}, "predictor.*'mpl'"),
    ],
)
def test_bad_values_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        byol(Flat(4), dim=4, hidden=8, **bad)


N, OPTIONS = 12, ({}, {"stop_gradient": False}, {"predictor": "none"}, {"joint": True})


def step(options):
    """Loss and gradient of a step, each process with its share of the images."""
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    backbone.dim = 8
    given = {"schedule": "constant", "initial": "anew", "tau": 0.5, **options}
    method = byol(backbone, hidden=8, dim=4, **given).double()
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, N, 6, generator=generator, dtype=torch.float64)
    loss = method.loss({"views": [mine(view) for view in views]})["regression"]
    loss.backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    return mean(loss), mean(torch.cat([p.grad.flatten() for p in trained]))


def steps():
    return [step(options) for options in OPTIONS]


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one_in_loss_and_gradient(world):
    alone = steps()
    for found in on_processes(world, steps):
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-9)
