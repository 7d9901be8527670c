"""Prediction heads of methods without negatives, and what is left of them in ablations."""

from torch import nn

from unlabeled.parts.mlp import mlp

KINDS = ("mlp", "random", "none")


def predictor(
    kind: str, dim: int, hidden: int, *, bias: bool, last_bias: bool, norm: str
) -> nn.Module:
    """A head that maps an embedding (B, dim) to a prediction of another one.

    Args:
        kind: "mlp", trained; "random", which keeps its first weights; "none", the identity.
        dim: width of input and output.
        hidden: width of its hidden layer.
        bias: whether the hidden layer has one.
        last_bias: the same for the last layer.
        norm: see `mlp`.
    """
    if kind not in KINDS:
        raise ValueError(f"predictor must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "none":
        return nn.Identity()
    head = mlp(dim, hidden, dim, bias=bias, last_bias=last_bias, norm=norm)
    return head.requires_grad_(kind == "mlp")
