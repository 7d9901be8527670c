"""Momentum encoders: slow copies of trained modules."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def copy_of(*modules: nn.Module) -> nn.Sequential:
    """A frozen copy of the modules, applied one after another."""
    return nn.Sequential(*copy.deepcopy(modules)).requires_grad_(False)


@torch.no_grad()
def draw_anew(module: nn.Module) -> None:
    """Weights of the same distribution, independent of those that the module was built with.

    Every tensor's entries trade places. Entries of one tensor are drawn independently of each
    other and alike, so their order is all that is random about them beyond their histogram, and
    no knowledge of the initialisation is needed; constants (norm layers) stay. Do not use it on
    trained weights.
    """
    for p in module.parameters():
        p.copy_(p.flatten()[torch.randperm(p.numel())].view(p.shape))


@torch.no_grad()
def update(target: nn.Sequential, online: Sequence[nn.Module], momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online, parameters only, in place.

    Batch-norm statistics are the target's own: it runs in training mode (BYOL, MoCo).
    """
    slow: list[Tensor] = list(target.parameters())
    fast: list[Tensor] = [p for module in online for p in module.parameters()]
    torch._foreach_lerp_(slow, fast, 1 - momentum)
