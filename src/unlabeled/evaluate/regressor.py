"""A head that says where key-points are, on a backbone's last map."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import normalize
from unlabeled.evaluate.annotated import gradients
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.iterations import seeded
from unlabeled.evaluate.posed import Example


class Scale(nn.Module):
    """Multiplies with a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Regressor(nn.Module):
    """Crops to places (B, K, 2), shares of their sides.

    Args:
        backbone: what is read.
        mean: (K, 2) what a head that knows nothing says.
        spread: (2,) what its answers are multiplied with.
        grid: cells along each side that the last map is averaged over; 0: the output.
        learns: whether the backbone gets gradients.
    """

    def __init__(
        self, backbone: nn.Module, mean: Tensor, spread: Tensor, *, grid: int, learns: bool
    ) -> None:
        super().__init__()
        self.backbone, self.grid, self.learns = backbone, grid, learns
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)
        self.head: nn.Module = nn.Identity()
        self.stage = "final"

    def features(self, x: Tensor) -> Tensor:
        """What the head reads (B, C, g, g)."""
        stages: Any = getattr(self.backbone, "stages", None)
        maps: Any = stages(x) if self.grid and callable(stages) else {}
        if not maps:
            return self.backbone(x).float()[:, :, None, None]
        self.stage, last = list(maps.items())[-1]
        size = (min(self.grid, last.shape[2]), min(self.grid, last.shape[3]))
        return F.adaptive_avg_pool2d(last.float(), size)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with gradients(self.learns and torch.is_grad_enabled()):
            features = self.features(x)
        return self.head(features).view(len(x), -1, 2) * self.spread + self.mean


def regressor(
    subject: Subject,
    crop: Tensor,
    mean: Tensor,
    spread: Tensor,
    *,
    grid: int,
    width: int,
    learns: bool,
) -> Regressor:
    """A network with a new head, as wide as it must be for a crop like the one given.

    The head is a batch norm without parameters and a linear layer that begins at zero, or, with
    a width, one hidden layer. Features are scaled to variance 1 / their number, so that one
    learning rate does for all.
    """
    network = Regressor(subject.backbone, mean, spread, grid=grid, learns=learns)
    network.to(subject.device)
    with torch.no_grad():
        subject.backbone.eval()
        seen = network.features(normalize(crop)[None].to(subject.device))
    size, outputs = seen[0].numel(), 2 * len(mean)
    with seeded(torch.device("cpu"), subject.seed, "keypoints", "head"):
        layers: list[nn.Module] = [
            nn.BatchNorm2d(seen.shape[1], affine=False),
            nn.Flatten(),
            Scale(size**-0.5),
        ]
        if width:
            layers += [nn.Linear(size, width), nn.ReLU(inplace=True)]
        last = nn.Linear(width or size, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    network.head = nn.Sequential(*layers, last).to(subject.device)
    return network


def loss(network: Regressor, some: Sequence[Example], least: float, device: torch.device) -> Tensor:
    """The mean squared distance, in standard deviations, of key-points that count."""
    x = normalize(torch.stack([example.crop for example in some])).to(device)
    true = torch.stack([example.points for example in some]).to(device)
    inside = ((true[..., :2] >= 0) & (true[..., :2] <= 1)).all(-1)
    counts = (true[..., 2] >= least) & inside
    away = (network(x) - true[..., :2]) / network.spread
    return (away.square().sum(-1) * counts).sum() / counts.sum().clamp(min=1)
