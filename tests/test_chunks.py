"""A backbone that computes in chunks learns what it learns from the batch at once."""

import copy
import weakref

import pytest
import torch
from conftest import METHODS
from test_ddp import BOTH, OWN, in_double
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unlabeled.backbones.chunks import divide, unite
from unlabeled.backbones.resnet import ResNet
from unlabeled.callbacks.chunks import Chunks
from unlabeled.parts.drop_path import DropPath
from unlabeled.parts.frozen import Frozen

SOME = ("barlow_twins", "moco_v2", "simclr", "swav")
ROWS = 7  # divides nothing here
RUN = [
    *("backbone.norm=group", "data.limit=24", "data.batch_size=12", "trainer.max_epochs=1"),
    *("optim@method.optim=sgd", "method.optim.lr=0.02", "method.optim.scaling=none"),
    "method.optim.warmup=0",
]


def trained(tiny, name, *more, rows=None):
    """The losses of two updates in double precision, and the state they lead to."""
    other = name in ("mae", "videomae") or OWN.get(name) is BOTH  # a backbone without this choice
    run = [x for x in RUN if not (other and x.startswith("backbone.norm"))]
    losses = []
    method, data, trainer = tiny(
        *(name, *run, *OWN.get(name, []), *more),
        precision="64-true",
        callbacks=[] if rows is None else [Chunks(rows=rows)],
    )
    for part in vars(method).values():
        if isinstance(part, Frozen):
            part.network.double()
    step = method.training_step
    method.training_step = lambda *given: losses.append(step(*given)) or losses[-1]
    hook = register_module_forward_pre_hook(in_double)
    try:
        trainer.fit(method, data)
    finally:
        hook.remove()
    assert not {"forward", "stages"} & set(vars(method.backbone))  # as it was
    return torch.stack(losses).detach(), {k: v.clone() for k, v in method.state_dict().items()}


def rest():
    return [pytest.param(x, marks=pytest.mark.slow) for x in METHODS if x not in (*SOME, "demo")]


@pytest.mark.parametrize("name", [*SOME, *rest()])
def test_no_method_notices(tiny, name):
    more = ["method.norm=shared"] if name == "multitask" else []
    (losses, state), (ours, there) = (trained(tiny, name, *more, rows=r) for r in (None, ROWS))
    assert len(losses) == 2
    torch.testing.assert_close(ours, losses, rtol=1e-9, atol=1e-10)
    for key, value in state.items():
        torch.testing.assert_close(
            *(there[key], value),
            **{"rtol": 1e-7, "atol": 1e-9, "equal_nan": True},  # what was not measured yet
            msg=lambda said, k=key: f"{k}: {said}",
        )


def twins(**changes):
    """A network, and another with its weights that computes 4 rows at a time."""
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(ResNet(depth=18, width=8, stem="small", stem_stride=2, **changes).double())
    divide(nets[1], 4)
    return nets


def same(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name


def spread(h):
    """A loss that compares rows."""
    return (h @ h.T).logsumexp(1).mean()


@pytest.mark.parametrize("recompute", [False, True])
def test_batch_norm_sees_chunks_and_moves_once_for_each(recompute):
    plain, divided = twins(checkpoint_activations=recompute)
    x = torch.randn(12, 3, 16, 16, dtype=torch.float64)
    spread(torch.cat([plain(part) for part in x.split(4)])).backward()
    h = divided(x)
    moved = [b.clone() for b in divided.buffers()]
    spread(h).backward()
    assert all(torch.equal(a, b) for a, b in zip(divided.buffers(), moved, strict=True))
    assert divided.bn1.num_batches_tracked == 3
    same(divided, plain)


def test_chunks_are_ghost_batches():
    """To batch norm a chunk is what a part of `bn_splits` is, in loss and gradient."""
    plain, divided = twins()
    ghosts, _ = twins(bn_splits=3)
    x = torch.randn(12, 3, 16, 16, dtype=torch.float64)
    for net in (ghosts, divided):
        spread(net(x)).backward()
    for (name, a), b in zip(divided.named_parameters(), ghosts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
    spread(plain(x)).backward()
    assert (divided.conv1.weight.grad - plain.conv1.weight.grad).abs().max() > 1e-6


def test_maps_are_those_of_the_batch_and_a_copy_divides_itself():
    plain, divided = twins(norm="group")
    twin, x = copy.deepcopy(divided), torch.randn(11, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for param in divided.parameters():
            param.zero_()
        for name, value in plain.stages(x).items():
            torch.testing.assert_close(twin.stages(x)[name], value, msg=name)
    seen = []
    twin.conv1.register_forward_hook(lambda _net, _given, out: seen.append(len(out)))
    twin(x)
    assert seen == [4, 4, 3]
    unite(twin)
    twin(x)
    assert seen[3:] == [11]


def test_what_is_dropped_at_random_is_dropped_again():
    net = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 40), nn.Tanh()).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    grads = []
    for rows in (None, 4):
        net.zero_grad()
        torch.manual_seed(1)
        if rows is not None:
            divide(net, rows)
        h = torch.cat([net(part) for part in x.split(4)]) if rows is None else net(x)
        torch.rand(7)  # others draw meanwhile
        spread(h).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_in_bf16_are_not_summed_in_bf16():
    """Sixteen chunks are as near to the exact gradient as the batch at once is."""
    errors = {}
    for rows in (None, 4):
        net, _ = twins(norm="group")
        net = net.float()
        x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        if rows is not None:
            divide(net, rows)
        found = []
        for enabled in (False, True):
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                h = net(x)
            spread(h.float()).backward()
            found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        errors[rows] = float((found[1] - found[0]).norm() / found[0].norm())
    assert 0 < errors[4] < 1.2 * errors[None]


class Alive(TorchDispatchMode):
    """Counts the bytes of what operations make, as long as it exists."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.most = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                self.now += (size := storage.nbytes())
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, size)
        return out

    def gone(self, size):
        self.now -= size


def test_the_activations_of_one_chunk_exist_at_a_time():
    def most(images, *, divided):
        net = twins()[divided]
        with Alive() as alive:
            spread(net(torch.randn(images, 3, 32, 32, dtype=torch.float64))).backward()
        return alive.most

    at_once, chunks = ((most(32, divided=d) - most(8, divided=d)) / 24 for d in (False, True))
    image = 3 * 32 * 32 * 8  # bytes, which are there in any case
    assert at_once > 10 * image
    assert chunks < 1.1 * image


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("simclr", [], "method.drop_path=0"),
        ("multitask", ["method.norm=per_task"], "method.norm=shared"),
    ],
)
def test_what_would_be_computed_otherwise_again_is_refused(tiny, name, more, said):
    method, data, trainer = tiny(name, *more, callbacks=[Chunks(rows=4)])
    if name == "simclr":
        method.backbone.layer1.append(DropPath(0.1, 0))
    with pytest.raises(ValueError, match=said):
        trainer.fit(method, data)


def test_there_is_no_chunk_without_a_row():
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        Chunks(rows=0)


def test_a_training_that_fails_leaves_the_network_whole(tiny):
    method, data, trainer = tiny("simclr", callbacks=[Chunks(rows=4)])

    def fails(batch):
        assert "forward" in vars(method.backbone)
        raise RuntimeError("now")

    method.loss = fails
    with pytest.raises(RuntimeError, match="now"):
        trainer.fit(method, data)
    assert "forward" not in vars(method.backbone)
