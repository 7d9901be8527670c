"""SwAV and SEER: codes, queue, prototypes, and processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from processes import mean, on_processes
from torch import nn

from unlabeled.backbones.resnet import ResNet
from unlabeled.dist import gather, mine, world_size
from unlabeled.methods.swav import SwAV, products, swapped_prediction
from unlabeled.parts.sinkhorn import sinkhorn

N, D, K, QUEUE = 12, 6, 5, 10


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def units(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def literal_sinkhorn(scores, epsilon, iterations):
    """The official code's, with its constants, in loops over prototypes and samples."""
    q = (scores / epsilon).exp().T.clone()  # K B
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        for row in range(k):
            q[row] /= q[row].sum() * k
        for column in range(b):
            q[:, column] /= q[:, column].sum() * b
    return (q * b).T


# Codes


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.03, 10), (0.5, 1)])
def test_codes_are_the_official_ones(epsilon, iterations):
    scores = units(20, D) @ units(K, D).T
    q = sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(q, literal_sinkhorn(scores, epsilon, iterations))
    torch.testing.assert_close(q.sum(1), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-14)


def test_columns_become_equal_in_the_limit_only():
    scores = units(256, D) @ units(10, D).T
    few, many = sinkhorn(scores, 0.05, 3).sum(0), sinkhorn(scores, 0.05, 500).sum(0)
    assert (few - 25.6).abs().max() > 0.1
    torch.testing.assert_close(many, torch.full((10,), 25.6, dtype=torch.float64))


def test_codes_ignore_constants_of_prototypes_but_not_of_samples():
    scores = units(20, D) @ units(K, D).T
    q = sinkhorn(scores)
    torch.testing.assert_close(sinkhorn(scores + torch.randn(K)), q)
    torch.testing.assert_close(sinkhorn(scores + 7), q)
    assert not torch.allclose(sinkhorn(scores + torch.randn(20, 1)), q, atol=1e-3)


def test_codes_of_a_permuted_batch_are_permuted():
    """So a queue may stand before the batch (official code) or after it (here)."""
    scores, order = units(20, D) @ units(K, D).T, torch.randperm(20)
    q = sinkhorn(scores)
    torch.testing.assert_close(sinkhorn(scores[order]), q[order])
    queue = units(QUEUE, D) @ units(K, D).T
    before = sinkhorn(torch.cat([queue, scores]))[-20:]
    torch.testing.assert_close(sinkhorn(torch.cat([scores, queue]))[:20], before)
    assert not torch.allclose(before, q, atol=1e-3)  # the queue counts


@pytest.mark.parametrize("k", [3000, 16000])
def test_uniform_scores_cost_log_k(k):
    codes = sinkhorn(torch.full((4, k), 0.7, dtype=torch.float64))
    torch.testing.assert_close(codes, torch.full_like(codes, 1 / k))
    loss = swapped_prediction([codes] * 2, [torch.zeros(4, k, dtype=torch.float64)] * 8, 0.1)
    assert loss.item() == pytest.approx(math.log(k), rel=1e-12)
    assert math.log(k) == pytest.approx({3000: 8.006367567650246, 16000: 9.680344001221918}[k])


def test_codes_get_no_gradient_and_are_not_half():
    scores = (units(8, D) @ units(K, D).T).half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        q = sinkhorn(scores * 0 + 1, 0.05, 3)  # exp(1 / 0.05) is past float16
        s = products(units(4, D).bfloat16(), nn.Parameter(units(K, D).float()))
    assert not q.requires_grad
    assert q.dtype == s.dtype == torch.float32
    torch.testing.assert_close(q, torch.full((8, K), 1 / K))


@pytest.mark.parametrize(("bad", "said"), [((0.0, 3), "epsilon .* 0.0"), ((0.05, 0), "iter.* 0")])
def test_wrong_sinkhorns_are_named(bad, said):
    with pytest.raises(ValueError, match=said):
        sinkhorn(torch.zeros(2, 2), *bad)


# The method


class Nothing(nn.Module):
    """A backbone that remembers what it was given."""

    dim = 8

    def __init__(self):
        super().__init__()
        self.layer, self.shapes = nn.Linear(3, 8), []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.layer(x.mean((2, 3)))


def made(**changes):
    given = {"hidden": 16, "dim": D, "prototypes": K, "norm": "batch", **changes}
    return SwAV(changes.pop("backbone", Nothing()), nn.Identity(), None, **given)


def crops(n=N, small=3):
    large = [torch.randn(n, 3, 8, 8) for _ in range(2)]
    return [*large, *(torch.randn(n, 3, 4, 4) for _ in range(small))]


def literal_loss(method, views, queues=None):
    """From views to the loss as the paper has it, one image and crop at a time."""
    n = len(views[0])
    h = torch.cat([method.backbone(v) for v in views])
    z = method.projector(h)
    z = z / z.norm(dim=1, keepdim=True)
    s = z @ method.prototypes.weight.T  # V*n K
    total = 0.0
    for a in range(2):
        rows = s[a * n : (a + 1) * n].detach()
        if queues is not None:
            rows = torch.cat([queues[a] @ method.prototypes.weight.detach().T, rows])
        q = literal_sinkhorn(rows.double(), method.epsilon, method.iterations)[-n:]
        for v in range(len(views)):
            if v != a:
                p = s[v * n : (v + 1) * n] / method.temperature
                p = p.exp() / p.exp().sum(1, keepdim=True)
                for i in range(n):
                    total = total - (q[i] * p[i].log()).sum() / n / (len(views) - 1) / 2
    return total


def test_the_loss_is_the_papers_from_views_on():
    method, views = made().double(), [v.double() for v in crops()]
    ours = method.loss({"views": views})["swap"]
    ours.backward()
    grads = [p.grad.clone() for p in method.parameters()]
    method.zero_grad()
    theirs = literal_loss(method, views)
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for a, p in zip(grads, method.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_crops_of_a_size_go_together_and_never_two_sizes():
    method = made()
    method.loss({"views": crops()})
    assert method.backbone.shapes == [(2 * N, 3, 8, 8), (3 * N, 3, 4, 4)]
    alone = made(joint=False)
    alone.loss({"views": crops()})
    assert alone.backbone.shapes == [(N, 3, 8, 8)] * 2 + [(N, 3, 4, 4)] * 3


def test_joint_crops_share_the_projectors_statistics():
    joint, alone = made(), made(joint=False)
    alone.load_state_dict(joint.state_dict())
    views = crops()
    for v in views:
        v.add_(torch.randn(1, 3, 1, 1))  # crops differ in colour
    losses = [m.loss({"views": views})["swap"].item() for m in (joint, alone)]
    assert abs(losses[0] - losses[1]) > 1e-4
    assert joint.projector[1].num_batches_tracked == 1
    assert alone.projector[1].num_batches_tracked == 5


def test_the_queue_holds_embeddings_and_is_scored_by_current_prototypes():
    method = made(queue=2 * N)
    method._total_steps = 100
    past = []
    for step in range(4):
        method.step, views = step, crops()
        if step == 2:  # the prototypes move: so must the scores of what is stored
            with torch.no_grad():
                method.prototypes.weight.copy_(F.normalize(torch.randn(K, D), dim=1))
        kept = [torch.cat(past[i][-2:]) for i in range(2)] if step >= 2 else None
        ours = method.loss({"views": views})["swap"].item()
        theirs = literal_loss(method, views, kept).item()
        assert ours == pytest.approx(theirs, rel=1e-4), step
        if kept is not None:  # and it counts
            assert abs(ours - literal_loss(method, views).item()) > 1e-5
        with torch.no_grad():
            h = torch.cat([method.backbone(v) for v in views])
            z = F.normalize(method.projector(h), dim=1).split(N)
        past = [[*(past[i] if past else []), z[i]] for i in range(2)]
    for queue, seen in zip(method.queues, past, strict=True):
        torch.testing.assert_close(queue.keys, torch.cat(seen[-2:]))
    assert {"queues.0.keys", "queues.0.head", "queues.1.keys"} <= method.state_dict().keys()


class Later(SwAV):
    """SwAV that is told how far training is."""

    share = 0.0

    @property
    def progress(self):
        return self.share


def test_the_queue_waits_for_its_start_and_is_filled_meanwhile():
    early, late = (
        Later(
            Nothing(), nn.Identity(), None, hidden=16, dim=D, prototypes=K, norm="batch",
            queue=N, queue_start=start,
        )
        for start in (0.0, 0.5)
    )  # fmt: skip
    late.load_state_dict(early.state_dict())
    for step in range(4):
        views = crops()
        losses = []
        for method in (early, late):
            method.step, method.share = step, step / 4
            losses.append(method.loss({"views": views})["swap"].item())
        assert (losses[0] == losses[1]) == (step != 1), step  # 0: not full, 2: both use it
    torch.testing.assert_close(early.queues[0].keys, late.queues[0].keys)


def test_prototypes_rest_at_first_and_stay_unit_also_with_momentum_and_decay():
    method = Later(
        Nothing(), nn.Identity(), None, hidden=16, dim=D, prototypes=K, norm="batch", freeze=0.5
    )
    sgd = torch.optim.SGD(method.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    start = method.prototypes.weight.detach().clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(K))
    for step in range(6):
        method.share = step / 6
        sgd.zero_grad()
        method.loss({"views": crops()})["swap"].backward()
        method.on_before_optimizer_step(sgd)
        sgd.step()
        method.after_step()
        moved = not torch.allclose(method.prototypes.weight, start, atol=1e-6)
        assert moved == (step >= 3)
        torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(K))


def test_a_zero_embedding_is_no_nan():
    method = made()
    with torch.no_grad():
        for p in method.projector[-1].parameters():
            p.zero_()
    loss = method.loss({"views": crops()})["swap"]
    loss.backward()
    assert loss.item() == pytest.approx(math.log(K))
    assert all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"epsilon": -1.0}, "epsilon must be positive, got -1.0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"norm": "layer"}, "layer"),
    ],
)
def test_wrong_settings_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        made(**wrong)


# SEER


def test_seers_recipe(compose):
    cfg = compose("experiment=imagenet/seer", "data.root=somewhere")
    with torch.device("meta"):
        method = instantiate(cfg.method)
    linear = [m.weight.shape for m in method.projector if isinstance(m, nn.Linear)]
    assert linear == [(8192, 10444), (8192, 8192), (256, 8192)]
    assert [type(m).__name__ for m in method.projector] == [
        *("Linear", "SyncBatchNorm", "ReLU") * 2,
        "Linear",
    ]
    assert method.prototypes.weight.shape == (16000, 256)
    assert (method.iterations, method.temperature) == (10, 0.1)
    assert method.backbone.recomputed == {"res2", "res3", "res4", "res5"}
    sizes = [(p.size, p.count) for p in cfg.decode.parts.values()]
    assert sizes == [(224, 2), (96, 4)]
    assert sum(cfg.method.augment.repeat) == 6
    count = 10**9
    steps = count // cfg.data.batch_size
    assert steps == 122070
    assert round(count / 8704) == 114890  # the other batch that is quoted
    optim = instantiate(cfg.method.optim)
    peak = optim.lr * cfg.data.batch_size / optim.reference_batch
    assert peak == pytest.approx(9.6)
    assert peak * optim.factor(0) == pytest.approx(0.15)
    assert peak * optim.factor(8000 / steps) == pytest.approx(9.6, rel=1e-3)
    assert peak * optim.factor(1) == pytest.approx(0.0096)
    assert (optim.weight_decay, cfg.trainer.max_epochs) == (1e-5, 1)


# Processes


def learner(backbone_norm="sync"):
    torch.manual_seed(3)
    backbone = ResNet(depth=18, width=4, stem="small", norm=backbone_norm,
                      checkpoint_activations=["res3", "res4"])  # fmt: skip
    return SwAV(
        backbone, nn.Identity(), None, hidden=8, dim=D, prototypes=K, queue=QUEUE, norm="sync"
    ).double()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn(N, 3, s, s, generator=generator, dtype=torch.float64) for s in (8, 8, 6, 6)]
        for _ in range(3)
    ]


def trained():
    """Losses, gradients and queues of three batches; QUEUE is a multiple of no world size."""
    method, found = learner(), []
    for step, views in enumerate(batches()):
        method.step = step
        method.zero_grad()
        loss = method.loss({"views": [mine(v) for v in views]})["swap"]
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in method.parameters()])
        found.append((mean(loss), mean(grads)))
        with torch.no_grad():  # the same step everywhere
            generator = torch.Generator().manual_seed(step)
            shift = torch.randn(K, D, generator=generator, dtype=torch.float64)
            method.prototypes.weight.add_(shift)
        method.after_step()
    statistics = torch.cat([b.double().flatten() for b in method.buffers()])
    return found, statistics


def shared():
    """Training, and codes of equal and of ragged shares."""
    torch.manual_seed(0)
    scores = units(N, D) @ units(K, D).T
    rows = {1: [12], 2: [10, 2], 3: [4, 1, 7]}[world_size()]
    codes = gather(sinkhorn(mine(scores), 0.05, 3, shared=True))
    ragged = gather(sinkhorn(mine(scores, rows), 0.05, 3, shared=True), rows)
    return {"trained": trained(), "codes": codes, "ragged": ragged}


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_a_queue_are_one(world):
    alone = shared()
    torch.testing.assert_close(alone["ragged"], alone["codes"])
    for found in on_processes(world, shared):
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-9)
