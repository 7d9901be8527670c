"""Frozen means frozen: a backbone is looked through, and verified not to have changed."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from unlabeled import dist


def checksum(backbone: nn.Module) -> str:
    """Hex digest of a module's structure, parameters and buffers, the same on every device."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(backbone)).encode())
    for name, x in [*backbone.named_parameters(), *backbone.named_buffers()]:
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def unchanged(backbone: nn.Module) -> Iterator[str]:
    """Gives the checksum and verifies it in the end.

    Raises:
        RuntimeError: if a parameter or a buffer changed meanwhile.
    """
    before = checksum(backbone)
    yield before
    if checksum(backbone) != before:
        raise RuntimeError(
            f"parameters or buffers of {type(backbone).__name__} changed while it was evaluated; "
            "a frozen backbone may not change: look for a layer that updates in eval mode"
        )


@contextmanager
def frozen(backbone: nn.Module) -> Iterator[str]:
    """Evaluation mode without gradients; gives the checksum and verifies it in the end.

    Every submodule's training flag is restored.

    Raises:
        RuntimeError: if a parameter or a buffer changed meanwhile.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    with unchanged(backbone) as before:
        backbone.eval()
        try:
            # Not inference mode: a tensor that a module caches there would break later training.
            with torch.no_grad():
                yield before
        finally:
            for module, mode in modes:
                module.training = mode


@torch.no_grad()
def same_everywhere(backbone: nn.Module) -> None:
    """The first process's parameters and buffers in all processes.

    Running statistics of batch norm differ between them, and so would the features.
    """
    if dist.world_size() > 1:
        for x in [*backbone.parameters(), *backbone.buffers()]:
            x.copy_(dist.broadcast(x.contiguous()))
