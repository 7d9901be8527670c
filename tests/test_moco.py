"""MoCo, both versions: keys, queue, momentum and shuffled batch norm, alone and on processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from processes import mean, on_processes
from test_papers import batch_of
from torch import nn

from unlabeled.augment.color import ColorJitter, Grayscale
from unlabeled.backbones.resnet import ResNet
from unlabeled.dist import mine
from unlabeled.draws import Draws
from unlabeled.methods.moco import MoCo
from unlabeled.parts.losses import info_nce
from unlabeled.parts.memory import Queue

both = pytest.mark.parametrize("name", ["moco", "moco_v2"])
B = 16  # images of a batch in the tiny runs


class Flat(nn.Module):
    """A backbone that keeps what it is given."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return x.flatten(1)


def moco(backbone, **kwargs):
    return MoCo(backbone, nn.Identity(), lambda *_: None, **kwargs)


@both
def test_the_loss_is_its_formula_and_the_own_key_is_no_negative(tiny, name):
    # The queue is as long as a batch: were keys enqueued first, they would be all negatives.
    method, *rest = tiny(name, f"method.queue={B}")
    batch = batch_of(method, *rest)
    method.double()
    batch["views"] = [v.double() for v in batch["views"]]
    negatives = method.queue.keys.clone()
    loss = method.loss(batch)["contrast"].item()
    q, k, t = method.seen["embeddings"], method.queue.keys, method.temperature
    assert not torch.isclose(negatives, k).all(1).any()
    total = 0.0
    for i in range(B):
        positive = math.exp(sum(a * b for a, b in zip(q[i], k[i], strict=True)) / t)
        others = sum(math.exp(sum(q[i] * n) / t) for n in negatives)
        total -= math.log(positive / (positive + others)) / B
    assert loss == pytest.approx(total, rel=1e-10)
    assert t == 0.1  # both at small size


def test_equal_logits_cost_log_k_plus_1():
    ones = torch.ones(2, 4, dtype=torch.float64) / 2
    for t in (0.07, 0.2):
        loss = info_nce(ones, ones, ones[:1].expand(65536, 4), t).item()
        assert loss == pytest.approx(math.log(65537), rel=1e-12)
        assert loss == pytest.approx(11.090370147631774, rel=1e-12)


def test_temperature_only_rescales_the_logits():
    generator = torch.Generator().manual_seed(0)
    q, k, n = (
        F.normalize(torch.randn(i, 5, generator=generator, dtype=torch.float64), dim=1)
        for i in (6, 6, 9)
    )
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ n.T], 1)
    zero = torch.zeros(6, dtype=torch.int64)
    for t in (0.07, 0.2):
        torch.testing.assert_close(info_nce(q, k, n, t), F.cross_entropy(logits / t, zero))
    torch.testing.assert_close(info_nce(q * 0.2 / 0.07, k, n, 0.2), info_nce(q, k, n, 0.07))


def test_heads_have_the_published_sizes():
    def count(**kwargs):
        method = moco(Flat(2048), queue=8, **kwargs)
        assert [type(m).__name__ for m in method.head if isinstance(m, nn.BatchNorm1d)] == []
        return sum(p.numel() for p in method.head.parameters())

    assert count(hidden=2048) == 4_458_624
    assert count(hidden=None) == 2048 * 128 + 128


@both
@pytest.mark.parametrize("size", [32, 40])
def test_the_queue_holds_the_last_keys_in_order(tiny, name, size):
    method, *rest = tiny(name, f"method.queue={size}")
    batch = batch_of(method, *rest)
    initial, pushed = method.queue.keys.clone(), []
    own = method.queue.push

    def push(keys):
        pushed.append(keys.clone())
        own(keys)

    method.queue.push = push
    for _ in range(math.ceil(size / B)):
        with torch.no_grad():  # other weights, so that every step has other keys
            for p in method.key_encoder.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        method.loss(batch)
    assert not (method.queue.keys[:, None] == initial).all(2).any()
    head = int(method.queue.head)
    assert head == len(torch.cat(pushed)) % size
    assert torch.equal(method.queue.keys.roll(-head, 0), torch.cat(pushed)[-size:])
    if size % B == 0:
        assert head == 0


@both
def test_the_first_queue_is_random_unit_vectors(tiny, name):
    method, *rest = tiny(name)
    batch_of(method, *rest)
    keys = method.queue.keys
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(len(keys)))
    assert (keys @ keys.T - torch.eye(len(keys))).abs().max() < 0.6
    again = Queue(len(keys), keys.shape[1])
    again.fill(Draws(method.seed, "queue"))
    assert torch.equal(keys, again.keys)


@both
def test_no_gradient_reaches_keys_or_queue(tiny, name):
    method, *rest = tiny(name)
    batch = batch_of(method, *rest)
    before = [p.clone() for p in method.key_encoder.parameters()]
    x = batch["views"][1].requires_grad_()
    method.loss(batch)["contrast"].backward()
    assert x.grad is None
    assert not any(p.requires_grad or p.grad is not None for p in method.key_encoder.parameters())
    assert all(map(torch.equal, before, method.key_encoder.parameters()))
    assert not method.queue.keys.requires_grad
    assert all(p.grad is not None for p in method.backbone.parameters())
    assert all(p.grad is not None for p in method.head.parameters())


@both
def test_keys_follow_by_the_closed_form_and_keep_their_own_statistics(tiny, name):
    method, *rest = tiny(name, "method.momentum=0.9")
    method.loss(batch_of(method, *rest))
    first = [p.clone() for p in method.key_encoder.parameters()]
    statistics = [b.clone() for b in method.key_encoder.buffers()]
    with torch.no_grad():
        for p in method.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    for _ in range(7):
        method.after_step()
    online = [*method.backbone.parameters(), *method.head.parameters()]  # the head moves too
    for key, start, theta in zip(method.key_encoder.parameters(), first, online, strict=True):
        torch.testing.assert_close(key, 0.9**7 * start + (1 - 0.9**7) * theta)
    assert all(map(torch.equal, statistics, method.key_encoder.buffers()))


@both
@pytest.mark.parametrize("m", [0.0, 0.9])
def test_keys_are_encoded_as_if_their_network_moved_first(tiny, name, m):
    # The official code moves it at the start of a step; here it moves after the update.
    method, data, trainer = tiny(name, f"method.momentum={m}")
    slow, steps, own = [p.clone() for p in method.key_encoder.parameters()], [], method._keys

    def keys(x):
        fast = [*method.backbone.parameters(), *method.head.parameters()]
        for i, theta in enumerate(fast):
            slow[i] = m * slow[i] + (1 - m) * theta.detach()
        for expected, p in zip(slow, method.key_encoder.parameters(), strict=True):
            torch.testing.assert_close(p, expected)
        if m == 0:
            assert all(map(torch.equal, fast, method.key_encoder.parameters()))
        steps.append(1)
        return own(x)

    method._keys = keys
    trainer.fit(method, data)
    assert len(steps) == 8


def test_the_published_recipes(compose):
    from hydra.utils import instantiate

    first, second = compose("experiment=imagenet/moco"), compose("experiment=imagenet/moco_v2")
    for cfg, epochs in ((first, 200), (second, 800)):
        assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (256, epochs)
        assert list(cfg.decode.scale) == [0.2, 1.0]
        assert (cfg.method.dim, cfg.method.queue, cfg.method.momentum) == (128, 65536, 0.999)
        assert (cfg.method.optim.lr, cfg.method.optim.weight_decay) == (0.03, 1e-4)
    assert (first.method.hidden, first.method.temperature) == (None, 0.07)
    assert (second.method.hidden, second.method.temperature) == (2048, 0.2)

    steps = instantiate(first.method.optim)
    net = nn.Linear(1, 1)
    made = steps(net, batch_size=256, steps=2000, steps_per_epoch=10)["lr_scheduler"]["scheduler"]
    rate = lambda epoch: made.lr_lambdas[0](epoch * 10 + 5) * 0.03  # noqa: E731
    found = {e: rate(e) for e in (0, 119, 120, 159, 160, 199)}
    expected = {0: 0.03, 119: 0.03, 120: 0.003, 159: 0.003, 160: 3e-4, 199: 3e-4}
    assert found == pytest.approx(expected)

    ops = [[*instantiate(cfg.method.augment).chains[0].ops] for cfg in (first, second)]
    jitters = [next(op for op in chain if isinstance(op, ColorJitter)) for chain in ops]
    assert [j.p for j in jitters] == [1.0, 0.8]
    assert jitters[0].high == pytest.approx([1.4, 1.4, 1.4, 0.4])
    assert jitters[1].high == pytest.approx([1.4, 1.4, 1.4, 0.1])
    assert [type(op).__name__ for op in ops[0]] == ["Grayscale", "ColorJitter", "Flip"]
    assert "GaussianBlur" in [type(op).__name__ for op in ops[1]]
    assert all(op.p == 0.2 for chain in ops for op in chain if isinstance(op, Grayscale))


@pytest.mark.parametrize(
    ("bad", "word"),
    [({"temperature": 0}, "temperature"), ({"momentum": 1.5}, "momentum"), ({"queue": 0}, "queue")],
)
def test_bad_values_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        moco(Flat(4), **bad)


# Shuffled batch norm: several processes, and one that splits its batch among as many.

N = 12


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, N, 3, 16, 16, generator=generator, dtype=torch.float64)


def network(splits=1):
    torch.manual_seed(3)
    backbone = ResNet(depth=18, width=4, stem="small", stem_stride=2, bn_splits=splits)
    method = moco(backbone, hidden=None, dim=6, queue=18)
    method.queue.fill(Draws(0, "queue"))
    return method.double()


def two_steps(method, views):
    """Loss and gradient of the second of two steps, and the queue after them."""
    for step in range(2):
        method.step = step
        method.zero_grad()
        loss = method.loss({"views": list(views)})["contrast"]
        loss.backward()
    grads = [*method.backbone.parameters(), *method.head.parameters()]
    return loss.detach(), torch.cat([p.grad.flatten() for p in grads]), method.queue.keys


def shuffling(x):
    """What `_keys` gives for a network that keeps its input, and what that network was given."""
    method, given = moco(Flat(x.shape[1]), queue=4), []
    method.key_encoder = nn.Identity()
    method.key_encoder.register_forward_hook(lambda _, args, __: given.append(args[0].clone()))
    return method._keys(x), given[0]


def shared():
    """Both for this process's share of the images."""
    back, given = shuffling(mine(torch.arange(N * 2.0).view(N, 2)))
    loss, grad, keys = two_steps(network(), [mine(view) for view in images()])
    return {"back": back, "given": given, "steps": (mean(loss), mean(grad), keys)}


@pytest.mark.ddp
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shuffled_keys_on_processes_are_those_of_split_batch_norm(world):
    found = on_processes(world, shared)
    rows = torch.arange(N * 2.0).view(N, 2).tolist()
    assert [row for one in found for row in one["back"].tolist()] == rows  # in order again
    given = [row for one in found for row in one["given"].tolist()]
    assert given != rows
    assert sorted(given) == rows  # every image once
    if world > 1:  # and images that shared a process as queries are apart as keys
        share = N // world
        assert any(row not in rows[:share] for row in found[0]["given"].tolist())
    expected = two_steps(network(splits=world), images())
    for one in found:
        torch.testing.assert_close(one["steps"], expected, rtol=1e-7, atol=1e-9)


def test_shuffling_changes_the_statistics_of_keys_and_not_their_order():
    view = images()[1]
    plain, shuffled = network(splits=3), network(splits=3)
    plain.shuffle_bn = False
    with torch.no_grad():
        assert not torch.allclose(plain._keys(view), shuffled._keys(view))
        plain, shuffled = plain.eval(), shuffled.eval()  # fixed statistics: nothing to change
        shuffled.key_encoder.load_state_dict(plain.key_encoder.state_dict())
        torch.testing.assert_close(plain._keys(view), shuffled._keys(view))
