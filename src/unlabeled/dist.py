"""The only file that talks to other processes. Alone, every function is the identity."""

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


def gather(x: Tensor) -> Tensor:
    """Every process's rows (B, ...) as one tensor (W * B, ...) in order of rank, with gradients.

    Its backward sums over processes and DDP then averages, so a loss of gathered tensors has
    the same gradient on W processes as on one. B must be equal everywhere.
    """
    return x if world_size() == 1 else _Gather.apply(x.contiguous())  # type: ignore[no-any-return]


def mine(x: Tensor) -> Tensor:
    """This process's rows of a gathered tensor (W * B, ...)."""
    return x.chunk(world_size())[rank()]


def reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over processes, with gradients (of the sum of every process's loss)."""
    return x if world_size() == 1 else _Sum.apply(x.contiguous())  # type: ignore[no-any-return]


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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return mine(grad)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the global batch, on CPUs (gloo) too.

    It is no `nn.SyncBatchNorm`, of which DDP refuses to wrap any on a CPU; on GPUs it computes
    by that one's kernels.
    """

    process_group = None  # all processes

    def forward(self, input: Tensor) -> Tensor:
        alone = not (dist.is_available() and dist.is_initialized())
        if alone or not self.training:
            return super().forward(input)
        if input.device.type == "cuda":
            return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]
        dims = [0, *range(2, input.ndim)]
        x = input if input.dtype == torch.float64 else input.float()
        count = reduce_sum(x.new_tensor([x.numel() / x.shape[1]]))
        mean = reduce_sum(x.sum(dims)) / count
        shape = [1, -1] + [1] * (input.ndim - 2)
        x = x - mean.view(shape)
        var = reduce_sum(x.square().sum(dims)) / count
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
