"""Several views through one network."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def embed(
    network: Callable[[Tensor], Tensor], views: Sequence[Tensor], *, joint: bool
) -> list[Tensor]:
    """The network's output (B, ...) for every view (B, 3, H, W).

    Args:
        network: maps images to rows.
        views: neighbours of one resolution may go through together.
        joint: True forwards each run of equal resolution as one batch, so that batch norm sees
            all its views at once (SimCLR, SwAV); False one view at a time (BYOL, Barlow Twins).
    """
    if not joint:
        return [network(view) for view in views]
    outputs: list[Tensor] = []
    start = 0
    while start < len(views):
        end = start + 1
        while end < len(views) and views[end].shape[1:] == views[start].shape[1:]:
            end += 1
        group = views[start] if end == start + 1 else torch.cat(list(views[start:end]))
        outputs += network(group).chunk(end - start)
        start = end
    return outputs
