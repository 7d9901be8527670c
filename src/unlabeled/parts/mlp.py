"""Projection and prediction heads."""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.dist import SyncBatchNorm
from unlabeled.draws import Draws
from unlabeled.parts.dropout import dropped, probability


def mlp(
    *widths: int,
    bias: bool = True,
    last_bias: bool | None = None,
    norm: str = "batch",
    last_norm: bool = False,
    last_affine: bool = True,
    activation: str = "relu",
) -> nn.Sequential:
    """Linear layers widths[0] -> ... -> widths[-1] with norm and activation between them.

    Args:
        widths: of the input, every hidden layer, and the output.
        bias: whether hidden linear layers have one.
        last_bias: the same for the last (None: as `bias`).
        norm: "batch", "sync" or "none", after every hidden layer.
        last_norm: a norm after the last layer too.
        last_affine: whether that last norm has scale and shift.
        activation: "relu" or "gelu".
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
            layers += [_norm(norm, following, affine=True), _activation(activation)]
    return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))


def _activation(kind: str) -> nn.Module:
    if kind == "relu":
        return nn.ReLU(inplace=True)
    if kind == "gelu":
        return nn.GELU()
    raise ValueError(f"activation must be relu or gelu, got {kind!r}")


def _norm(kind: str, width: int, *, affine: bool) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm1d(width, affine=affine)
    if kind == "sync":
        return SyncBatchNorm(width, affine=affine)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm must be batch, sync or none, got {kind!r}")


class Hidden(nn.Module):
    """Linear layers with ReLU between them and dropout before each, as in AlexNet's classifier.

    Args:
        widths: of the input and of every layer; with one alone this is the identity.
        dropout: probability that a unit is left out.
    """

    def __init__(self, *widths: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout, self.dim = probability(dropout), widths[-1]
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, h: Tensor, draws: Draws | None = None) -> Tensor:
        """The last layer's output (B, dim), before a ReLU; nothing is dropped without draws."""
        for i, layer in enumerate(self.layers):
            h = F.relu(h) if i else h
            h = layer(dropped(h, self.dropout, None if draws is None else draws.fork(i)))
        return h
