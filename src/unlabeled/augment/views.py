"""From uint8 crops to the views a loss compares, on the device and in whole batches.

An op is a module (x, draws) -> x on floats in [0, 1], (B, 3, H, W) or (B, T, 3, H, W). It draws
once for each of the B rows, so the frames of a clip share a draw and the images of a batch do
not, and it may write its result into the x it was given.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unlabeled.augment.fuse import fused, fusible
from unlabeled.batch import MEAN, STD, Batch
from unlabeled.draws import Draws, to

Ops = Sequence[nn.Module] | Mapping[str, nn.Module]  # names are for overrides, order decides


class Chain(nn.Module):
    """Ops one after the other, each with draws of its own.

    Args:
        ops: in order, with or without names.
    """

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        self.ops = nn.ModuleList(ops.values() if isinstance(ops, Mapping) else ops)

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        for i, op in enumerate(self.ops):
            x = op(x, draws.fork(i))
        return x


class Views(nn.Module):
    """One view of each crop, through the crop's chain of ops, normalised.

    Args:
        chains: chains of ops in the order of the crops, with or without names, so that
            `augment.chains.view.blur.p=0` overrides one number.
        repeat: how many crops in a row share each chain (with draws of their own), by default 1.
        compile: colours, narrow blur and normalisation by torch.compile, which needs a C++
            compiler (or Triton on a GPU): the same numbers but for rounding, after a first step
            of half a minute. On a CPU it is no faster at 32 pixels, where little is left to fuse.
    """

    def __init__(
        self,
        chains: Sequence[Ops] | Mapping[str, Ops],
        repeat: Sequence[int] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.fused = compile
        given = chains.values() if isinstance(chains, Mapping) else chains
        self.chains = nn.ModuleList(Chain(ops) for ops in given)
        self.repeat = [1] * len(self.chains) if repeat is None else [int(n) for n in repeat]
        if len(self.repeat) != len(self.chains) or min(self.repeat, default=0) < 1:
            raise ValueError(
                f"repeat={self.repeat} must say for each of {len(self.chains)} chains how many "
                "crops share it, at least 1"
            )

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        chains = [c for c, n in zip(self.chains, self.repeat, strict=True) for _ in range(n)]
        crops = taken(batch, len(chains), "chains")
        with fused(self.fused):
            views = [
                finished(chain(unit(crop), draws.fork(f"view{i}")))
                for i, (chain, crop) in enumerate(zip(chains, crops, strict=True))
            ]
        return {**batch, "views": views}


def taken(batch: Batch, count: int, what: str) -> list[Tensor]:
    """The batch's crops, if there are as many as an augmentation takes."""
    crops = batch.get("crops", [])
    if len(crops) != count:
        raise ValueError(
            f"{count} {what} for {len(crops)} crops: choose a `decode` that gives as many crops "
            "as `augment` takes"
        )
    return crops


def unit(crop: Tensor) -> Tensor:
    """uint8 pixels as new floats in [0, 1]."""
    return crop.float().div_(255)


def finished(x: Tensor) -> Tensor:
    """Images (..., 3, H, W) in [0, 1], overwritten by what `batch.normalize` makes of them.

    As one batch (N, 3, H, W) they are channels_last.
    """
    # In place and from pinned memory: fresh memory costs a CPU three times the arithmetic, and
    # a copy of two constants would make the host wait for the GPU.
    mean, std = (to(torch.tensor(v), x.device).view(3, 1, 1) for v in (MEAN, STD))
    return channels_last(_normalized(x, mean, std))


@fusible(writes=True)
def _normalized(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return x.sub_(mean).div_(std)


def channels_last(x: Tensor) -> Tensor:
    """The same numbers in the memory order in which convolutions are fastest."""
    flat = x.flatten(0, -4)
    if not flat.is_contiguous(memory_format=torch.channels_last):
        # On a CPU half the time of `contiguous`, which copies one pixel after the other.
        flat = torch.stack(flat.unbind(1), -1).permute(0, 3, 1, 2)
    return flat.unflatten(0, x.shape[:-3])
