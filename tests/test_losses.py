"""Every loss against its paper's formula written as loops, in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from unlabeled.methods.barlow_twins import barlow_twins_loss
from unlabeled.methods.byol import byol_loss
from unlabeled.methods.simclr import nt_xent
from unlabeled.methods.swav import swapped_prediction
from unlabeled.parts.losses import binary_nce, info_nce, negative_cosine
from unlabeled.parts.nce import pirl_nce
from unlabeled.parts.sinkhorn import sinkhorn


def units(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_nt_xent_is_its_formula():
    a, b, t = units(5, 7), units(5, 7, seed=1), 0.3
    z, total = torch.cat([a, b]), 0.0
    for i in range(10):
        j = (i + 5) % 10
        denominator = sum(math.exp(z[i] @ z[k] / t) for k in range(10) if k != i)
        total -= math.log(math.exp(z[i] @ z[j] / t) / denominator)
    assert nt_xent(a, b, t).item() == pytest.approx(total / 10, rel=1e-12)


def test_nt_xent_closed_forms():
    same = torch.ones(8, 4, dtype=torch.float64) / 2
    assert nt_xent(same, same, 0.1).item() == pytest.approx(math.log(15))
    assert nt_xent(same, same, 0.1, include_self=True).item() == pytest.approx(math.log(16))
    eye = torch.eye(8, dtype=torch.float64)
    expected = math.log(1 + 14 * math.exp(-1 / 0.1))
    assert nt_xent(eye, eye, 0.1).item() == pytest.approx(expected)
    assert nt_xent(eye, eye, 0.1, include_self=True).item() >= math.log(2)


def test_nt_xent_does_not_care_for_order():
    a, b = units(6, 5), units(6, 5, seed=1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    loss = nt_xent(a, b, 0.2)
    torch.testing.assert_close(nt_xent(b, a, 0.2), loss)
    torch.testing.assert_close(nt_xent(a[order], b[order], 0.2), loss)


def test_info_nce_is_its_formula():
    q, k, n, t = units(4, 6), units(4, 6, seed=1), units(9, 6, seed=2), 0.2
    total = 0.0
    for i in range(4):
        positive = math.exp(q[i] @ k[i] / t)
        total -= math.log(positive / (positive + sum(math.exp(q[i] @ m / t) for m in n)))
    assert info_nce(q, k, n, t).item() == pytest.approx(total / 4, rel=1e-12)


def test_info_nce_of_equal_logits():
    q, n = torch.zeros(3, 4), torch.zeros(65536, 4)
    assert info_nce(q, q, n, 0.07).item() == pytest.approx(11.090370147631774, rel=1e-6)


def test_binary_nce_is_its_formula():
    scores, t, n, z = units(3, 6), 0.07, 50, 123.0
    total = 0.0
    for row in scores:
        k = len(row) - 1
        p = [math.exp(s / t) / z for s in row]
        noise = k / n
        total -= math.log(p[0] / (p[0] + noise))
        total -= sum(math.log(noise / (x + noise)) for x in p[1:])
    log_z = torch.tensor(math.log(z), dtype=torch.float64)
    assert binary_nce(scores, log_z, n, t).item() == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("k", "expected"), [(32, 4.481200638802598), (4096, 9.31788822709895), (32000, 11.373506806)]
)
def test_binary_nce_of_noise_is_known(k, expected):
    # p = 1 / n for all: equal scores s with Z = n exp(s / t)
    n, t, s = 1000, 0.07, 0.3
    scores = torch.full((2, k + 1), s, dtype=torch.float64)
    log_z = torch.tensor(math.log(n) + s / t, dtype=torch.float64)
    assert binary_nce(scores, log_z, n, t).item() == pytest.approx(expected, rel=1e-8)


def test_pirl_nce_is_equation_4():
    scores = units(3, 8) * 9
    total = first = 0.0
    for row in scores:
        s = sum(math.exp(x) for x in row[1:])

        def h(x, s=s):
            return math.exp(x) / (math.exp(x) + s)

        first -= math.log(h(row[0]))
        total -= math.log(h(row[0])) + sum(math.log(1 - h(x)) for x in row[1:])
    assert pirl_nce(scores, both=True).item() == pytest.approx(total / 3, rel=1e-12)
    assert pirl_nce(scores, both=False).item() == pytest.approx(first / 3, rel=1e-12)


def test_pirl_nce_ignores_a_masked_negative():
    scores = units(3, 8) * 9
    masked = torch.cat([scores, torch.full((3, 1), -torch.inf, dtype=torch.float64)], 1)
    for both in (True, False):
        torch.testing.assert_close(pirl_nce(masked, both=both), pirl_nce(scores, both=both))


def test_byol_loss_is_its_formula_and_simsiams():
    p1, p2, z1, z2 = (torch.randn(5, 4, dtype=torch.float64) for _ in range(4))
    total = 0.0
    for p, z in ((p1, z2), (p2, z1)):
        for i in range(5):
            a, b = p[i] / p[i].norm(), z[i] / z[i].norm()
            total += ((a - b) ** 2).sum().item() / 5
    loss = byol_loss(p1, p2, z1, z2).item()
    assert loss == pytest.approx(total, rel=1e-12)
    simsiam = (negative_cosine(p1, z2) + negative_cosine(p2, z1)).item() / 2
    assert loss == pytest.approx(4 + 4 * simsiam, rel=1e-12)
    assert byol_loss(p1, p2, -p2, -p1).item() == pytest.approx(8)
    assert byol_loss(p1, p2, 3 * p2, 2 * p1).item() == pytest.approx(0, abs=1e-12)


def test_negative_cosine_gives_its_target_no_gradient():
    p, z = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    negative_cosine(p, z).backward()
    assert p.grad is not None
    assert z.grad is None


def test_barlow_twins_is_its_formula():
    z1, z2, lambd = units(6, 4) * 3 + 1, units(6, 4, seed=1) * 2 - 5, 0.0051
    c = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            a, b = z1[:, i] - z1[:, i].mean(), z2[:, j] - z2[:, j].mean()
            c[i, j] = (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
    on = sum((1 - c[i, i]) ** 2 for i in range(4))
    off = sum(lambd * c[i, j] ** 2 for i in range(4) for j in range(4) if i != j)
    terms = barlow_twins_loss(z1, z2, lambd, eps=0)
    torch.testing.assert_close(terms["invariance"], on)
    torch.testing.assert_close(terms["redundancy"], off)


def test_barlow_twins_closed_forms():
    total = lambda z1, z2: sum(barlow_twins_loss(z1, z2, 0.1).values()).item()  # noqa: E731
    z = torch.randn(64, 8, dtype=torch.float64)
    z = torch.linalg.qr(z - z.mean(0))[0]
    z = z - z.mean(0)
    white = torch.linalg.qr(z)[0] * 8  # unit variance, uncorrelated
    assert total(white, white) == pytest.approx(0, abs=1e-8)
    assert total(white, -white) == pytest.approx(4 * 8, rel=1e-4)
    assert total(torch.ones(64, 8), torch.ones(64, 8)) == pytest.approx(8)
    a, b = torch.randn(64, 8, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)
    assert total(a, b) == pytest.approx(total(b, a))
    assert total(a * 5 + 3, b) == pytest.approx(total(a, b), rel=1e-4)


def test_uncentred_barlow_twins_is_the_lectures():
    z1, z2 = units(6, 3) + 1, units(6, 3, seed=1) + 1
    c = torch.einsum("bi,bj->ij", z1, z2) / torch.outer(z1.norm(dim=0), z2.norm(dim=0))
    terms = barlow_twins_loss(z1, z2, 1.0, centred=False, eps=0)
    torch.testing.assert_close(terms["invariance"], (1 - c.diagonal()).square().sum())


def literal_sinkhorn(scores, epsilon, iterations):
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


def test_sinkhorn_is_the_papers():
    scores = units(12, 5)
    q = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(q, literal_sinkhorn(scores, 0.05, 3))
    torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=torch.float64))
    order = torch.randperm(12)
    torch.testing.assert_close(sinkhorn(scores[order], 0.05, 3), q[order])
    torch.testing.assert_close(sinkhorn(scores + torch.randn(5), 0.05, 3), q)  # per prototype
    marginals = sinkhorn(scores, 0.5, 200).sum(0)
    torch.testing.assert_close(marginals, torch.full((5,), 12 / 5, dtype=torch.float64))


def test_sinkhorn_survives_half_precision():
    scores = units(12, 5).half()
    q = sinkhorn(scores, 0.05, 3)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q, literal_sinkhorn(scores.double(), 0.05, 3).float())


def test_swapped_prediction_is_its_formula():
    scores = [units(4, 6, seed=i) for i in range(4)]
    codes = [torch.rand(4, 6, dtype=torch.float64).softmax(1) for _ in range(2)]
    total = 0.0
    for a in range(2):
        for v in range(4):
            if v == a:
                continue
            for i in range(4):
                p = (scores[v][i] / 0.1).exp() / (scores[v][i] / 0.1).exp().sum()
                total -= (codes[a][i] * p.log()).sum().item() / 4 / 3 / 2
    assert swapped_prediction(codes, scores, 0.1).item() == pytest.approx(total, rel=1e-12)


def test_swav_of_uniform_scores_is_log_k():
    scores = [torch.zeros(4, 3000)] * 3
    codes = [sinkhorn(s) for s in scores[:2]]
    assert swapped_prediction(codes, scores, 0.1).item() == pytest.approx(8.006367567650246)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_run_in_full_precision(dtype):
    z = [units(16, 8, seed=i).to(dtype) for i in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = {
            "simclr": nt_xent(z[0], z[1], 0.07),
            "moco": info_nce(z[0], z[1], z[2], 0.07),
            "byol": byol_loss(z[0], z[1], z[2], z[0]),
            "barlow": sum(barlow_twins_loss(z[0], z[1], 0.005).values()),
            "nce": binary_nce(z[0], torch.tensor(3.0), 100, 0.07),
            "swav": swapped_prediction([z[0].softmax(1)], [z[1], z[2]], 0.1),
        }
    exact = [x.double() for x in z]
    assert {name: v.dtype for name, v in values.items()} == dict.fromkeys(values, torch.float32)
    assert values["simclr"].item() == pytest.approx(nt_xent(*exact[:2], 0.07).item(), rel=1e-5)
    assert values["moco"].item() == pytest.approx(info_nce(*exact, 0.07).item(), rel=1e-5)
    assert all(v.isfinite() for v in values.values())
