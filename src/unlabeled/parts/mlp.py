"""Projection and prediction heads."""

import itertools

from torch import nn

from unlabeled.dist import SyncBatchNorm


def mlp(
    *widths: int,
    bias: bool = True,
    last_bias: bool | None = None,
    norm: str = "batch",
    last_norm: bool = False,
    last_affine: bool = True,
) -> nn.Sequential:
    """Linear layers widths[0] -> ... -> widths[-1] with norm and ReLU between them.

    Args:
        widths: of the input, every hidden layer, and the output.
        bias: whether hidden linear layers have one.
        last_bias: the same for the last (None: as `bias`).
        norm: "batch", "sync" or "none", after every hidden layer.
        last_norm: a norm after the last layer too.
        last_affine: whether that last norm has scale and shift.
    """
    if len(widths) < 2:
        raise ValueError(f"a head needs an input and an output width, got {widths}")
    layers: list[nn.Module] = []
    for i, (width, following) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        has_bias = bias if not last or last_bias is None else last_bias
        layers.append(nn.Linear(width, following, bias=has_bias))
        if last and last_norm:
            layers.append(_norm(norm, following, affine=last_affine))
        elif not last:
            layers += [_norm(norm, following, affine=True), nn.ReLU(inplace=True)]
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))


def _norm(kind: str, width: int, *, affine: bool) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm1d(width, affine=affine)
    if kind == "sync":
        return SyncBatchNorm(width, affine=affine)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm must be batch, sync or none, got {kind!r}")
