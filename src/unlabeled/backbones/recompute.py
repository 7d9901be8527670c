"""Activation checkpointing (Chen et al., 2016): blocks computed again in the backward pass.

Memory falls from all activations to the inputs of the blocks, for a third more computation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STAGES = ("res2", "res3", "res4", "res5")


def chosen(which: bool | Sequence[str]) -> frozenset[str]:
    """Names of the stages to recompute: all, none, or those listed."""
    if isinstance(which, bool):
        return frozenset(STAGES if which else ())
    if isinstance(which, str) or not set(which) <= set(STAGES):
        raise ValueError(
            f"checkpoint_activations must be true, false or a list of {', '.join(STAGES)}, "
            f"got {which!r}"
        )
    return frozenset(which)


def through(blocks: nn.Sequential, x: Tensor, *, recompute: bool) -> Tensor:
    """A stage's output. With `recompute`, only the inputs of its blocks are kept for backward.

    Nothing in a block may be random. Batch norm's running statistics move once, in the forward
    pass. Maps of one position go through in float32 on a CPU: of a convolution with stride 2 over
    such a map, torch 2.14's bfloat16 weight gradient is whatever lay in memory.
    """
    if x.device.type == "cpu" and x.shape[-2:] == (1, 1) and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return through(blocks, x.float(), recompute=recompute)
    if not (recompute and torch.is_grad_enabled()):
        return blocks(x)
    for block in blocks:
        x = again(block, block, x, random=False)
    return x


def again(module: nn.Module, compute: Callable[..., Any], *given: Any, random: bool) -> Any:
    """compute(*given), of which the backward pass keeps the inputs and computes the rest again.

    Args:
        module: whose buffers move in the forward pass alone.
        compute: of this module.
        given: what it is called with.
        random: it may draw from torch's global generators, whose state is then kept too.
    """
    contexts = partial(_contexts, module)
    return checkpoint(
        compute, *given, use_reentrant=False, preserve_rng_state=random, context_fn=contexts
    )


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _still(block)


@contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Lets the block move copies of its buffers: running statistics stay where they are."""
    held = [(m, name, x) for m in block.modules() for name, x in m.named_buffers(recurse=False)]
    for module, name, x in held:
        setattr(module, name, x.clone())
    try:
        yield
    finally:
        for module, name, x in held:
            setattr(module, name, x)
