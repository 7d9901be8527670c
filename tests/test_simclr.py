"""SimCLR: its invariants, the lecture's reading, and the loss in bounded memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from processes import on_processes, value_and_gradient
from torch import nn
from torch.profiler import ProfilerActivity, profile

from unlabeled.backbones.load import fresh
from unlabeled.backbones.resnet import ResNet
from unlabeled.backbones.unit import Unit
from unlabeled.batch import normalize
from unlabeled.dist import gather, mine
from unlabeled.methods.simclr import SimCLR, nt_xent
from unlabeled.parts.losses import norm_hinge

CHUNKS = (None, 1, 3, 4, 5, 12, 64)  # of 12 rows: none, ragged, exact, all, more


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def units(*shape, seed=0):
    return F.normalize(normals(*shape, seed=seed), dim=-1)


def literal(a, b, t, include_self):
    z, n, total = torch.cat([a, b]), len(a), 0.0
    for i in range(2 * n):
        kept = [k for k in range(2 * n) if include_self or k != i]
        denominator = sum(math.exp(z[i] @ z[k] / t) for k in kept)
        total -= math.log(math.exp(z[i] @ z[(i + n) % (2 * n)] / t) / denominator)
    return total / (2 * n)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_is_its_formula(chunk, include_self):
    a, b = units(6, 4), units(6, 4, seed=1)
    loss = nt_xent(a, b, 0.3, include_self=include_self, chunk=chunk)
    assert loss.item() == pytest.approx(literal(a, b, 0.3, include_self), rel=1e-12)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS[1:])
def test_chunks_have_the_plain_gradient(chunk, include_self):
    grads = []
    for size in (None, chunk):
        a, b = units(6, 4).requires_grad_(), units(6, 4, seed=1).requires_grad_()
        (3 * nt_xent(a, b, 0.1, include_self=include_self, chunk=size)).backward()
        grads.append((a.grad, b.grad))
    assert grads[0][0].abs().max() > 0.01
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [None, 100])
def test_equal_embeddings_cost_the_logarithm_of_their_number(chunk):
    same = torch.full((4096, 2), math.sqrt(0.5), dtype=torch.float64)[
        : 4096 if chunk is None else 64
    ]
    expected = 9.010791269515602 if chunk is None else math.log(127)
    assert nt_xent(same, same, 0.1, chunk=chunk).item() == pytest.approx(expected, rel=1e-12)
    literal = nt_xent(same, same, 0.1, include_self=True, chunk=chunk).item()
    assert literal == pytest.approx(math.log(2 * len(same)), rel=1e-12)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("t", [0.1, 0.5])
def test_orthogonal_classes_have_a_closed_form(t, chunk):
    eye = torch.eye(8, dtype=torch.float64)
    others = 14 * math.exp(-1 / t)
    assert nt_xent(eye, eye, t, chunk=chunk).item() == pytest.approx(math.log(1 + others))
    literal = nt_xent(eye, eye, t, include_self=True, chunk=chunk).item()
    assert literal == pytest.approx(math.log(2 + others))


def test_the_lectures_reading_never_falls_below_log_2():
    values = []
    for seed in range(5):
        z = units(5, 30, seed=seed)
        values.append(nt_xent(z, z, 0.01, include_self=True).item())
        assert nt_xent(z, z, 0.01).item() < 0.01  # the paper's can
    assert min(values) >= math.log(2)
    assert min(values) == pytest.approx(math.log(2), abs=1e-3)


def test_views_may_be_swapped_and_both_batches_reordered():
    a, b, order = units(7, 5), units(7, 5, seed=1), torch.randperm(7)
    loss = nt_xent(a, b, 0.2)
    torch.testing.assert_close(nt_xent(b, a, 0.2), loss)
    torch.testing.assert_close(nt_xent(a[order], b[order], 0.2), loss)
    # and one only may not: pairs would be torn
    assert not torch.isclose(nt_xent(a[torch.arange(7).roll(1)], b, 0.2), loss)


def test_the_layout_of_blocks_is_that_of_pairs():
    a, b, t = units(5, 4), units(5, 4, seed=1), 0.2
    z = torch.stack([a, b], 1).flatten(0, 1)  # a1 b1 a2 b2 ...
    logits = (z @ z.T / t).fill_diagonal_(-torch.inf)
    partner = torch.arange(10) ^ 1
    torch.testing.assert_close(nt_xent(a, b, t), F.cross_entropy(logits, partner))


def peak(n, chunk, dim=16, warm=True):
    """Bytes alive at once in a forward and backward pass, beyond those alive before."""
    a, b = (units(n, dim, seed=i).float().requires_grad_() for i in range(2))
    if warm:
        nt_xent(a, b, 0.1, chunk=chunk).backward()  # what is allocated once only
    a.grad = b.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        nt_xent(a, b, 0.1, chunk=chunk).backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_chunks_bound_the_memory():
    square = 4 * (2 * 512) ** 2  # bytes of one matrix of similarities of 512 pairs
    plain, bounded = peak(512, None), peak(512, 32)
    assert plain > 2 * square  # so the measure sees what it should
    # A few matrices of 32 rows, and a few copies of the embeddings.
    assert bounded < 5 * 4 * 32 * 1024 + 10 * 4 * 1024 * 16
    assert bounded < plain / 8
    assert peak(1024, 32) < 2.2 * bounded  # linear in the batch
    assert peak(1024, None) > 3.5 * plain  # quadratic


def test_the_papers_batch_takes_the_memory_of_its_chunks():
    """4096 pairs of 128 numbers, whose similarities would be eight chunks: see docs/scale.md."""
    rows = 4 * 1024 * 2 * 4096  # bytes of one chunk of similarities
    most = peak(4096, 1024, dim=128, warm=False)
    assert rows < most < 5 * rows + 10 * 4 * 8192 * 128  # a plain loss keeps over 16


def parts_of(**options):
    torch.manual_seed(0)
    backbone = nn.Linear(3, 4)
    backbone.dim = 4
    settings = {"hidden": 8, "dim": 6, "norm": "batch", **options}
    method = SimCLR(backbone, nn.Identity(), None, **settings)
    nn.init.constant_(method.projector[-1].weight, 3.0)
    return method, method.loss({"views": [normals(8, 3).float(), normals(8, 3, seed=1).float()]})


def test_the_loss_does_not_see_lengths_and_the_hinge_does():
    plain = parts_of()[1]
    method = parts_of()[0]
    with torch.no_grad():
        method.projector[-1].weight.mul_(5)
    views = {"views": [normals(8, 3).float(), normals(8, 3, seed=1).float()]}
    torch.testing.assert_close(method.loss(views), plain, rtol=1e-5, atol=1e-6)
    assert list(plain) == ["contrast"]
    hinged = parts_of(norm_hinge=0.5)
    assert list(hinged[1]) == ["contrast", "norm"]
    assert hinged[1]["norm"] > 0
    z = hinged[0].projector(hinged[0].backbone(torch.cat(views["views"])))
    expected = 0.5 * norm_hinge(z, math.sqrt(6)).item()
    assert hinged[1]["norm"].item() == pytest.approx(expected, rel=1e-5)


def test_the_scale_is_a_factor():
    once, twice = (parts_of(scale=s)[1]["contrast"].item() for s in (1.0, 2.0))
    assert twice == pytest.approx(2 * once)


def test_chunks_reach_the_method():
    plain, chunked = (parts_of(chunk=c)[1]["contrast"] for c in (None, 3))
    torch.testing.assert_close(chunked, plain)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"norm_hinge": -1.0}, "norm_hinge must be at least 0, got -1"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_values_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        parts_of(**options)


def measured():
    """Loss and gradient for weights, on this process's share of 12 images."""
    x, w = normals(2, 12, 5), normals(5, 6, seed=3)

    def loss_of(**options):
        def loss(w):
            a, b = (gather(F.normalize(mine(view) @ w, dim=1)) for view in x)
            return nt_xent(a, b, 0.2, **options)

        return loss

    settings = ({}, {"include_self": True}, {"chunk": 5}, {"chunk": 7, "include_self": True})
    return [value_and_gradient(loss_of(**options), w) for options in settings]


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_are_one(world):
    alone = measured()
    for found in on_processes(world, measured):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


def test_a_backbone_may_see_pixels_without_mean_and_deviation():
    model = ResNet(depth=18, width=4, stem="small").eval()
    unit, x = Unit(model), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(unit.seen(normalize(x)), x)
    torch.testing.assert_close(unit(normalize(x)), model(x), atol=1e-4, rtol=1e-4)
    again = fresh(unit.config)
    assert isinstance(again, Unit)
    assert again.state_dict().keys() == unit.state_dict().keys()


def test_the_projectors_last_norm_has_a_scale_and_no_shift():
    backbone = nn.Linear(4, 4)
    backbone.dim = 4
    norm = SimCLR(backbone, nn.Identity(), None, hidden=6, dim=5).projector[-1]
    assert norm.weight.requires_grad
    assert not norm.bias.requires_grad
    assert not norm.bias.any()
    linear = SimCLR(backbone, nn.Identity(), None, hidden=6, dim=5, norm="none").projector[-1]
    assert linear.weight.requires_grad
