"""Diverse colourisation: the VAE's terms, the mixture, samples, and processes against one."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from processes import on_processes, value_and_gradient
from test_colorization import coloured, uniform
from torch import nn

from unlabeled.augment.colors import Colors
from unlabeled.backbones.resnet import ResNet
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods.diverse_colorization import DiverseColorization
from unlabeled.optim import Optim
from unlabeled.parts.color_distances import (
    FLOOR,
    gradient_distance,
    kl_divergence,
    principal_axes,
    principal_distance,
    weighted_distance,
)
from unlabeled.parts.color_vae import ColorVAE, scattered, truncated_normal
from unlabeled.parts.dropout import dropped
from unlabeled.parts.field_error import error_of_best
from unlabeled.parts.mixture import MixtureHead, likeliest, mixture_loss


def normals(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


# The VAE's terms.


def test_kl_is_its_formula_and_0_for_the_prior():
    assert kl_divergence(torch.zeros(3, 5), torch.zeros(3, 5)) == 0
    mu, log_var = normals(3, 5), normals(3, 5, seed=1)
    total = 0.0
    for m, v in zip(mu.flatten().tolist(), log_var.flatten().tolist(), strict=True):
        s2 = math.exp(v)
        total += 0.5 * (m**2 + s2 - math.log(s2) - 1)
    assert kl_divergence(mu, log_var).item() == pytest.approx(total / 3)
    assert kl_divergence(mu, log_var, "sum").item() == pytest.approx(total)  # 3 times as much
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (log_var / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert kl_divergence(mu, log_var).item() == pytest.approx(theirs.sum().item() / 3)


def test_distances_are_their_formulas():
    a, b, w = normals(2, 2, 4, 4), normals(2, 2, 4, 4, seed=1), uniform(2, 4, 4)
    weighted = gradient = 0.0
    for i in range(2):
        weighted += math.sqrt(
            sum(
                w[i, h, v] * (a[i, c, h, v] - b[i, c, h, v]) ** 2
                for c in range(2)
                for h in range(4)
                for v in range(4)
            )
        )
        d = a[i] - b[i]
        squares = 0.0
        for c in range(2):
            for h in range(4):
                for v in range(4):
                    squares += float((d[c, h, v + 1] - d[c, h, v]) ** 2) if v < 3 else 0
                    squares += float((d[c, h + 1, v] - d[c, h, v]) ** 2) if h < 3 else 0
        gradient += math.sqrt(squares)
    assert weighted_distance(a, b, w).item() == pytest.approx(weighted / 2)
    assert gradient_distance(a, b).item() == pytest.approx(gradient / 2)
    assert gradient_distance(a + 3, a) == pytest.approx(0, abs=1e-9)  # blind to a shift


def test_distances_of_equal_fields_have_finite_gradients():
    a = normals(2, 2, 4, 4).requires_grad_()
    b, w = a.detach().clone(), uniform(2, 4, 4)
    axes, variances = torch.eye(32)[:3].double(), torch.ones(3).double()
    total = weighted_distance(a, b, w) + gradient_distance(a, b)
    (total + principal_distance(a, b, axes, variances)).backward()
    assert a.grad.isfinite().all()


def test_principal_axes_are_those_of_the_covariance():
    fields = normals(50, 2, 2, 2) * torch.linspace(3, 0.5, 8).double().view(2, 2, 2)
    axes, variances = principal_axes(fields, 3)
    flat = fields.flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T, correction=0))
    torch.testing.assert_close(variances.double(), values.flip(0)[:3], rtol=1e-5, atol=1e-6)
    cosines = (axes.double() * vectors.flip(1)[:, :3].T).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(3).double(), rtol=1e-5, atol=1e-6)
    few, small = principal_axes(torch.zeros(2, 2, 2, 2), 5)  # grey images
    assert few.shape == (5, 8)
    assert (few == 0).all()
    assert torch.equal(small, torch.full((5,), FLOOR))


def test_principal_distance_is_its_formula_and_divides_by_variances():
    a, b = normals(3, 2, 2, 2), normals(3, 2, 2, 2, seed=1)
    axes, variances = principal_axes(normals(40, 2, 2, 2, seed=2), 3)
    axes, variances = axes.double(), variances.double()
    total = 0.0
    for i in range(3):
        d = (a[i] - b[i]).flatten()
        rest = d.clone()
        for p, v in zip(axes, variances, strict=True):
            total += (d @ p) ** 2 / v
            rest -= (d @ p) * p
        total += rest @ rest / variances[-1]
    found = principal_distance(a, b, axes, variances)
    assert found.item() == pytest.approx(total.item() / 3)
    one = (axes[0] * variances[0].sqrt()).view(1, 2, 2, 2)
    two = (axes[2] * variances[2].sqrt()).view(1, 2, 2, 2)
    for step in (one, two):  # a deviation along any axis costs the same
        found = principal_distance(a + step, a, axes, variances)
        assert found.item() == pytest.approx(1, rel=1e-4)


def test_the_noise_of_the_official_code_is_cut():
    u = uniform(20000)
    x = truncated_normal(u)
    assert x.abs().max() <= 2
    assert x.std().item() == pytest.approx(0.8796, abs=0.01)
    assert truncated_normal(torch.tensor([0.0, 0.5])).tolist() == pytest.approx([-2, 0], abs=1e-4)
    vae = ColorVAE(size=8, dim=3, width=8)
    zero = torch.zeros(4, 3)
    drawn = vae.sample(zero, zero + math.log(4), Draws(0, "z", rows=4))
    torch.testing.assert_close(drawn, 2 * Draws(0, "z", rows=4).normal(3))
    vae.truncated = True
    drawn = vae.sample(zero + 1, zero, Draws(0, "z", rows=4))
    torch.testing.assert_close(drawn, 1 + truncated_normal(Draws(0, "z", rows=4).uniform(3)))


@pytest.mark.parametrize("skips", [False, True])
def test_the_decoder_sees_the_light_only_with_skips(skips):
    vae = ColorVAE(size=16, dim=4, width=8, grey_skips=skips).eval()
    z, light = normals(2, 4, dtype=torch.float32), normals(2, 1, 16, 16, dtype=torch.float32)
    field = vae.decode(z, light)
    assert field.shape == (2, 2, 16, 16)
    assert field.abs().max() <= 1
    assert torch.equal(vae.decode(z, light * 2), field) != skips
    mu, log_var = vae.encode(field)
    assert mu.shape == log_var.shape == (2, 4)


def test_a_decoder_that_ignores_z_learns_the_conditional_mean():
    """Without KL, and with z the same for both colours of an image."""
    torch.manual_seed(0)
    vae = ColorVAE(size=8, dim=2, width=8, kl=0.0, gradient=0.0, principal=0)
    truth = torch.zeros(16, 2, 8, 8)
    truth[:8, 0], truth[8:, 0] = 0.5, -0.1
    z, light = (
        torch.ones(16, 2) + 0.01 * normals(16, 2, dtype=torch.float32),
        torch.zeros(16, 1, 8, 8),
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        order = torch.randperm(16)
        (vae.decode(z[order], light) - truth).square().mean().backward()
        optimizer.step()
    field = vae.decode(z, light)
    torch.testing.assert_close(field[:, 0].mean(), torch.tensor(0.2), atol=0.06, rtol=0)
    assert (field[:, 1].abs().mean()) < 0.1


def test_the_weight_of_kl_rises_with_training():
    vae = ColorVAE(size=8, dim=3, width=8, principal=2)
    field, truth = normals(2, 2, 8, 8), normals(2, 2, 8, 8, seed=1)
    mu, log_var = normals(2, 3), normals(2, 3, seed=1)
    vae = vae.double()
    at = partial(vae.terms, field, truth, torch.ones(2, 8, 8).double(), mu, log_var)
    divergence = kl_divergence(mu, log_var).item()
    assert at(0.0)["kl"] == 0
    assert at(0.5)["kl"].item() == pytest.approx(0.005 * divergence)
    assert at(1.0)["kl"].item() == pytest.approx(0.01 * divergence)
    assert at(1.0)["gradient"].item() == pytest.approx(
        1e-3 * gradient_distance(field, truth).item()
    )
    assert set(at(1.0)) == {"reconstruction", "gradient", "kl", "principal"}
    mean = ColorVAE(size=8, dim=3, width=8, principal=2, principal_reduction="mean").double()
    terms = mean.terms(field, truth, torch.ones(2, 8, 8).double(), mu, log_var, 1.0)
    assert (terms["principal"] * 128).item() == pytest.approx(at(1.0)["principal"].item())
    plain = ColorVAE(size=8, dim=3, width=8, principal=0).double()
    terms = plain.terms(field, truth, torch.ones(2, 8, 8).double(), mu, log_var, 1.0)
    assert set(terms) == {"reconstruction", "gradient", "kl"}


# The mixture.


def test_mixture_loss_is_its_formulas():
    z, mu, log_pi = (
        normals(3, 4) * 0.1,
        normals(3, 5, 4, seed=1) * 0.1,
        normals(3, 5).log_softmax(1),
    )
    nearest = full = code = 0.0
    for i in range(3):
        energies = [((z[i] - mu[i, k]) ** 2).sum().item() / (2 * 0.1**2) for k in range(5)]
        k = energies.index(min(energies))
        nearest += -log_pi[i, k].item() + energies[k]
        code += -log_pi[i, k].item() + energies[k] * 0.1  # by sigma, not its square
        terms = zip(log_pi[i].exp().tolist(), energies, strict=True)
        full -= math.log(sum(p * math.exp(-e) for p, e in terms))
    assert mixture_loss(z, log_pi, mu, 0.1).item() == pytest.approx(nearest / 3)
    found = mixture_loss(z, log_pi, mu, 0.1, divide_by="sigma").item()
    assert found == pytest.approx(code / 3)
    assert mixture_loss(z, log_pi, mu, 0.1, likelihood="mixture").item() == pytest.approx(full / 3)
    assert full < nearest  # a sum over components is at least its largest term


@pytest.mark.parametrize("likelihood", ["nearest", "mixture"])
def test_mixture_loss_is_0_at_the_mean_of_a_sure_component(likelihood):
    z = normals(3, 4)
    mu = torch.stack([z + 5, z, z - 7], 1)
    log_pi = torch.tensor([-1e9, 0.0, -1e9]).double().expand(3, 3)
    assert mixture_loss(z, log_pi, mu, 0.1, likelihood=likelihood).item() == pytest.approx(0)


def test_only_the_nearest_component_moves():
    z = torch.zeros(2, 4)
    mu = torch.stack([z + 0.5, z + 1.0, z - 2.0], 1).requires_grad_()
    mixture_loss(z, torch.zeros(2, 3).log_softmax(1), mu, 0.1).backward()
    assert (mu.grad[:, 0] != 0).all()
    assert (mu.grad[:, 1:] == 0).all()


def test_the_likeliest_components_come_first():
    log_pi = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]).log()
    mu = torch.arange(6.0).view(2, 3, 1).expand(2, 3, 4)
    assert likeliest(log_pi, mu, 2)[..., 0].tolist() == [[1, 2], [3, 5]]
    head = MixtureHead(6, 4, components=3, width=8, grid=2)
    log_pi, mu = head(torch.randn(5, 6, 3, 3))
    assert mu.shape == (5, 3, 4)
    torch.testing.assert_close(log_pi.exp().sum(1), torch.ones(5))


def test_a_mixture_keeps_two_answers_apart():
    z = torch.tensor([[1.0], [-1.0]]).repeat(8, 4)
    log_pi, mu = (
        nn.Parameter(torch.zeros(1, 3)),
        nn.Parameter(normals(1, 3, 4, dtype=torch.float32) * 0.1),
    )
    optimizer = torch.optim.Adam([log_pi, mu], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        rows = log_pi.log_softmax(1).expand(16, 3), mu.expand(16, 3, 4)
        mixture_loss(z, *rows, 0.1).backward()
        optimizer.step()
    best = likeliest(log_pi.log_softmax(1), mu, 2)[0].sign().sort(0).values
    assert best.tolist() == [[-1] * 4, [1] * 4]


# Error of best.


def test_error_of_best_never_rises_with_more_samples():
    fields, truth = normals(3, 6, 2, 4, 4), normals(3, 2, 4, 4, seed=1)
    found = error_of_best(fields, truth)
    for i in range(3):
        each = []
        for k in range(6):
            squares = [
                sum((fields[i, k, c, h, w] - truth[i, c, h, w]) ** 2 for c in (0, 1)).item()
                for h in range(4)
                for w in range(4)
            ]
            each.append(math.sqrt(sum(squares) / 16))
            assert found[i, k].item() == pytest.approx(min(each))
    assert (found.diff(dim=1) <= 0).all()
    assert (found[:, -1] < found[:, 0]).any()


# The method.


def made(**options):
    torch.manual_seed(0)
    vae = {"size": 8, "dim": 4, "width": 8, "principal": 3, **options.pop("vae", {})}
    mixture = {"components": 4, "width": 16, "grid": 2, **options.pop("mixture", {})}
    method = DiverseColorization(
        ResNet(depth=18, width=16, stem="small", stem_stride=2),
        Colors([]),
        Optim(torch.optim.SGD, lr=0.1),
        vae=ColorVAE(**vae),
        mixture=partial(MixtureHead, **mixture),
        **{"samples": 3, **options},
    )
    method.log = lambda *args, **kwargs: None
    method._trainer = SimpleNamespace(global_step=0, log_every_n_steps=0)
    return method


def gradients(method, batch, term):
    method.zero_grad()
    method.loss(batch)[term].backward()
    return {
        part: any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        for part, module in (("backbone", method.backbone), ("vae", method.vae))
    }


def test_the_backbone_learns_from_the_mixture_alone_and_the_vae_from_the_rest():
    method, batch = made(), coloured(8)
    assert gradients(method, batch, "mixture") == {"backbone": True, "vae": False}
    for term in ("reconstruction", "gradient", "principal"):
        assert gradients(method, batch, term) == {"backbone": False, "vae": True}
    method.stop_gradient = False  # the official code's slip
    assert gradients(method, batch, "mixture") == {"backbone": True, "vae": True}


def test_what_is_dropped_is_drawn_by_row_and_step_in_training_alone():
    """A share of what the moments' and the mixture's linear layers read (the official code)."""
    x, draws = torch.ones(64, 3, 5, 5), lambda: Draws(0, "dropout", rows=64)
    kept = dropped(x, 0.25, draws())
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(kept, dropped(x, 0.25, draws()))
    assert dropped(x, 0.25, None) is x
    assert dropped(x, 0.0, draws()) is x
    batch = coloured(8)
    expected, held_out = made().loss(batch), made().measure(batch, 0)
    for part, term in (("vae", "reconstruction"), ("mixture", "mixture")):
        method = made(**{part: {"dropout": 0.5}})
        assert method.measure(batch, 0) == held_out
        found = method.loss(batch)
        assert not torch.equal(found[term], expected[term])
        assert torch.equal(found["reconstruction"], expected["reconstruction"]) == (part != "vae")


def test_fields_are_sub_sampled():
    method = made()
    ab = normals(2, 2, 32, 32)
    assert torch.equal(method._small(ab), ab[..., ::4, ::4])


def test_what_is_noted_and_shown_of_held_out_images():
    method, batch = made().eval(), coloured(8)
    found = method.measure(batch, 0)
    errors = [found[f"error_of_best_{k}"] for k in (1, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]
    ab = method._small(batch["target"]["ab"])
    each = (ab - ab.mean((0, 2, 3), keepdim=True)).square().sum(1).mean((1, 2)).sqrt()
    torch.testing.assert_close(found["error_of_mean"], each.mean())
    assert found["variance"] > 0
    assert method.colors.counts.sum() == 0
    with torch.no_grad():
        shown = method.pictures(batch)
    assert list(shown) == ["grey input", "sample 1", "sample 2", "sample 3", "truth"]
    assert all(x.shape == (8, 3, 16, 16) and 0 <= x.min() <= x.max() <= 1 for x in shown.values())
    assert not torch.equal(shown["sample 1"], shown["sample 2"])


def test_axes_come_from_the_training_images_once(tiny, monkeypatch):
    calls = []
    own = ColorVAE.learn_axes

    def counted(self, fields):
        calls.append(fields)
        noise = normals(*fields.shape, dtype=torch.float32)  # the images have no colours
        own(self, noise)

    monkeypatch.setattr(ColorVAE, "learn_axes", counted)
    method, data, trainer = tiny("diverse_colorization")
    trainer.fit(method, data)
    assert len(calls) == 1  # in two epochs
    assert calls[0].shape == (64, 2, 16, 16)
    assert calls[0].abs().max() < 1e-3
    axes = method.vae.axes
    torch.testing.assert_close(axes @ axes.T, torch.eye(20), atol=1e-5, rtol=0)


def test_a_second_run_keeps_the_autoencoder_of_the_first(tiny, tmp_path):
    first, data, trainer = tiny("diverse_colorization", "method.vae.dropout=0.5")
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    given = [f"method.source.path={tmp_path / 'first.ckpt'}", "method.vae.dropout=0.5", "seed=1"]
    second, data, trainer = tiny("diverse_colorization", *given)
    before = copy.deepcopy(second.state_dict())
    trainer.fit(second, data)
    changed = set()
    for name, x in second.state_dict().items():
        if name.startswith("vae."):
            assert torch.equal(x, first.state_dict()[name]), name
        elif not torch.equal(x, before[name]):
            changed.add(name.split(".")[0])
    assert changed == {"backbone", "mixture", "colors"}
    batch = coloured(8)
    assert set(second.train().loss(batch)) == {"mixture"}
    assert not any(m.training for m in second.vae.modules())
    assert second.measure(batch, 0) == second.measure(batch, 0)
    with pytest.raises(InstantiationException, match=r"method\.source was made with other sizes"):
        tiny("diverse_colorization", *given, "method.vae.dim=5")
    other, data, trainer = tiny("colorization", "trainer.max_steps=1")
    trainer.fit(other, data)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(InstantiationException, match=r"method\.source is a run of something else"):
        tiny("diverse_colorization", f"method.source.path={tmp_path / 'other.ckpt'}")


def test_images_for_the_axes_come_from_everywhere():
    class Data:
        def size(self, split):
            return 100

        def scan(self, split, start, stop):
            for i in range(start, stop):
                yield {"crops": [torch.tensor([i])]}

    found = torch.cat(list(scattered(Data(), 20, runs=10))).tolist()
    assert found == [i for start in range(0, 100, 10) for i in (start, start + 1)]
    assert len(list(scattered(Data(), 500, runs=10))) == 100


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"vae": {"size": 12}}, "size"),
        ({"vae": {"size": 4}}, "size"),
        ({"vae": {"dim": 0}}, "dim"),
        ({"vae": {"width": 0}}, "width"),
        ({"vae": {"kl": -1.0}}, "kl"),
        ({"vae": {"gradient": -1.0}}, "gradient"),
        ({"vae": {"principal": -1}}, "principal"),
        ({"vae": {"principal_reduction": "max"}}, "principal_reduction must be mean or sum"),
        ({"vae": {"kl_reduction": "max"}}, "kl_reduction"),
        ({"mixture": {"components": 0}}, "components"),
        ({"mixture": {"sigma": 0.0}}, "sigma"),
        ({"mixture": {"grid": 0}}, "grid"),
        ({"mixture": {"likelihood": "x"}}, "likelihood"),
        ({"mixture": {"divide_by": "x"}}, "divide_by"),
        ({"vae": {"dropout": 1.0}}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"mixture": {"dropout": -0.1}}, "dropout must lie"),
        ({"samples": 5}, r"samples must lie in \[1, 4\]"),
        ({"fields": 1}, "fields"),
    ],
)
def test_bad_values_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        made(**bad)


# Processes.

N = 12


def step():
    """All terms of this process's share of a batch, for both readings of KL."""
    rows = slice(rank() * N // world_size(), (rank() + 1) * N // world_size())
    truth, weight = normals(N, 2, 4, 4)[rows], uniform(N, 4, 4)[rows]
    x, z = normals(N, 5, seed=1)[rows], normals(N, 3, seed=2)[rows]
    axes, variances = principal_axes(normals(30, 2, 4, 4, seed=3), 4)

    def loss(w):
        field = (x @ w[:, :32]).view(-1, 2, 4, 4)
        mu, log_var = (x @ w[:, 32:38]).chunk(2, 1)
        means, logits = (x @ w[:, 38:44]).view(-1, 2, 3), x @ w[:, 44:46]
        terms = [
            weighted_distance(field, truth, weight),
            gradient_distance(field, truth),
            principal_distance(field, truth, axes.double(), variances.double()),
            kl_divergence(mu, log_var),
            kl_divergence(mu, log_var, "sum"),
            mixture_loss(z, logits.log_softmax(1), means, 0.5),
        ]
        return torch.stack(terms).sum()

    return value_and_gradient(loss, normals(5, 46, seed=4) / 3)


@pytest.mark.ddp
@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one(world):
    alone = step()
    for found in on_processes(world, step):
        torch.testing.assert_close(found["value"], alone["value"])
        torch.testing.assert_close(found["gradient"], alone["gradient"])
