"""Barlow Twins: its invariants and traps, and processes against one."""

import math
from functools import partial

import pytest
import torch
from processes import mean, on_processes, value_and_gradient
from torch import nn

from unlabeled.dist import SyncBatchNorm, gather, mine
from unlabeled.methods.barlow_twins import BarlowTwins, barlow_twins_loss


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def white(n=64, d=8):
    """Centred columns (n, d) of unit variance, uncorrelated."""
    z = normals(n, d)
    return torch.linalg.qr(z - z.mean(0))[0] * math.sqrt(n)


def total(z1, z2, lambd=0.1, **options):
    return sum(barlow_twins_loss(z1, z2, lambd, **options).values()).item()


def literal(z1, z2, lambd, centred):
    """Both terms from C of the lecture, whose sums run over b one by one."""
    n, d = z1.shape
    if centred:
        z1, z2 = z1 - z1.mean(0), z2 - z2.mean(0)
    on = off = 0.0
    for i in range(d):
        for j in range(d):
            product = sum(z1[b, i].item() * z2[b, j].item() for b in range(n))
            first = math.sqrt(sum(z1[b, i].item() ** 2 for b in range(n)))
            second = math.sqrt(sum(z2[b, j].item() ** 2 for b in range(n)))
            c = product / (first * second)
            on, off = (on + (1 - c) ** 2, off) if i == j else (on, off + lambd * c**2)
    return on, off


@pytest.mark.parametrize("centred", [True, False])
def test_is_its_formula(centred):
    z1, z2 = normals(6, 4) * 3 + 1, normals(6, 4, seed=1) * 2 - 1
    terms = barlow_twins_loss(z1, z2, 0.0051, centred=centred, eps=0)
    on, off = literal(z1, z2, 0.0051, centred)
    assert terms["invariance"].item() == pytest.approx(on, rel=1e-12)
    assert terms["redundancy"].item() == pytest.approx(off, rel=1e-12)
    assert on != pytest.approx(literal(z1, z2, 0.0051, not centred)[0], rel=1e-2)


def test_both_correlations_agree_on_centred_embeddings():
    z1, z2 = white(), normals(64, 8, seed=1)
    z2 = z2 - z2.mean(0)
    assert total(z1, z2, centred=False) == pytest.approx(total(z1, z2), rel=1e-12)


def test_identical_white_embeddings_cost_nothing():
    assert total(white(), white()) < 1e-9  # eps is all that is left
    assert total(white(), white(), eps=0) == pytest.approx(0, abs=1e-20)


def test_opposite_white_embeddings_cost_4_per_dimension():
    assert total(white(), -white(), eps=0) == pytest.approx(4 * 8, rel=1e-12)


def test_constant_embeddings_cost_1_per_dimension():
    z = torch.full((64, 8), 3.0, dtype=torch.float64)
    assert total(z, z) == pytest.approx(8, rel=1e-12)
    # Uncentred, collapse is cheap for invariance and dear for redundancy.
    terms = barlow_twins_loss(z, z, 0.1, centred=False, eps=0)
    assert terms["invariance"].item() == pytest.approx(0, abs=1e-20)
    assert terms["redundancy"].item() == pytest.approx(0.1 * 8 * 7, rel=1e-12)


def test_scale_and_shift_of_dimensions_do_not_matter_but_signs_do():
    z1, z2 = normals(32, 6), normals(32, 6, seed=1) + normals(32, 6)
    scale, shift = torch.rand(6, dtype=torch.float64) + 0.5, normals(6, seed=2)
    loss = total(z1, z2, eps=0)
    assert total(z1 * scale + shift, z2, eps=0) == pytest.approx(loss, rel=1e-10)
    assert total(z1, z2 * scale + shift, eps=0) == pytest.approx(loss, rel=1e-10)
    flipped = z1 * torch.tensor([-1.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    first, turned = (barlow_twins_loss(z, z2, 0.1, eps=0) for z in (z1, flipped))
    c = (white_columns(z1).T @ white_columns(z2))[0, 0].item()
    change = (1 + c) ** 2 - (1 - c) ** 2  # the sign of the first row of C
    assert (turned["invariance"] - first["invariance"]).item() == pytest.approx(change)
    torch.testing.assert_close(turned["redundancy"], first["redundancy"])


def white_columns(z):
    z = z - z.mean(0)
    return z / z.norm(dim=0)


def test_views_may_be_swapped_and_both_batches_reordered():
    z1, z2, order = normals(9, 5), normals(9, 5, seed=1), torch.randperm(9)
    assert total(z2, z1) == pytest.approx(total(z1, z2))
    assert total(z1[order], z2[order]) == pytest.approx(total(z1, z2))


@pytest.mark.parametrize("d", [2, 5, 8])
def test_redundancy_counts_all_entries_off_the_diagonal_once(d):
    z1, z2 = normals(12, d), normals(12, d, seed=1)
    c = white_columns(z1).T @ white_columns(z2)
    off = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten()  # the official code's selection
    masked = c[~torch.eye(d, dtype=torch.bool)]
    assert len(off) == len(masked) == d * (d - 1)
    torch.testing.assert_close(off.sort().values, masked.sort().values)
    redundancy = barlow_twins_loss(z1, z2, 1.0, eps=0)["redundancy"]
    torch.testing.assert_close(redundancy, off.square().sum())
    ones = torch.ones(12, d, dtype=torch.float64)  # C is 1 everywhere: the sum counts entries
    same = barlow_twins_loss(ones, ones, 1.0, centred=False, eps=0)["redundancy"]
    assert same.item() == pytest.approx(d * (d - 1))


def test_deviations_are_biased_as_c_is():
    # An unbiased deviation with C over N would leave (N - 1) / N on the diagonal.
    z = normals(64, 3)
    assert barlow_twins_loss(z, z, 1.0, eps=0)["invariance"].item() == pytest.approx(0, abs=1e-20)


def test_a_batch_smaller_than_the_width_cannot_reach_zero():
    z = normals(4, 16)
    assert total(z, z, lambd=1.0, eps=0) > 1  # the rank of C is below 4


def test_embeddings_are_left_as_they_were_and_gradients_are_those_of_numbers():
    z1, z2 = normals(6, 4).requires_grad_(), normals(6, 4, seed=1).requires_grad_()
    before = z1.detach().clone()
    for centred in (True, False):

        def loss(a, b, centred=centred):
            return sum(barlow_twins_loss(a, b, 0.1, centred=centred).values())

        assert torch.autograd.gradcheck(loss, (z1, z2))
    assert torch.equal(z1.detach(), before)
    collapsed = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    sum(barlow_twins_loss(collapsed, collapsed * 1, 0.1).values()).backward()
    assert collapsed.grad.isfinite().all()


def test_half_precision_is_summed_in_full():
    z1, z2 = normals(64, 8).bfloat16(), normals(64, 8, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = barlow_twins_loss(z1, z2, 0.0051)
    exact = barlow_twins_loss(z1.double(), z2.double(), 0.0051)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=1e-5)


def parts_of(**options):
    torch.manual_seed(0)
    backbone = nn.Linear(3, 4)
    backbone.dim = 4
    settings = {"width": 6, "norm": "batch", **options}
    method = BarlowTwins(backbone, nn.Identity(), None, **settings)
    views = [normals(8, 3).float(), normals(8, 3, seed=1).float()]
    return method, method.loss({"views": views})


def test_the_scale_is_a_factor_of_the_whole_loss():
    once, small = parts_of()[1], parts_of(scale=0.024)[1]
    for name, value in once.items():
        assert small[name].item() == pytest.approx(0.024 * value.item(), rel=1e-5)


def test_the_projector_is_the_papers_and_the_loss_is_its_last_norm():
    method, _ = parts_of()
    kinds = [type(layer).__name__ for layer in method.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert all(layer.bias is None for layer in method.projector if isinstance(layer, nn.Linear))
    # The paper ends on a batch norm without scale and shift, which is `centred`, in the loss.
    z1, z2 = normals(16, 6), normals(16, 6, seed=1)
    bn = SyncBatchNorm(6, affine=False).double()
    c = bn(z1).T @ bn(z2) / 16
    on = (1 - c.diagonal()).square().sum()
    torch.testing.assert_close(barlow_twins_loss(z1, z2, 1.0)["invariance"], on)


def measured():
    """Loss and gradient for weights, on this process's share of 12 images."""
    x, w = normals(2, 12, 5) + 0.5, normals(5, 6, seed=3)

    def loss_of(centred):
        def loss(w):
            torch.manual_seed(0)
            bn = SyncBatchNorm(6).double()
            z1, z2 = (bn(mine(view) @ w).relu() for view in x)
            terms = barlow_twins_loss(gather(z1), gather(z2), 0.1, centred=centred)
            return sum(terms.values())

        return loss

    return [value_and_gradient(loss_of(centred), w) for centred in (True, False)]


def official(undivided):
    """The loss, and the gradient of the projector as processes share it."""
    torch.manual_seed(0)
    backbone = nn.Linear(3, 4)
    backbone.dim = 4
    method = BarlowTwins(backbone, nn.Identity(), None, width=6, undivided=undivided).double()
    views = [mine(normals(12, 3, seed=seed)) for seed in (0, 1)]
    loss = sum(method.loss({"views": views}).values())
    loss.backward()
    return mean(loss.detach()), mean(method.projector[0].weight.grad)


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
def test_the_official_gradient_is_a_part_of_it():
    loss, gradient = official(True)
    assert torch.equal(official(False)[1], gradient)
    for found in on_processes(2, partial(official, False)):
        torch.testing.assert_close(found[0], loss)
        torch.testing.assert_close(found[1], gradient / 2)


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_are_one(world):
    alone = measured()
    for found in on_processes(world, measured):
        torch.testing.assert_close(found, alone, rtol=1e-8, atol=1e-9)
