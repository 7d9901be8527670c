"""Mixtures of Gaussians that a network predicts: mixture density networks (Bishop, 1994)."""

from torch import Tensor, nn

from unlabeled.draws import Draws
from unlabeled.parts.dropout import dropped, probability
from unlabeled.parts.mlp import mlp
from unlabeled.parts.precision import full_precision, raised


@full_precision
def mixture_loss(
    z: Tensor,
    log_pi: Tensor,
    mu: Tensor,
    sigma: float,
    *,
    likelihood: str = "nearest",
    divide_by: str = "variance",
) -> Tensor:
    """Mean over rows of -log P(z), without the Gaussians' constant.

    Args:
        z: (B, d).
        log_pi: (B, K).
        mu: (B, K, d).
        sigma: of every component.
        likelihood: "nearest": -log pi_k + |z - mu_k|^2 / (2 sigma^2) of the component whose mean
            is nearest to z; "mixture": -log sum_k pi_k exp(-|z - mu_k|^2 / (2 sigma^2)).
        divide_by: "variance", or "sigma" in the place of sigma^2 (the official code).
    """
    squared = (z[:, None] - mu).square().sum(2)  # B K
    energy = squared / (2 * (sigma**2 if divide_by == "variance" else sigma))
    if likelihood == "mixture":
        return -(log_pi - energy).logsumexp(1).mean()
    nearest = squared.argmin(1, keepdim=True)
    return (energy - log_pi).gather(1, nearest).mean()


class MixtureHead(nn.Module):
    """log pi (B, K) and mu (B, K, d) of a map (B, C, h, w), whose layout it keeps coarsely.

    Args:
        channels: C.
        dim: d.
        components: K.
        sigma: of every component.
        width: of the hidden layer.
        grid: side of the map that it reads.
        likelihood: see `mixture_loss`.
        divide_by: likewise.
        dropout: of what either linear layer reads, the share left out in training (official
            code: 0.25).
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        *,
        components: int = 8,
        sigma: float = 0.1,
        width: int = 512,
        grid: int = 4,
        likelihood: str = "nearest",
        divide_by: str = "variance",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("components", components), ("width", width), ("grid", grid)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if sigma <= 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        if likelihood not in ("nearest", "mixture"):
            raise ValueError(f"likelihood must be nearest or mixture, got {likelihood!r}")
        if divide_by not in ("variance", "sigma"):
            raise ValueError(f"divide_by must be variance or sigma, got {divide_by!r}")
        self.components, self.dim, self.sigma = components, dim, sigma
        self.likelihood, self.divide_by = likelihood, divide_by
        self.dropout = probability(dropout)
        narrow = max(1, width // 4)
        self.read = nn.Sequential(
            nn.Conv2d(channels, narrow, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(grid),
            nn.Flatten(),
        )
        self.mixture = mlp(narrow * grid**2, width, components * (dim + 1))

    def forward(self, x: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        out = self.read(x)
        for i, layer in enumerate(self.mixture):
            if draws is not None and isinstance(layer, nn.Linear):
                out = dropped(out, self.dropout, draws.fork(i))
            out = layer(out)
        out = raised(out)
        logits, mu = out.split([self.components, self.components * self.dim], 1)
        return logits.log_softmax(1), mu.view(-1, self.components, self.dim)

    def loss(self, z: Tensor, log_pi: Tensor, mu: Tensor) -> Tensor:
        """`mixture_loss` of codes z (B, d) and what `forward` gave."""
        how = {"likelihood": self.likelihood, "divide_by": self.divide_by}
        return mixture_loss(z, log_pi, mu, self.sigma, **how)


def likeliest(log_pi: Tensor, mu: Tensor, count: int) -> Tensor:
    """Means (B, count, d) of the components of largest probability, these first."""
    order = log_pi.topk(count, dim=1).indices
    return mu.gather(1, order[..., None].expand(-1, -1, mu.shape[2]))
