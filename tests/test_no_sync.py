"""An update never makes the host wait for the device, and works on all layers at once.

There need be no device: everything that would lie on one is put on `meta`, where tensors have
shapes and no values. Draws are made on the CPU with values, as everywhere, so what the host may
know is known and what it may not is not there. Reading a value of a device tensor (`.item()`,
`if x > 0`, `.cpu()`) is an error by itself then, and so is all whose size depends on values
(boolean masks, `nonzero`). What is left are copies in the other direction, for which the host
waits unless memory is pinned: `draws.to` does that, and nothing else may copy.
"""

import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import MANUAL, METHODS
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from unlabeled import draws
from unlabeled.backbones.resnet import ResNet
from unlabeled.lars import LARS
from unlabeled.optim import Optim
from unlabeled.parts import ema
from unlabeled.parts.frozen import Frozen

DEVICE = "meta"
MOST = 25  # tensor operations of one update of all parameters
ASKS = {  # what reads values of its tensors, or makes a tensor as large as they say
    *("_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "item"),
    *("is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount", "allclose"),
}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"_to_copy", "copy_", "to"}
MAKES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, torch.scalar_tensor}


class Waits(Exception):
    """The host would wait for the device."""


def on_device(x):
    return isinstance(x, Tensor) and x.device.type == DEVICE


def on_host(x):
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.ndim > 0


def pinned():
    """Whether this copy is made by `draws.to`, which pins memory and does not wait."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is draws.to.__code__:
            return True
        frame = frame.f_back
    return False


class Watch(TorchDispatchMode):
    """Counts operations, and stops at one for which the host would wait."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        space, name = func.name().split("::")
        name = name.split(".")[0]
        if space == "aten" and name not in ("detach", "lift_fresh"):  # views of Python's making
            self.ops.append(name)
        given = tree_leaves((args, kwargs))
        if any(map(on_device, given)):
            if name in ASKS:
                raise Waits(f"{func} of device tensors")
            if name in INDEXES:
                for index in tree_leaves(args[1]):
                    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                        raise Waits(f"{func} by a mask")
                    if on_host(index):
                        raise Waits(f"{func} by an index on the host")
        out = func(*args, **kwargs)
        if name in COPIES and any(map(on_host, given)) and on_device(out) and not pinned():
            raise Waits(f"{func} from memory that is not pinned")
        return out


class NoConstants(TorchFunctionMode):
    """Stops where numbers of the host become a device tensor: a copy that is not dispatched."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in MAKES and on_device(out) and not on_device(args[-1]):
            raise Waits(f"{func.__name__} puts numbers of the host on the device")
        return out


# The instrument itself.


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: x if (x > 0).any() else -x,
        lambda x: x[x > 0],
        lambda x: x[x[:, 0] > 0],
        lambda x: x[torch.arange(2)],
        lambda x: x[torch.ones(4, dtype=torch.bool)],
        lambda x: x.__setitem__(x > 0, 0.0),
        lambda x: x.__setitem__((x[:, 0] > 0), x[:1]),
        lambda x: (x > 0).nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: x.copy_(torch.zeros(4, 3)),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.as_tensor([1.0], device=x.device),
    ],
)
def test_what_waits_is_found(wait):
    x = torch.randn(4, 3, device=DEVICE)
    with (
        pytest.raises((Waits, RuntimeError, NotImplementedError, TypeError)),
        NoConstants(),
        Watch(),
    ):
        wait(x)


def test_what_does_not_wait_is_let_through():
    x = torch.randn(4, 3, device=DEVICE)
    with NoConstants(), Watch() as watch:
        rows = draws.where(torch.tensor([True, False, True, False]))  # the host's own numbers
        index = draws.to(rows, x.device)
        x.index_copy_(0, index, x[index] * 2)
        torch.where(x > 0, x, -x).masked_fill_(x > 1, 0.0)
        torch.zeros(3, device=x.device) + torch.arange(3, device=x.device) + 2.0
    assert {"nonzero", "index", "index_copy_", "where"} <= set(watch.ops)


def test_an_operation_on_many_tensors_counts_once():
    x = [torch.randn(3) for _ in range(40)]
    with Watch() as watch:
        torch._foreach_add_(x, 1.0)
    assert watch.ops == ["_foreach_add_"]
    with Watch() as watch:
        for p in x:
            p.add_(1.0)
    assert len(watch.ops) == 40


# All parameters at once.


def resnet50():
    with torch.device(DEVICE):
        return ResNet(depth=50)


def test_a_moving_average_takes_few_operations():
    online = resnet50()
    target = ema.copy_of(online)
    with NoConstants(), Watch() as watch:
        ema.update(target, (online,), 0.99)
    assert 0 < len(watch.ops) <= MOST


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("spared", [True, False])
def test_a_step_of_lars_takes_few_operations(inside, spared):
    net = resnet50()
    optim = Optim(
        lambda groups: LARS(groups, lr_in_momentum=inside),
        lr=0.2,
        weight_decay=1e-6,
        decay_all=not spared,
    )
    optimizer = optim(net, batch_size=256, steps=10, steps_per_epoch=1)["optimizer"]
    assert len(optimizer.param_groups) == 2
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    for _ in range(2):  # the first makes the velocities
        with NoConstants(), Watch() as watch:
            optimizer.step()
        assert 0 < len(watch.ops) <= MOST


# Whole updates.

ONCE = ("trainer.max_steps=1", "trainer.gradient_clip_val=1.0")


def on_the_device(method, data, monkeypatch):
    """A batch there, with all of the method; what depends on the kind of device left out."""
    batch = next(iter(data.train_dataloader()))
    batch = tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, batch)
    method.zero_grad()
    method.to(DEVICE).train()
    for part in vars(method).values():
        if isinstance(part, Frozen):
            part.on(method.device)
    assert method.device.type == DEVICE
    assert not any(map(on_host, method.state_dict().values()))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    for log in ("log", "log_dict"):
        monkeypatch.setattr(method, log, lambda *args, **kwargs: None)
    return batch


def update(method, data, batch, optimizer):
    """What Lightning does for a batch, in its order: the loss, and operations counted."""
    losses = []

    def compute():
        given = data.on_after_batch_transfer(dict(batch), 0)  # crops
        losses.append(method.training_step(given, 0))

    def closure():
        compute()
        optimizer.zero_grad()
        losses[0].backward()
        method.on_before_optimizer_step(optimizer)
        method.configure_gradient_clipping(optimizer, 1.0, "norm")
        return losses[0]

    with NoConstants(), Watch() as watch:
        if method.automatic_optimization:
            method.optimizer_step(0, 0, optimizer, closure)
        else:  # the whole update is in there
            compute()
    return losses[0], watch.ops


@pytest.mark.parametrize("name", METHODS)
def test_an_update_never_waits(tiny, name, monkeypatch):
    all_tasks = ["decode.schedule=summed"] if name == "multitask" else []
    clip = [] if name in MANUAL else ["trainer.gradient_clip_val=1.0"]
    method, data, trainer = tiny(name, "trainer.max_steps=1", *clip, *all_tasks)
    trainer.fit(method, data)  # whatever is made from data or by the first batch is there
    batch = on_the_device(method, data, monkeypatch)
    optimizer, after, own = None, [], method.after_step
    if method.automatic_optimization:
        optimizer = method.configure_optimizers()["optimizer"]
    monkeypatch.setattr(method, "after_step", lambda: after.append(own()))
    loss, ops = update(method, data, batch, optimizer)
    assert on_device(loss)
    assert len(ops) > 100
    assert len(after) == 1
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(on_device(p.grad) for p in trained)


@pytest.mark.parametrize("optim", ["sgd", "adamw", "lars"])
def test_no_optimizer_waits(tiny, optim, monkeypatch):
    method, data, trainer = tiny("barlow_twins", f"optim@method.optim={optim}", *ONCE)
    trainer.fit(method, data)
    batch = on_the_device(method, data, monkeypatch)
    optimizer = method.configure_optimizers()["optimizer"]
    assert type(optimizer).__name__.lower() == optim
    for _ in range(2):  # the first makes the optimizer's state
        update(method, data, batch, optimizer)
    states = [tree_leaves(optimizer.state[p]) for p in method.backbone.parameters()]
    assert all(any(map(on_device, state)) for state in states)


@pytest.mark.parametrize("where", ["on_before_optimizer_step", "after_step"])
def test_what_waits_in_an_update_is_found(tiny, where, monkeypatch):
    method, data, trainer = tiny("barlow_twins", *ONCE)
    trainer.fit(method, data)
    batch = on_the_device(method, data, monkeypatch)
    first = next(method.backbone.parameters())
    monkeypatch.setattr(method, where, lambda *args: first.sum().item())
    with pytest.raises((Waits, RuntimeError)):
        update(method, data, batch, method.configure_optimizers()["optimizer"])
