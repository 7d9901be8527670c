"""Functions of tests on several gloo processes, beside the same function on one."""

import io
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from unlabeled.dist import world_size


def on_processes(world: int, function: Callable[[], Any]) -> list[Any]:
    """What a module's function returns in each of `world` processes, in order of rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_process, (world, port, function, out), nprocs=world)
        found = dict(out)
    return [torch.load(io.BytesIO(found[rank])) for rank in range(world)]


def _process(rank: int, world: int, port: int, function: Callable[[], Any], out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    file = io.BytesIO()
    torch.save(function(), file)
    out[rank] = file.getvalue()
    dist.destroy_process_group()


def value_and_gradient(loss: Callable[..., torch.Tensor], w: torch.Tensor) -> dict[str, Any]:
    """A loss of weights and its gradient, averaged over processes as DDP averages gradients."""
    w = w.clone().requires_grad_()
    value = loss(w)
    value.backward()
    assert w.grad is not None
    found = {"value": value.detach().clone(), "gradient": w.grad.clone()}
    if world_size() > 1:
        for x in found.values():
            dist.all_reduce(x)
            x /= world_size()
    return found
