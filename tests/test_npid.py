"""Instance discrimination, its memory bank, and the losses that PIRL shares with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from processes import mean, on_processes
from test_papers import batch_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.dist import mine
from unlabeled.draws import Draws
from unlabeled.methods.npid import NPID, proximity
from unlabeled.parts.memory import MemoryBank
from unlabeled.parts.nce import MemoryNCE

N, D = 20, 6
CASES = [("binary", 16), ("softmax", 16), ("paper", 16), ("softmax", 0)]


def units(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def bank(rows=None, momentum=0.5):
    rows = units(N, D, seed=1) if rows is None else rows
    memory = MemoryBank(len(rows), rows.shape[1], momentum).to(rows.dtype)
    memory.bank.copy_(rows)
    return memory


def nce(form, negatives=16, t=0.3, reappear=True, branches=1):
    part = MemoryNCE(form, negatives=negatives, temperature=t, reappear=reappear, branches=branches)
    return part.double()


def draws(step=0):
    return Draws(0, "negatives", step)


def by_hand(form, x, memory, index, rows, t, reappear=True):
    """The loss of each image as its formula's loops, float by float."""
    m, total = memory.bank.tolist(), 0.0

    def s(a, b):
        return sum(p * q for p, q in zip(a, m[b], strict=True)) / t

    others = [
        [j for j in rows.tolist() if reappear or j != i] if len(rows) else list(range(len(m)))
        for i in index.tolist()
    ]
    every = [
        math.exp(s(v, j))
        for v, i, own in zip(x.tolist(), index.tolist(), others, strict=True)
        for j in [i, *own]
    ]
    z = len(m) * sum(every) / len(every)
    for v, i, own in zip(x.tolist(), index.tolist(), others, strict=True):
        positive, negative = math.exp(s(v, i)), [math.exp(s(v, j)) for j in own]
        if not len(rows):
            total -= math.log(positive / sum(negative))
        elif form == "binary":
            noise = len(rows) / len(m)
            total -= math.log(positive / z / (positive / z + noise))
            total -= sum(math.log(noise / (n / z + noise)) for n in negative)
        else:
            total -= math.log(positive / (positive + sum(negative)))
            if form == "paper":
                total -= sum(math.log(1 - n / (n + sum(negative))) for n in negative)
    return total / len(x)


@pytest.mark.parametrize(("form", "negatives"), CASES)
@pytest.mark.parametrize("reappear", [True, False])
def test_losses_are_their_formulas(form, negatives, reappear):
    x, index, memory = units(5, D), torch.tensor([3, 1, 19, 7, 11]), bank()
    rows = draws().integers(N, negatives)[0] if negatives else torch.empty(0)
    if negatives:
        assert (rows == index[:, None]).any()  # the masked and the unmasked loss differ
    got = nce(form, negatives, 0.3, reappear)(x, memory, index, draws())
    expected = by_hand(form, x, memory, index, rows, 0.3, reappear)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["binary", "softmax", "paper"])
@pytest.mark.parametrize("reappear", [True, False])
def test_negatives_of_each_images_own_give_the_mean_of_single_losses(form, reappear):
    x, index, memory = units(5, D), torch.tensor([3, 1, 19, 7, 11]), bank()
    own = Draws(0, "negatives", 0, rows=5)
    rows = own.integers(N, 16)
    assert len(rows.unique(dim=0)) == 5

    def part():
        made = MemoryNCE(
            form, negatives=16, temperature=0.3, reappear=reappear, per_image=True
        ).double()
        if form == "binary":
            made.log_z.fill_(1.5)  # else each single loss would estimate its own
        return made

    got = part()(x, memory, index, Draws(0, "negatives", 0, rows=5))
    scores = [
        torch.cat([(memory[i] @ v)[None], memory[r] @ v])
        for v, i, r in zip(x, index, rows, strict=True)
    ]
    masks = [torch.cat([torch.tensor([False]), r == i]) for i, r in zip(index, rows, strict=True)]
    single = []
    for s, m in zip(scores, masks, strict=True):
        e = (s / 0.3).exp()
        others = e[1:] if reappear else e[1:][~m[1:]]
        if form == "binary":
            p, noise = e / math.exp(1.5), 16 / N
            q = p[1:] if reappear else p[1:][~m[1:]]
            single.append(-(p[0] / (p[0] + noise)).log() - (noise / (q + noise)).log().sum())
        else:
            loss = -(e[0] / (e[0] + others.sum())).log()
            if form == "paper":
                loss -= (1 - others / (others + others.sum())).log().sum()
            single.append(loss)
    torch.testing.assert_close(got, torch.stack(single).mean())


def test_masking_an_images_own_row_changes_the_loss():
    x, index, memory = units(5, D), torch.tensor([3, 1, 19, 7, 11]), bank()
    for form in ("binary", "softmax", "paper"):
        kept, masked = (
            nce(form, reappear=reappear)(x, memory, index, draws()) for reappear in (True, False)
        )
        assert abs(kept - masked) > 1e-3


@pytest.mark.parametrize(("k", "expected"), [(32, 4.481200638802598), (1024, 7.931959927981299)])
def test_equal_scores_have_a_known_loss(k, expected):
    # equal memories: p = 1 / n, as Z is the mean
    same = units(1, D).expand(N, D)
    x, index = units(4, D, seed=2), torch.arange(4)
    memory = bank(same)
    x = x.clone()
    x[:] = x[0]  # one Z for the batch
    assert nce("binary", k)(x, memory, index, draws()).item() == pytest.approx(expected, rel=1e-10)
    assert math.log(k + 1) + k * math.log(1 + 1 / k) == pytest.approx(expected, rel=1e-12)
    assert nce("softmax", k)(x, memory, index, draws()).item() == pytest.approx(math.log(k + 1))


def test_without_memories_all_images_are_equally_likely():
    memory, index = bank(torch.zeros(N, D, dtype=torch.float64)), torch.arange(4)
    loss = nce("softmax", 0)(units(4, D), memory, index, draws())
    assert loss.item() == pytest.approx(math.log(N), rel=1e-12)


def test_the_exact_softmax_is_a_cross_entropy_over_all_images():
    x, index, memory = units(5, D), torch.tensor([4, 4, 0, 19, 2]), bank()
    loss = nce("softmax", 0, 0.07)(x, memory, index, draws())
    expected = F.cross_entropy(x @ memory.bank.T / 0.07, index)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("form", "negatives"), CASES)
def test_a_bank_may_move_before_the_backward_pass(form, negatives):
    x, index = units(5, D), torch.arange(5)
    part, grads = nce(form, negatives), []
    for moves in (False, True):
        memory, z = bank(), x.clone().requires_grad_()
        loss = part(z, memory, index, draws())
        if moves:
            memory.update(index, units(5, D, seed=9))
        loss.backward()
        grads.append(z.grad)
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


def test_z_is_n_times_the_mean_of_the_first_batch_and_then_rests():
    x, index, memory = units(5, D), torch.arange(5), bank()
    part = nce("binary", branches=2)
    assert part.log_z.isnan().all()
    part(x, memory, index, draws(), 1)
    rows = draws().integers(N, 16)[0]
    s = torch.cat([(x * memory.bank[index]).sum(1, keepdim=True), x @ memory.bank[rows].T], 1)
    expected = N * (s / 0.3).exp().mean()
    assert part.log_z.exp()[1].item() == pytest.approx(expected.item(), rel=1e-12)
    assert part.log_z[0].isnan()  # each branch has its own
    first = part.log_z[1].clone()
    part(units(5, D, seed=5), memory, index, draws(1), 1)
    assert torch.equal(part.log_z[1], first)
    again = nce("binary", branches=2)
    again.load_state_dict(part.state_dict())
    assert torch.equal(again.log_z[1], first)
    assert not list(nce("softmax").state_dict())  # no Z, and nothing unestimated to save


def test_z_does_not_count_masked_negatives():
    x, index = units(1, D), torch.tensor([3])
    memory = bank(units(1, D, seed=4).expand(N, D))
    part = nce("binary", 200, reappear=False)
    part(x, memory, index, draws())
    s = (x @ memory.bank[0]).item()
    assert (draws().integers(N, 200)[0] == 3).any()
    assert part.log_z.item() == pytest.approx(math.log(N) + s / 0.3, rel=1e-12)


def test_negatives_are_uniform_on_all_images_with_replacement():
    seen = torch.cat([Draws(0, "negatives", step).integers(N, 500)[0] for step in range(40)])
    counts = seen.bincount(minlength=N)
    assert len(counts) == N
    assert ((counts / 1000 - 1).abs() < 0.15).all()  # 4.7 standard deviations


def test_an_update_bisects_memory_and_embedding():
    memory, before = bank(), units(N, D, seed=1)
    index, v = torch.tensor([2, 11, 5]), units(3, D, seed=7)
    memory.update(index, v)
    m = memory.bank[index]
    torch.testing.assert_close((m * before[index]).sum(1), (m * v).sum(1))
    torch.testing.assert_close(m.norm(dim=1), torch.ones(3, dtype=torch.float64))
    rest = [i for i in range(N) if i not in index.tolist()]
    assert torch.equal(memory.bank[rest], before[rest])


def test_a_bank_starts_on_the_sphere_or_in_the_official_cube():
    memory = MemoryBank(4000, 128)
    memory.fill(Draws(0, "memory"))
    torch.testing.assert_close(memory.bank.norm(dim=1), torch.ones(4000))
    assert memory.bank.mean(0).norm() < 0.05
    memory.fill(Draws(0, "memory"), unit=False)
    half = 1 / math.sqrt(128 / 3)
    assert memory.bank.abs().max().item() == pytest.approx(half, rel=1e-3)
    assert memory.bank.square().sum(1).mean().item() == pytest.approx(1, abs=5e-3)
    assert memory.bank.norm(dim=1).std() > 0.01
    assert memory.bank.mean(0).norm() < 0.05


def test_half_precision_does_not_reach_the_scores():
    x, index, memory = units(5, D).float(), torch.arange(5), bank(units(N, D, seed=1).float())
    for form, negatives in CASES:
        part = nce(form, negatives, 0.07).float()
        full = part(x, memory, index, draws())
        with torch.autocast("cpu", torch.bfloat16):
            half = part(x, memory, index, draws())
        assert torch.equal(full, half)
        assert full.isfinite()


def test_the_proximal_term_is_its_formula():
    v, m = units(4, D), units(4, D, seed=3)
    total = sum(
        (a - b) ** 2
        for p, q in zip(v.tolist(), m.tolist(), strict=True)
        for a, b in zip(p, q, strict=True)
    )
    assert proximity(v, m).item() == pytest.approx(total / 4, rel=1e-12)


def test_the_proximal_term_is_added_before_the_memory_moves(tiny):
    method, *rest = tiny("npid", "method.proximal=30")
    batch = batch_of(method, *rest)
    before = method.memory.bank.clone()
    terms = method.loss(batch)
    v = method.seen["embeddings"]
    expected = 30 * (v - before[batch["index"]]).square().sum(1).mean()
    torch.testing.assert_close(terms["proximal"], expected)
    assert "proximal" not in batch_free(tiny)


def batch_free(tiny):
    method, *rest = tiny("npid", "method.proximal=0")
    return method.loss(batch_of(method, *rest))


def test_npid_moves_its_own_rows_only(tiny):
    method, *rest = tiny("npid")
    batch = batch_of(method, *rest)
    before, index = method.memory.bank.clone(), batch["index"]
    method.loss(batch)
    expected = F.normalize(0.5 * before[index] + 0.5 * method.seen["embeddings"], dim=1)
    torch.testing.assert_close(method.memory.bank[index], expected)
    others = [i for i in range(64) if i not in index.tolist()]
    assert torch.equal(method.memory.bank[others], before[others])


def test_npid_draws_other_negatives_each_step(tiny):
    method, *rest = tiny("npid", "method.momentum=1")
    batch = batch_of(method, *rest)
    first, again = method.loss(batch)["original"], method.loss(batch)["original"]
    method.step += 1
    torch.testing.assert_close(first, again)
    assert abs(first - method.loss(batch)["original"]) > 1e-3


def test_the_recipe_is_the_papers(compose):
    method = instantiate(compose("method=npid", "data=imagenet", "data.root=x").method)
    assert (method.nce.form, method.nce.negatives, method.nce.temperature) == ("binary", 4096, 0.07)
    assert method.nce.reappear
    assert [type(layer) for layer in method.f] == [nn.Linear]
    optim = method.optim
    assert [optim.factor(e / 200) for e in (0, 119, 120, 159, 160)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


def test_the_papers_nearest_neighbours_are_a_preset(compose):
    cfg = compose("method=npid", "data=cifar10", "evals=knn_npid")
    knn = instantiate(cfg.evals.knn_npid)
    assert (knn.k, knn.temperature) == ((200,), (0.07,))


class Syncs(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if any(name.startswith(wait) for wait in self.WAITS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["npid", "pirl", "pirl_rotation"])
@pytest.mark.parametrize("form", ["binary", "softmax"])
def test_a_step_does_not_wait_for_the_device(tiny, name, form):
    method, *rest = tiny(name, f"method.nce={form}")
    batch = batch_of(method, *rest)
    with Syncs() as syncs:
        sum(method.loss(batch).values()).backward()
    assert not syncs.found
    with Syncs() as syncs:
        torch.ones(()).item()
    assert syncs.found


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("method.nce=paper", "nce"),
        ("method.negatives=-1", "negatives"),
        ("method.temperature=0", "temperature"),
        ("method.proximal=-1", "proximal"),
        ("method.init=zeros", "init"),
    ],
)
def test_bad_values_are_named(tiny, override, word):
    with pytest.raises(InstantiationException, match=word):
        tiny("npid", override)


def test_only_a_softmax_may_be_exact():
    for form in ("binary", "paper"):
        with pytest.raises(ValueError, match="negatives must be positive, or 0 for nce=softmax"):
            nce(form, 0)


# Two and three processes against one.


class Flat(nn.Module):
    """A backbone without batch norm, so that processes need not share statistics."""

    dim = 5

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x):
        return self.layer(x.flatten(1)).tanh()


def case(form, negatives, per_image=False):
    torch.manual_seed(0)
    method = NPID(
        Flat(),
        nn.Identity(),
        None,
        dim=D,
        nce=form,
        negatives=negatives,
        temperature=0.3,
        per_image=per_image,
        proximal=2.0,
    )
    method.prepare(N, 0)
    return method.double()


def batches():
    generator = torch.Generator().manual_seed(3)
    for step in range(2):
        x = torch.randn(12, 3, 2, 2, generator=generator, dtype=torch.float64)
        yield {"views": [x], "index": (torch.arange(12) * 3 + step) % N, "step": step}


def train(method):
    """Two updates by gradient descent, shared by all processes: losses, weights, bank and Z."""
    losses = []
    for batch in batches():
        method.step = batch["step"]
        given = {"views": [mine(batch["views"][0])], "index": mine(batch["index"])}
        loss = sum(method.loss(given).values())
        method.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in method.parameters():
                p -= 0.1 * mean(p.grad)
        losses.append(mean(loss))
    return {"losses": torch.stack(losses), **method.state_dict()}


def runs():
    shared = [train(case(*given)) for given in CASES if given[0] != "paper"]
    return [*shared, train(case("binary", 16, per_image=True))]


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_train_like_one(world):
    alone = runs()
    assert ["nce.log_z" in state for state in alone] == [True, False, False, True]
    for found in on_processes(world, runs):
        torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-9)
