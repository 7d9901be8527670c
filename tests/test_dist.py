"""Two and three gloo processes against one: losses, gradients, memories, batch norm."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from unlabeled.dist import SyncBatchNorm, gather, mine, rank, reduce_sum
from unlabeled.methods.barlow_twins import barlow_twins_loss
from unlabeled.methods.byol import byol_loss
from unlabeled.methods.simclr import nt_xent
from unlabeled.methods.swav import swapped_prediction
from unlabeled.parts.losses import info_nce
from unlabeled.parts.memory import MemoryBank, Queue
from unlabeled.parts.sinkhorn import sinkhorn

pytestmark = [pytest.mark.ddp, pytest.mark.xdist_group("ddp")]
N, D = 12, 6


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


LOSSES = (simclr, barlow, swav, moco, byol, through_sync_bn)


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, N, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(5, D, generator=generator, dtype=torch.float64)


def value_and_gradient(loss, x, w):
    w = w.clone().requires_grad_()
    value = loss(x[0] @ w, x[1] @ w)
    value.backward()
    return value.detach(), w.grad


def worker(process, world, port, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=process, world_size=world)
    x, w = data()
    share = torch.stack([mine(view) for view in x])
    found = {}
    for loss in LOSSES:
        value, grad = value_and_gradient(loss, share, w)
        dist.all_reduce(grad)  # what DDP does: the mean of gradients
        dist.all_reduce(value)
        found[loss.__name__] = (value / world, grad / world)
    queue, bank = Queue(9, D), MemoryBank(20, D)
    rows = (x[0] @ w).float()
    for _ in range(2):
        queue.push(mine(rows))
        bank.update(mine(torch.arange(N) + 3), F.normalize(mine(rows), dim=1))
    bn = SyncBatchNorm(5)
    bn(mine(x[0]).float())
    found["queue"], found["bank"] = queue.keys, bank.bank
    found["statistics"] = torch.stack([bn.running_mean, bn.running_var])
    found["sum"] = reduce_sum(torch.tensor([float(rank() + 1)]))
    out[process] = {
        k: [t.tolist() for t in v] if isinstance(v, tuple) else v.tolist() for k, v in found.items()
    }
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def processes(request):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(worker, (request.param, port, out), nprocs=request.param)
        return dict(out)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_losses_and_gradients_are_those_of_one_process(processes, loss):
    value, grad = value_and_gradient(loss, *data())
    for found in processes.values():
        got = [torch.tensor(t, dtype=torch.float64) for t in found[loss.__name__]]
        torch.testing.assert_close(got[0], value, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(got[1], grad, atol=1e-8, rtol=1e-6)


def test_memories_are_those_of_one_process(processes):
    x, w = data()
    rows = (x[0] @ w).float()
    queue, bank = Queue(9, D), MemoryBank(20, D)
    bn = nn.BatchNorm1d(5)
    for _ in range(2):
        queue.push(rows)
        bank.update(torch.arange(N) + 3, F.normalize(rows, dim=1))
    bn(x[0].float())
    for found in processes.values():
        torch.testing.assert_close(torch.tensor(found["queue"]), queue.keys)
        torch.testing.assert_close(torch.tensor(found["bank"]), bank.bank)
        statistics = torch.stack([bn.running_mean, bn.running_var])
        torch.testing.assert_close(torch.tensor(found["statistics"]), statistics)
        assert found["sum"] == [len(processes) * (len(processes) + 1) / 2]
