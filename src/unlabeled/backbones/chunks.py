"""A network that computes a large batch in chunks, with the gradient of the batch as a whole.

The idea of GradCache (Gao et al., 2021, https://arxiv.org/abs/2101.06983): a loss that compares the
images of a batch needs all embeddings at once, but not all activations. Each chunk's are dropped
after the forward pass and computed again when the backward pass comes to it, so that those of one
chunk exist at a time. Without batch norm loss and gradients are those of the whole batch, but for
the order of sums; batch norm sees a chunk.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unlabeled.backbones.recompute import again

ENTRIES = ("forward", "stages", "visible", "hear", "hear_stages")  # rows in, rows out


def divide(module: nn.Module, rows: int) -> None:
    """From here on the module computes at most so many rows at a time, in chunks of like size."""
    for name in ENTRIES:
        if (compute := getattr(module, name, None)) is not None:
            setattr(module, name, partial(_in_chunks, module, compute, rows))


def unite(module: nn.Module) -> None:
    """Takes `divide` back."""
    for name in ENTRIES:
        vars(module).pop(name, None)


def _in_chunks(module: nn.Module, compute: Callable[..., Any], rows: int, *given: Tensor) -> Any:
    chunks = -(-len(given[0]) // rows)
    parts = zip(*(x.tensor_split(chunks) for x in given), strict=True)
    return _joined([_chunk(module, compute, part) for part in parts])


def _chunk(module: nn.Module, compute: Callable[..., Any], part: tuple[Tensor, ...]) -> Any:
    if not torch.is_grad_enabled():
        return _plain(module, compute, *part)
    if torch.is_autocast_enabled(part[0].device.type):
        # A weight that autocast rounded for another chunk would sum its gradient in 16 bits.
        torch.clear_autocast_cache()
    return again(module, partial(_plain, module, compute), *part, random=True)


def _plain(module: nn.Module, compute: Callable[..., Any], *part: Tensor) -> Any:
    """Computes as if the module were not divided: `forward` may call `stages`."""
    own = vars(module)
    divided = {name: own.pop(name) for name in ENTRIES if name in own}
    try:
        return compute(*part)
    finally:
        own.update(divided)


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Mapping):
        return {name: torch.cat([out[name] for out in outputs]) for name in first}
    if isinstance(first, tuple):
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
    return torch.cat(outputs)
