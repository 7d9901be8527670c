"""VICReg: its formula as loops, its invariants, and processes against one."""

import math

import pytest
import torch
from processes import on_processes, value_and_gradient
from torch import nn

from unlabeled.dist import gather, mine
from unlabeled.methods.vicreg import VICReg, covariance, variance, vicreg_loss
from unlabeled.parts.losses import norm_hinge


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def white(n=64, d=8):
    """Centred columns (n, d) of unit variance, uncorrelated, the variance over n - 1."""
    z = normals(n, d)
    return torch.linalg.qr(z - z.mean(0))[0] * math.sqrt(n - 1)


def total(z1, z2, lambd=25.0, mu=25.0, nu=1.0, **options):
    return sum(vicreg_loss(z1, z2, lambd, mu, nu, **options).values()).item()


def literal(z1, z2, lambd, mu, nu, share=1.0):
    n, d = z1.shape
    s = sum((z1[i, j] - z2[i, j]).item() ** 2 for i in range(n) for j in range(d)) / (n * d)
    v = c = 0.0
    for z in (z1, z2):
        mean = [sum(z[i, j].item() for i in range(n)) / n for j in range(d)]

        def cov(j, k, z=z, mean=mean):
            rows = range(n)
            return sum((z[i, j] - mean[j]) * (z[i, k] - mean[k]) for i in rows).item() / (n - 1)

        v += sum(max(0.0, 1 - math.sqrt(cov(j, j) + 1e-4)) for j in range(d)) / d
        c += sum(cov(j, k) ** 2 for j in range(d) for k in range(d) if j != k) / d
    return lambd * s, mu * share * v, nu * c


@pytest.mark.parametrize("halved", [False, True])
def test_is_its_formula(halved):
    z1, z2 = normals(6, 4) * 0.5 + 3, normals(6, 4, seed=1) * 0.8 - 1
    terms = vicreg_loss(z1, z2, 25, 10, 2, halve_variance=halved)
    expected = literal(z1, z2, 25, 10, 2, share=0.5 if halved else 1.0)
    assert list(terms) == ["invariance", "variance", "covariance"]
    for value, right in zip(terms.values(), expected, strict=True):
        assert right > 0
        assert value.item() == pytest.approx(right, rel=1e-12)


def test_constant_embeddings_cost_all_of_the_variance_and_no_covariance():
    z = torch.full((16, 8), 3.0, dtype=torch.float64)
    assert variance(z).item() == pytest.approx(0.99, abs=1e-15)
    assert covariance(z).item() == 0
    assert total(z, z) == pytest.approx(25 * 2 * 0.99)
    assert total(z, z, halve_variance=True) == pytest.approx(25 * 0.99)


def test_identical_white_embeddings_cost_nothing():
    assert total(white(), white()) == pytest.approx(0, abs=1e-12)
    # Anything wider costs nothing more: the hinge has one side.
    assert variance(3 * white()).item() == 0
    assert covariance(3 * white()).item() == pytest.approx(0, abs=1e-12)


def test_variances_divide_by_one_less():
    shrunk = white(4, 2) * 0.8  # the biased variance would be three quarters of this
    expected = 1 - math.sqrt(0.64 + 1e-4)
    assert variance(shrunk).item() == pytest.approx(expected, rel=1e-12)
    twin = white(4, 1).repeat(1, 2)  # two equal columns of variance 1
    assert covariance(twin).item() == pytest.approx(1.0)


def test_orders_of_the_batch_of_columns_and_of_views_do_not_matter():
    z1, z2 = normals(9, 5), normals(9, 5, seed=1) * 0.3
    rows, columns = torch.randperm(9), torch.randperm(5)
    loss = total(z1, z2)
    assert total(z1[rows], z2[rows]) == pytest.approx(loss)
    assert total(z1[:, columns], z2[:, columns]) == pytest.approx(loss)
    assert total(z2, z1) == pytest.approx(loss)
    assert total(z1[rows], z2) != pytest.approx(loss)  # pairs do matter


def test_covariance_is_of_centred_embeddings():
    z = normals(9, 5)
    for part in (variance, covariance):
        torch.testing.assert_close(part(z + 100), part(z))


def test_half_precision_is_summed_in_full():
    z1, z2 = normals(64, 8).bfloat16(), normals(64, 8, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = vicreg_loss(z1, z2, 25, 25, 1)
    exact = vicreg_loss(z1.double(), z2.double(), 25, 25, 1)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=1e-5)


def test_gradients_are_those_of_numbers():
    z1, z2 = normals(5, 3).requires_grad_(), (normals(5, 3, seed=1) * 0.3).requires_grad_()

    def loss(a, b):
        return sum(vicreg_loss(a, b, 25, 25, 1).values())

    assert torch.autograd.gradcheck(loss, (z1, z2))
    collapsed = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
    loss(collapsed, collapsed * 1).backward()
    assert collapsed.grad.isfinite().all()  # the square root of no variance at all


def test_a_hinge_on_norms_leaves_short_rows_alone():
    h = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = norm_hinge(h, 2.0)
    assert loss.item() == pytest.approx((5 - 2) ** 2 / 3)
    loss.backward()
    torch.testing.assert_close(h.grad[0], 2 * (5 - 2) / 3 * torch.tensor([0.6, 0.8]).double())
    assert torch.equal(h.grad[1:], torch.zeros(2, 2).double())


def parts_of(**options):
    backbone = nn.Linear(3, 4)
    backbone.dim = 4
    settings = {"width": 6, "depth": 2, "norm": "batch", **options}
    method = VICReg(backbone, nn.Identity(), None, **settings)
    views = [torch.randn(8, 3), torch.randn(8, 3)]
    return method, method.loss({"views": views})


def test_the_method_has_the_hinge_only_where_it_is_asked_for():
    method, terms = parts_of()
    assert list(terms) == ["invariance", "variance", "covariance"]
    assert method.seen["embeddings"].shape == (8, 6)
    _, terms = parts_of(norm_hinge=0.1)
    assert list(terms)[-1] == "norm"


def test_the_expander_is_the_papers():
    method, _ = parts_of(depth=3)
    kinds = [type(layer).__name__ for layer in method.expander]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert method.expander[-1].bias is None


@pytest.mark.parametrize("name", ["lambd", "mu", "nu", "norm_hinge"])
def test_bad_weights_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is a weight, at least 0, got -1"):
        parts_of(**{name: -1})


def measured():
    """Loss and gradient for weights, on this process's share of 12 images."""
    x, w = normals(2, 12, 5), normals(5, 6, seed=3) * 0.3

    def loss(w):
        z1, z2 = mine(x[0]) @ w, mine(x[1]) @ w
        terms = vicreg_loss(gather(z1), gather(z2), 25, 25, 1)
        return sum(terms.values()) + norm_hinge(torch.cat([z1, z2]), 0.5)

    return value_and_gradient(loss, w)


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_are_one(world):
    alone = measured()
    for found in on_processes(world, measured):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)
