"""Queues, banks, moving averages, heads and clusters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unlabeled.draws import Draws
from unlabeled.methods.barlow_twins import BarlowTwins
from unlabeled.methods.simclr import SimCLR
from unlabeled.methods.simsiam import SimSiam
from unlabeled.methods.swav import SwAV
from unlabeled.methods.vicreg import VICReg
from unlabeled.parts import ema
from unlabeled.parts.clustering import kmeans
from unlabeled.parts.memory import MemoryBank, Queue
from unlabeled.parts.mlp import mlp
from unlabeled.parts.views import embed


def test_a_queue_is_first_in_first_out_for_any_batch_size():
    queue, pushed = Queue(7, 2), []
    for size in (3, 3, 5, 1, 7, 9, 2):
        keys = torch.randn(size, 2)
        queue.push(keys)
        pushed += keys.tolist()
        if len(pushed) >= 7:
            held = sorted(queue.keys.tolist())
            torch.testing.assert_close(torch.tensor(held), torch.tensor(sorted(pushed[-7:])))


def test_a_queue_starts_with_unit_vectors_and_survives_a_checkpoint():
    queue = Queue(5, 3)
    queue.fill(Draws(0, "queue"))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(5))
    queue.push(torch.randn(3, 3))
    other = Queue(5, 3)
    other.load_state_dict(queue.state_dict())
    key = torch.randn(1, 3)
    queue.push(key)
    other.push(key)
    assert torch.equal(queue.keys, other.keys)


def test_a_loss_may_push_before_backward():
    queue, q = Queue(4, 3), torch.randn(2, 3, requires_grad=True)
    loss = (q @ queue.snapshot().T).sum()
    queue.push(torch.randn(2, 3))
    loss.backward()
    assert q.grad is not None


def test_the_memory_bank_moves_only_its_rows_to_the_bisector():
    bank = MemoryBank(6, 4, 0.5)
    bank.fill(Draws(0, "memory"))
    before, v = bank.bank.clone(), F.normalize(torch.randn(2, 4), dim=1)
    index = torch.tensor([4, 1])
    bank.update(index, v)
    torch.testing.assert_close(bank.bank.norm(dim=1), torch.ones(6))
    new, old = bank[index], before[index]
    torch.testing.assert_close((new * old).sum(1), (new * v).sum(1))
    rest = [0, 2, 3, 5]
    assert torch.equal(bank.bank[rest], before[rest])


def test_a_moving_average_has_its_closed_form():
    online = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    target = ema.copy_of(online)
    first = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1)
    for _ in range(5):
        ema.update(target, (online,), 0.9)
    for p, start, theta in zip(target.parameters(), first, online.parameters(), strict=True):
        torch.testing.assert_close(p, 0.9**5 * start + (1 - 0.9**5) * theta)
        assert not p.requires_grad
    ema.update(target, (online,), 0.0)
    assert all(map(torch.equal, target.parameters(), online.parameters()))


def test_heads_have_the_published_sizes():
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(mlp(2048, 2048, 128, norm="none")) == 4_458_624  # MoCo v2
    byol = mlp(2048, 4096, 256, last_bias=False)
    assert [type(m).__name__ for m in byol] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert byol[0].bias is not None
    assert byol[-1].bias is None
    simclr = mlp(8, 8, 4, bias=False, last_norm=True, last_affine=False)
    assert isinstance(simclr[-1], nn.BatchNorm1d)
    assert simclr[-1].weight is None
    with pytest.raises(ValueError, match="btch"):
        mlp(2, 2, 2, norm="btch")


def test_views_of_one_resolution_share_a_forward():
    sizes = []

    def network(x):
        sizes.append(len(x))
        return x.mean((2, 3))

    views = [torch.randn(2, 3, s, s) for s in (8, 8, 4, 4, 4)]
    joint = embed(network, views, joint=True)
    assert sizes == [4, 6]
    for x, y in zip(joint, embed(network, views, joint=False), strict=True):
        torch.testing.assert_close(x, y)
    assert sizes[2:] == [2] * 5


def test_kmeans_finds_separate_clusters_and_repeats_itself():
    centers = torch.eye(4) * 10
    noise = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    x = centers.repeat(25, 1) + 0.1 * noise
    # This seed starts in all four clusters; from two in one, k-means may stay where it is.
    found = kmeans(x, 4, iterations=20, seed=0).labels
    assert torch.equal(found, kmeans(x, 4, iterations=20, seed=0).labels)
    groups = found.view(25, 4)
    assert (groups == groups[0]).all()
    assert len(groups[0].unique()) == 4
    with pytest.raises(ValueError, match="101 clusters"):
        kmeans(x, 101)


@pytest.mark.parametrize("kind", [BarlowTwins, SimCLR, SimSiam, SwAV, VICReg])
def test_a_head_of_no_layers_is_refused(kind):
    backbone = nn.Linear(4, 4)
    backbone.dim = 4
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        kind(backbone, nn.Identity(), None, depth=0)
