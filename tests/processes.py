"""Functions of tests on several gloo processes, beside the same function on one."""

import socket
import tempfile
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from unlabeled.dist import world_size

set_forkserver_preload(["torch", "pytorch_lightning", "unlabeled.method"])  # imported once


def on_processes(world: int, function: Callable[[], Any]) -> list[Any]:
    """What a module's function returns in each of `world` processes, in order of rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        given = (world, port, function, folder)
        mp.start_processes(_process, given, nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder, str(rank))) for rank in range(world)]


def _process(rank: int, world: int, port: int, function: Callable[[], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(function(), Path(folder, str(rank)))
    dist.destroy_process_group()


def mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over processes, as DDP makes it of gradients."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x / world_size()


def value_and_gradient(loss: Callable[..., torch.Tensor], w: torch.Tensor) -> dict[str, Any]:
    """A loss of weights and its gradient, averaged over processes as DDP averages gradients."""
    w = w.clone().requires_grad_()
    value = loss(w)
    value.backward()
    assert w.grad is not None
    return {"value": mean(value), "gradient": mean(w.grad)}
