"""Two and three gloo processes against one: losses, gradients, memories, batch norm.

Shares are equal first, then ragged, as in the last batch of an epoch; one process may hold none.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from processes import on_processes, value_and_gradient
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.dist import (
    SyncBatchNorm,
    all_rows,
    divide_norms,
    gather,
    mine,
    rank,
    reduce_sum,
    world_size,
)
from unlabeled.methods.barlow_twins import barlow_twins_loss
from unlabeled.methods.byol import byol_loss
from unlabeled.methods.simclr import nt_xent
from unlabeled.methods.swav import swapped_prediction
from unlabeled.methods.vicreg import vicreg_loss
from unlabeled.parts.losses import info_nce
from unlabeled.parts.memory import MemoryBank, Queue
from unlabeled.parts.nce import MemoryNCE
from unlabeled.parts.sinkhorn import sinkhorn

pytestmark = [pytest.mark.ddp, pytest.mark.xdist_group("ddp")]
N, D = 12, 6
SHARES = {  # of 5, 9, 1 and 6 rows
    1: [[5], [9], [1], [6]],
    2: [[3, 2], [5, 4], [0, 1], [6, 0]],
    3: [[3, 2, 0], [5, 3, 1], [0, 0, 1], [2, 0, 4]],
}
TWICE = [  # which images: 3 and 8 are met in two places of a batch
    [3, 8, 0, 3, 11],
    [1, 2, 8, 4, 5, 6, 7, 3, 8],
    [8],
    [9, 3, 10, 0, 3, 1],
]


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Equal shares.


def simclr(z1, z2):
    a, b = gather(F.normalize(z1, dim=1)), gather(F.normalize(z2, dim=1))
    return nt_xent(a, b, 0.2)


def barlow(z1, z2):
    return sum(barlow_twins_loss(gather(z1), gather(z2), 0.1).values())


def swav(z1, z2):
    prototypes = torch.linspace(-1, 1, 5 * D, dtype=z1.dtype).view(D, 5)
    scores = [F.normalize(z, dim=1) @ prototypes for z in (z1, z2)]
    codes = [mine(sinkhorn(gather(s.detach()), 0.05, 3)) for s in scores]
    return swapped_prediction(codes, scores, 0.1)


def moco(z1, z2):
    queue = Queue(8, D).to(z1.dtype)
    queue.push(z2.detach() * 0.5)
    q, k = F.normalize(z1, dim=1), F.normalize(z2, dim=1).detach()
    return info_nce(q, k, queue.snapshot(), 0.2)


def byol(z1, z2):
    return byol_loss(z1, z2, z1 * 2, z2 + 1)


def through_sync_bn(z1, z2):
    bn = SyncBatchNorm(D).to(z1.dtype)
    return (bn(z1) * z2.detach()).square().mean() + bn(z2)[:, 0].pow(3).mean()


def equal():
    x, w = normals(2, N, 5), normals(5, D, seed=1)
    own = [mine(view) for view in x]
    found = {
        loss.__name__: value_and_gradient(lambda w, loss=loss: loss(own[0] @ w, own[1] @ w), w)
        for loss in (simclr, barlow, swav, moco, byol, through_sync_bn)
    }
    queue, bank, bn = Queue(9, D).double(), MemoryBank(20, D).double(), SyncBatchNorm(5).double()
    rows = own[0] @ w
    for _ in range(2):
        queue.push(rows)
        bank.update(mine(torch.arange(N) + 3), F.normalize(rows, dim=1))
    bn(own[0])
    found["memories"] = {"queue": queue.keys, "bank": bank.bank}
    found["statistics"] = {"mean": bn.running_mean, "var": bn.running_var}
    return found


# Ragged shares.


def ragged_losses(shares):
    """Losses of all rows from the rows of each process, with a gradient in everyone."""
    everyone, w = normals(2, sum(shares), 5, seed=2), normals(5, D, seed=3)
    x, weights = [mine(view, shares) for view in everyone], normals(sum(shares), D, seed=4)

    def of(function):
        def loss(w):
            return function(*(gather(F.normalize(view @ w, dim=1), shares) for view in x))

        return value_and_gradient(loss, w)

    def normed(w):  # a sum over own rows, so W times its mean over processes
        bn = SyncBatchNorm(D).double()
        return world_size() * (bn(x[0] @ w).pow(3) * mine(weights, shares)).sum()

    return {
        "weighted": of(lambda a, b: (weights * a.pow(3) * b).sum()),
        "simclr": of(lambda a, b: nt_xent(a, b, 0.2)),
        "barlow": of(lambda a, b: sum(barlow_twins_loss(a, b, 0.1).values())),
        "vicreg": of(lambda a, b: sum(vicreg_loss(a, b, 25.0, 25.0, 1.0).values())),
        "batch norm": value_and_gradient(normed, w),
    }


def ragged_estimates(shares):
    """What needs a number or two of everyone: codes, and the normaliser of NPID."""
    scores = mine(normals(sum(shares), 7, seed=5), shares)
    codes = sinkhorn(scores, 0.3, 3, shared=True)
    nce = MemoryNCE("binary", negatives=6, temperature=0.5, reappear=True).double()
    return {"codes": gather(codes, shares), "log_z": nce._normaliser(scores, 0, 20)}


def ragged_memories():
    """A queue of 7 after each of four pushes, and a bank of 12 after each of four updates."""
    queue, bank = Queue(7, D).double(), MemoryBank(12, D).double()
    bank.bank.copy_(F.normalize(normals(12, D, seed=6), dim=1))
    found = []
    for i, shares in enumerate(SHARES[world_size()]):
        z = mine(F.normalize(normals(sum(shares), D, seed=7 + i), dim=1), shares)
        assert all_rows(z) == shares
        queue.push(z, shares)
        bank.update(mine(torch.tensor(TWICE[i]), shares), z, rows=shares)
        found.append([queue.keys.clone(), queue.head.clone(), bank.bank.clone()])
    return found


def refused():
    """What is said of shares that are not as they are said to be."""
    short = torch.zeros(5 - rank(), D)
    wrong = [5] * world_size() + [0] * (world_size() == 1)
    said = []
    for call in (
        lambda: gather(short),
        lambda: gather(short[:3], wrong),
        lambda: mine(torch.zeros(7, D)),
        lambda: mine(torch.zeros(7, D), wrong),
    ):
        try:
            call()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def measured():
    shares = SHARES[world_size()]
    sizes = [rows for rows in shares if sum(rows) > 1]  # one row has no variance
    return {
        "equal": equal(),
        "losses": [ragged_losses(rows) for rows in sizes],
        "estimates": [ragged_estimates(rows) for rows in shares],
        "memories": ragged_memories(),
        "refused": refused(),
        "none": gather(torch.zeros(0, 3), [0] * world_size()),
        "sum": reduce_sum(torch.tensor([float(rank() + 1)])),
    }


@pytest.fixture(scope="module")
def alone():
    return measured()


@pytest.fixture(scope="module", params=[2, 3])
def processes(request):
    return on_processes(request.param, measured)


@pytest.mark.parametrize(
    "what", ["simclr", "barlow", "swav", "moco", "byol", "through_sync_bn", "memories"]
)
def test_equal_shares_give_what_one_process_gives(processes, alone, what):
    for found in processes:
        expected = alone["equal"][what]
        torch.testing.assert_close(found["equal"][what], expected, rtol=1e-9, atol=1e-11)


def test_statistics_are_those_of_one_process(processes):
    bn = nn.BatchNorm1d(5).double()
    bn(normals(2, N, 5)[0])
    for found in processes:
        expected = {"mean": bn.running_mean, "var": bn.running_var}
        torch.testing.assert_close(found["equal"]["statistics"], expected)


def in_groups():
    """Batch norm in groups of two, and why groups of three cannot be."""
    said = ""
    try:
        divide_norms(3)
    except ValueError as error:
        said = str(error)
    divide_norms(2)
    bn, w = SyncBatchNorm(D).double(), normals(5, D, seed=1)
    copied = copy.deepcopy(bn)  # as momentum encoders and evaluations do
    x = mine(normals(N, 5))
    found = {"refused": said, **value_and_gradient(lambda w: bn(x @ w).pow(3).mean(), w)}
    found["mean"] = bn.running_mean
    divide_norms(None)
    copied(x @ w)
    return {**found, "all": copied.running_mean}


def test_norms_may_be_divided_into_groups():
    x, w = normals(N, 5), normals(5, D, seed=1)
    halves = [nn.BatchNorm1d(D).double() for _ in range(2)]
    expected = value_and_gradient(
        lambda w: sum(
            bn(h @ w).pow(3).mean() / 2 for bn, h in zip(halves, x.chunk(2), strict=True)
        ),
        w,
    )
    for process, found in enumerate(on_processes(4, in_groups)):
        for key in ("value", "gradient"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found["mean"], halves[process // 2].running_mean)
        torch.testing.assert_close(found["all"], 0.1 * (x @ w).mean(0))
        assert found["refused"] == "4 processes cannot be divided into groups of 3"


@pytest.mark.parametrize("what", ["losses", "estimates", "memories"])
def test_ragged_shares_give_what_one_process_gives(processes, alone, what):
    for found in processes:
        torch.testing.assert_close(found[what], alone[what], rtol=1e-9, atol=1e-11)


def test_shares_that_are_not_as_said_are_refused(processes):
    world = len(processes)
    held, wrong = [5, 4, 3][:world], [5] * world
    for process, found in enumerate(processes):
        unequal, other, odd, sums = found["refused"]
        assert unequal == f"processes hold {held} rows: pass rows=all_rows(x) to gather them"
        assert other == f"rows={wrong}, but process {process} of {world} holds 3"
        assert odd == (f"7 rows do not divide among {world} processes: pass the rows of each")
        assert sums == f"rows={wrong} are not the 7 of {world} processes"


def test_sums_and_nothing_at_all(processes):
    world = len(processes)
    for found in processes:
        assert found["sum"] == world * (world + 1) / 2
        assert found["none"].shape == (0, 3)


def test_alone_rows_are_checked_too(alone):
    assert alone["refused"] == [
        "nothing",
        "rows=[5, 0], but process 0 of 1 holds 3",
        "nothing",
        "rows=[5, 0] are not the 7 of 1 processes",
    ]


def test_a_queue_is_first_in_first_out(alone):
    line = [torch.zeros(D, dtype=torch.float64)] * 7
    for i, (keys, head, _) in enumerate(alone["memories"]):
        rows = sum(SHARES[1][i])
        line = [*line, *F.normalize(normals(rows, D, seed=7 + i), dim=1)][-7:]
        order = (int(head) + torch.arange(7)) % 7  # from the oldest on
        torch.testing.assert_close(keys[order], torch.stack(line))


def test_of_an_image_met_twice_the_last_embedding_counts(alone):
    bank = list(F.normalize(normals(12, D, seed=6), dim=1))
    for i, (_, _, found) in enumerate(alone["memories"]):
        z = F.normalize(normals(len(TWICE[i]), D, seed=7 + i), dim=1)
        last = dict(zip(TWICE[i], z, strict=True))  # a later one replaces an earlier one
        for image, v in last.items():
            bank[image] = F.normalize(0.5 * bank[image] + 0.5 * v, dim=0)
        torch.testing.assert_close(found, torch.stack(bank))


class Writes(TorchDispatchMode):
    """What is written to which rows."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_copy_.default:
            self.index, self.value = args[2:4]
        return func(*args, **(kwargs or {}))


def test_an_image_met_twice_is_written_the_same_value_twice():
    """In which order a GPU writes is not known."""
    bank = MemoryBank(12, D)
    index = torch.tensor(TWICE[1])
    with Writes() as writes:
        bank.update(index, F.normalize(torch.randn(len(index), D), dim=1))
    values = {}
    for image, value in zip(writes.index.tolist(), writes.value, strict=True):
        assert torch.equal(values.setdefault(image, value), value)
    assert len(values) == len(set(TWICE[1])) < len(index)
