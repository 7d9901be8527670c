"""The only file that talks to other processes. Alone, every function is the identity."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """Every process's rows (B, ...) as one tensor in order of rank, with gradients.

    Its backward sums over processes and DDP then averages, so a loss of gathered tensors has
    the same gradient on W processes as on one.

    Args:
        x: this process's share. Every process calls, one with no rows too; where one's x needs
            a gradient, everyone's must.
        rows: how many rows each process has, where these differ (`all_rows`, or what a sampler
            knows). None: as many as here, as in training: the data give full batches only, of a
            size that W divides.

    Raises:
        ValueError: rows are not those of this process, or, on CPUs, in every process, shares
            differ without rows. (GPUs do not look: the host would wait.)
    """
    if rows is not None and (len(rows) != world_size() or rows[rank()] != len(x)):
        raise ValueError(
            f"rows={list(rows)}, but process {rank()} of {world_size()} holds {len(x)}"
        )
    if world_size() == 1:
        return x
    if rows is None and x.device.type == "cpu":
        found = all_rows(x)
        if len(set(found)) > 1:
            raise ValueError(f"processes hold {found} rows: pass rows=all_rows(x) to gather them")
    rows = [len(x)] * world_size() if rows is None else list(rows)
    return _Gather.apply(x, rows) if max(rows) else x  # type: ignore[no-any-return]


def all_rows(x: Tensor) -> list[int]:
    """How many rows every process's x has, in order of rank. On GPUs the host waits for it."""
    if world_size() == 1:
        return [len(x)]
    here = torch.tensor([len(x)], device=x.device)
    found = [torch.empty_like(here) for _ in range(world_size())]
    dist.all_gather(found, here)
    return torch.cat(found).tolist()


def mine(x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """This process's rows of a gathered tensor.

    Args:
        x: (N, ...) of all processes.
        rows: how many each process has, where these differ. None: N / W.

    Raises:
        ValueError: they do not add up to N, or W does not divide N.
    """
    if rows is None:
        if len(x) % world_size():
            raise ValueError(
                f"{len(x)} rows do not divide among {world_size()} processes: pass the rows of each"
            )
        rows = [len(x) // world_size()] * world_size()
    if len(rows) != world_size() or sum(rows) != len(x):
        raise ValueError(f"rows={list(rows)} are not the {len(x)} of {world_size()} processes")
    return x.split(list(rows))[rank()]


def reduce_sum(x: Tensor, group: Any = None) -> Tensor:
    """The sum of x over processes, with gradients (of the sum of every process's loss).

    Args:
        x: of the same shape in every process.
        group: torch's group of processes to sum over; None: all.
    """
    if world_size() == 1:
        return x
    return _Sum.apply(x.contiguous(), group)  # type: ignore[no-any-return]


@torch.no_grad()
def broadcast(x: Tensor) -> Tensor:
    """The first process's x, written into every process's x."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def barrier() -> None:
    """Waits until every process is here."""
    if world_size() > 1:
        dist.barrier()


def shard(
    module: nn.Module, units: Sequence[nn.Module], mesh: Any, forwards: Sequence[str]
) -> None:
    """Splits parameters over the processes of a mesh, in place (FSDP2).

    Inside the methods named, parameters are whole where they are used: those of a unit from its
    forward to its end, and again for its backward, all others throughout. Outside they are
    shards, and elementwise arithmetic on them is local. Every process must make the same calls.

    Args:
        module: what holds all parameters.
        units: submodules that are gathered one at a time; they make memory small.
        mesh: torch's device mesh, of one dimension.
        forwards: names of the module's methods that compute with parameters.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # costs a second

    for p in module.parameters():  # channels_last is not supported
        p.data = p.data.contiguous()
    for part in (*units, module):
        fully_shard(part, mesh=mesh)
    for name in forwards:
        register_fsdp_forward_method(module, name)


def whole(x: Tensor) -> Tensor:
    """A sharded tensor from all processes, each of which calls; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


def shard_of(x: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, which all processes hold, the shard that `like` has of its own."""
    if not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(x.to(like.device), mesh, placements, src_data_rank=None)


def local(x: Tensor) -> Tensor:
    """This process's part of a parameter, in the same memory; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[operator]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: list[int]) -> Tensor:
        ctx.rows, most = rows, max(rows)
        if len(x) < most:  # processes exchange equally much
            x = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in rows]
        dist.all_gather(parts, x)
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return mine(grad, ctx.rows), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Any) -> Tensor:
        ctx.group, x = group, x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def divide_norms(size: int | None) -> None:
    """Lets `SyncBatchNorm` compute over groups of neighbours, from now on; every process calls.

    Args:
        size: processes of a group; None, or all there are and more: one group.

    Raises:
        ValueError: groups of this size do not make up all processes.
    """
    if size is None or world_size() <= size:
        SyncBatchNorm.process_group = None
    elif size < 1 or world_size() % size:
        raise ValueError(f"{world_size()} processes cannot be divided into groups of {size}")
    else:
        SyncBatchNorm.process_group = dist.new_subgroups(size)[0]


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the global batch, or over groups of processes, on CPUs (gloo) too.

    It is no `nn.SyncBatchNorm`, of which DDP refuses to wrap any on a CPU; on GPUs it computes
    by that one's kernels.
    """

    process_group: ClassVar[Any] = None  # all; of the class, as groups cannot be copied or saved

    def forward(self, input: Tensor) -> Tensor:
        alone = not (dist.is_available() and dist.is_initialized())
        if alone or not self.training:
            return super().forward(input)
        if input.device.type == "cuda":
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        dims = [0, *range(2, input.ndim)]
        x = input if input.dtype == torch.float64 else input.float()
        group = self.process_group
        count = reduce_sum(x.new_tensor([x.numel() / x.shape[1]]), group)
        mean = reduce_sum(x.sum(dims), group) / count
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = x - mean.view(shape)
        var = reduce_sum(x.square().sum(dims), group) / count
        if self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1  # type: ignore[operator]
                share = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked
                self.running_mean.lerp_(mean, share)  # type: ignore[arg-type]
                self.running_var.lerp_(var * count / (count - 1), share)  # type: ignore
        out = x * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")
