"""SimSiam: its loss, its two asymmetries, its heads, and processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes
from test_moco import Flat
from test_papers import batch_of
from torch import nn

from unlabeled.backbones.resnet import ResNet
from unlabeled.callbacks.health import health
from unlabeled.dist import mine
from unlabeled.methods.byol import byol_loss
from unlabeled.methods.simsiam import SimSiam, simsiam_loss
from unlabeled.parts.mlp import mlp
from unlabeled.parts.predictor import predictor


def simsiam(backbone, **kwargs):
    return SimSiam(backbone, nn.Identity(), lambda *_: None, **kwargs)


def four(n=5, d=4, grad=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, n, d, generator=generator, dtype=torch.float64)
    return [t.clone().requires_grad_(grad) for t in x]


def literal(p1, p2, z1, z2):
    total = 0.0
    for p, z in ((p1, z2), (p2, z1)):
        for a, b in zip(p.tolist(), z.tolist(), strict=True):
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            total -= dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
    return total / len(p1) / 2


def test_the_loss_is_its_formula():
    given = four()
    assert simsiam_loss(*given).item() == pytest.approx(literal(*given), rel=1e-12)
    free = simsiam_loss(*given, stop_gradient=False)
    assert free.item() == pytest.approx(literal(*given), rel=1e-12)
    assert byol_loss(*given).item() == pytest.approx(4 + 4 * literal(*given), rel=1e-12)


def test_the_loss_at_its_ends():
    p1, p2, _, _ = four()
    assert simsiam_loss(p1, p2, 3 * p2, 0.5 * p1).item() == pytest.approx(-1, rel=1e-12)
    assert simsiam_loss(p1, p2, -p2, -p1).item() == pytest.approx(1, rel=1e-12)


def test_the_loss_ignores_lengths_and_the_order_of_views():
    p1, p2, z1, z2 = four()
    loss = simsiam_loss(p1, p2, z1, z2)
    scale = torch.tensor([[0.1], [1], [3], [20], [7]], dtype=torch.float64)
    torch.testing.assert_close(simsiam_loss(p1 * scale, p2, z1, z2 * 4), loss)
    torch.testing.assert_close(simsiam_loss(p1, p2 / scale, z1 / scale, z2), loss)
    torch.testing.assert_close(simsiam_loss(p2, p1, z2, z1), loss)


def test_half_precision_is_raised():
    given = four(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = simsiam_loss(*(x.bfloat16() for x in given))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(simsiam_loss(*given).item(), abs=5e-3)


def test_targets_get_no_gradient_unless_asked_to():
    p1, p2, z1, z2 = given = four(grad=True)
    simsiam_loss(*given).backward()
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad.abs().sum() > 0
    assert p2.grad.abs().sum() > 0
    simsiam_loss(*given, stop_gradient=False).backward()
    assert z1.grad.abs().sum() > 0
    assert z2.grad.abs().sum() > 0


def test_without_a_predictor_stopping_gradients_halves_them():
    _, _, z1, z2 = four(grad=True)
    loss = simsiam_loss(z1, z2, z1, z2)
    assert loss.item() == pytest.approx(-F.cosine_similarity(z1, z2).mean().item(), rel=1e-12)
    stopped = torch.autograd.grad(loss, (z1, z2))
    free = torch.autograd.grad(simsiam_loss(z1, z2, z1, z2, stop_gradient=False), (z1, z2))
    for half, whole in zip(stopped, free, strict=True):
        assert half.abs().sum() > 0
        torch.testing.assert_close(2 * half, whole)


def test_heads_are_the_official_ones():
    method = simsiam(Flat(2048))
    kinds = [type(m).__name__ for m in method.projector]
    norm = "SyncBatchNorm"
    assert kinds == ["Linear", norm, "ReLU", "Linear", norm, "ReLU", "Linear", norm]
    assert [m.bias is None for m in method.projector if isinstance(m, nn.Linear)] == [True] * 3
    assert method.projector[-1].weight is None  # no bias before it either, which would drift
    assert method.projector[-1].bias is None
    assert [type(m).__name__ for m in method.predictor] == ["Linear", norm, "ReLU", "Linear"]
    first, last = method.predictor[0], method.predictor[-1]
    assert (first.in_features, first.out_features, last.out_features) == (2048, 512, 2048)
    assert first.bias is None
    assert last.bias is not None
    count = sum(p.numel() for p in method.parameters())
    projector = 3 * 2048**2 + 2 * 2 * 2048
    assert count == projector + 2048 * 512 + 2 * 512 + 512 * 2048 + 2048


def test_the_last_norm():
    x = torch.randn(64, 7, dtype=torch.float64) * 3 + 2
    fixed = simsiam(Flat(7), dim=5).double()
    z = fixed.projector(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(
        z.var(0, correction=0), torch.ones(5, dtype=torch.float64), rtol=1e-3, atol=0
    )
    affine = simsiam(Flat(7), dim=5, last_norm="affine").projector[-1]
    assert affine.weight.shape == affine.bias.shape == (5,)
    assert isinstance(simsiam(Flat(7), dim=5, last_norm="none").projector[-1], nn.Linear)


def test_spread_of_collapsed_and_of_isotropic_embeddings():
    assert health(torch.ones(64, 2048))["std"] == pytest.approx(0, abs=1e-6)
    z = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0))
    std = F.normalize(z, dim=1).std(0, correction=0).mean().item()
    assert std == pytest.approx(0.0220970869, rel=2e-3)  # 1 / sqrt(2048)
    assert health(z)["std"] == pytest.approx(std * math.sqrt(2048), rel=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "random", "none"])
@pytest.mark.parametrize("stop", [True, False])
def test_the_predictor_is_trained_kept_or_absent(tiny, kind, stop):
    method, data, trainer = tiny(
        "simsiam",
        f"method.predictor={kind}",
        f"method.stop_gradient={stop}",
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
    assert len({id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}) == len(
        [p for p in method.parameters() if p.requires_grad]
    )


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("stop", [True, False])
def test_a_step_is_its_definition(tiny, joint, stop):
    method, *rest = tiny("simsiam", f"method.joint={joint}", f"method.stop_gradient={stop}")
    batch = batch_of(method, *rest)
    method.double()
    views = batch["views"] = [v.double() for v in batch["views"]]
    loss = method.loss(batch)["similarity"]

    def through(network, xs):
        return network(torch.cat(xs)).chunk(2) if joint else [network(x) for x in xs]

    z = through(method.projector, through(method.backbone, views))
    p = through(method.predictor, z)
    torch.testing.assert_close(method.seen["embeddings"], z[0].detach())
    targets = [t.detach() if stop else t for t in z]
    expected = -sum(
        (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1).mean() / 2
        for a, b in ((p[0], targets[1]), (p[1], targets[0]))
    )
    torch.testing.assert_close(loss, expected)
    weights = [q for q in method.parameters() if q.requires_grad]
    for got, want in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-10)


def test_the_published_recipe(compose):
    from hydra.utils import instantiate

    cfg = compose("experiment=imagenet/simsiam")
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (512, 100)
    assert cfg.backbone.zero_init_residual
    assert cfg.backbone.norm == "sync"
    assert list(cfg.decode.scale) == [0.2, 1.0]
    assert cfg.method.augment == compose("method=moco_v2").method.augment  # not BYOL's
    method = simsiam(Flat(8), dim=8, bottleneck=4)
    optim = instantiate(cfg.method.optim)
    made = optim(method, batch_size=512, steps=1000, steps_per_epoch=10)
    groups, schedule = made["optimizer"].param_groups, made["lr_scheduler"]["scheduler"]
    predictor = {id(p) for p in method.predictor.parameters()}
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in method.parameters()}
    for group, factor in zip(groups, schedule.lr_lambdas, strict=True):
        constant = all(id(p) in predictor for p in group["params"])
        assert constant or not any(id(p) in predictor for p in group["params"])
        assert group["initial_lr"] == pytest.approx(0.1)  # 0.05 * 512 / 256
        assert group["weight_decay"] == 1e-4  # the predictor's, biases' and norms' too
        assert factor(0) == 1  # no warm-up
        assert factor(9) == 1  # by epoch
        assert factor(505) == pytest.approx(1 if constant else 0.5)
        assert factor(995) == pytest.approx(1 if constant else (1 + math.cos(0.99 * math.pi)) / 2)
    block = ResNet(depth=50, width=4, zero_init_residual=True).layer1[0]
    assert not block.bn3.weight.any()


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"predictor": "mpl"}, "predictor.*'mpl'"),
        ({"last_norm": "affin"}, "last_norm.*'affin'"),
        ({"depth": 0}, "depth.*0"),
        ({"norm": "bach"}, "norm.*'bach'"),
    ],
)
def test_bad_values_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        simsiam(Flat(4), dim=4, **bad)


def test_a_predictor_of_no_kind_is_the_identity():
    x = torch.randn(3, 4)
    assert predictor("none", 4, 2, bias=True, last_bias=True, norm="batch")(x) is x
    frozen = predictor("random", 4, 2, bias=True, last_bias=True, norm="batch")
    assert not any(p.requires_grad for p in frozen.parameters())
    assert [p.shape for p in frozen.parameters()] == [p.shape for p in mlp(4, 2, 4).parameters()]


N, OPTIONS = 12, ({}, {"stop_gradient": False}, {"predictor": "none"}, {"joint": True})


def step(options):
    """Loss and gradient of a step, each process with its share of the images."""
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    backbone.dim = 8
    method = simsiam(backbone, dim=8, depth=2, bottleneck=4, **options).double()
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, N, 6, generator=generator, dtype=torch.float64)
    loss = method.loss({"views": [mine(view) for view in views]})["similarity"]
    loss.backward()
    return mean(loss), mean(torch.cat([p.grad.flatten() for p in method.parameters()]))


def steps():
    return [step(options) for options in OPTIONS]


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one_in_loss_and_gradient(world):
    alone = steps()
    for found in on_processes(world, steps):
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-9)
