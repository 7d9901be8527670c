"""Momentum encoders: slow copies of trained modules."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def copy_of(*modules: nn.Module) -> nn.Sequential:
    """A frozen copy of the modules, applied one after another."""
    return nn.Sequential(*copy.deepcopy(modules)).requires_grad_(False)


@torch.no_grad()
def update(target: nn.Sequential, online: Sequence[nn.Module], momentum: float) -> None:
    """target <- momentum * target + (1 - momentum) * online, parameters only, in place.

    Batch-norm statistics are the target's own: it runs in training mode (BYOL, MoCo).
    """
    slow: list[Tensor] = list(target.parameters())
    fast: list[Tensor] = [p for module in online for p in module.parameters()]
    torch._foreach_lerp_(slow, fast, 1 - momentum)
