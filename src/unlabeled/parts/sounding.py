"""How far what is seen is from what is heard, and pictures of where something sounds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.parts.mlp import mlp
from unlabeled.parts.precision import full_precision


@full_precision
def distances(v: Tensor, a: Tensor) -> Tensor:
    """(B,) of the directions of rows (B, D); its gradient is finite where they coincide."""
    square = (F.normalize(v, dim=1) - F.normalize(a, dim=1)).square().sum(1)
    return (square + 1e-12).sqrt()


class Projections(nn.Module):
    """Two layers each that bring features of pictures and of sounds into one space.

    Args:
        seen: width of the features of pictures.
        heard: width of those of sounds.
        dim: of the space.
    """

    def __init__(self, seen: int, heard: int, dim: int) -> None:
        super().__init__()
        self.see, self.hear = (mlp(n, dim, dim, norm="none") for n in (seen, heard))

    def embed(self, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim) each, of (B, seen) and (B, heard)."""
        return self.see(v), self.hear(a)


def nearness() -> nn.Linear:
    """From distances (B, 1) to logits (B, 2) of other and same; near is the same from the start."""
    made = nn.Linear(1, 2)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        made.bias.copy_(torch.tensor([-1.0, 1.0]))
    return made


def overlay(pictures: Tensor, maps: Tensor) -> Tensor:
    """Pictures with their maps in colour: dark blue the least of each, over green to yellow.

    Args:
        pictures: (B, 3, H, W) in [0, 1].
        maps: (B, h, w), any values.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    even = (maps - low) / (high - low).clamp(min=1e-6)
    size = pictures.shape[-2:]
    x = F.interpolate(even[:, None].float(), size, mode="bilinear", align_corners=False)
    colour = torch.cat([x.square(), x, 0.5 * (1 - x)], dim=1)
    grey = pictures.mean(1, keepdim=True)
    return (0.5 * grey + 0.5 * colour).clamp(0, 1)
