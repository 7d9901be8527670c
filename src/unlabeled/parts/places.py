"""What a backbone sees of an image, with or without the places where it sees it."""

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Places(nn.Module):
    """Features of images for a head that may need to know where things are.

    Args:
        features: width of the backbone's features.
        side: the last stage's map is averaged to side x side places, which are laid side by side;
            None: the backbone's features themselves, where a global average may have been.
        widths: of linear layers with ReLU behind that.
    """

    def __init__(self, features: int, *, side: int | None, widths: Sequence[int] = ()) -> None:
        super().__init__()
        if side is not None and side < 1:
            raise ValueError(f"side must be at least 1, or null for no places, got {side}")
        if min(widths, default=1) < 1:
            raise ValueError(f"widths must be at least 1, got {list(widths)}")
        self.features, self.side = features, side
        first = features if side is None else features * side * side
        layers = [
            nn.Sequential(nn.Linear(a, b), nn.ReLU(inplace=True))
            for a, b in itertools.pairwise([first, *widths])
        ]
        self.layers = nn.Sequential(*layers)
        self.dim = [first, *widths][-1]

    def forward(self, backbone: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, features) without places, and what a head sees (B, dim).

        Args:
            backbone: with `stages`, if places are asked for.
            x: (B, 3, H, W).
        """
        if self.side is None:
            h = backbone(x)
            return h, self.layers(h)
        maps = list(backbone.stages(x).values())[-1]  # type: ignore[operator]
        if maps.shape[1] != self.features:
            raise ValueError(
                f"side={self.side} needs places of the last stage, whose {maps.shape[1]} channels "
                f"are not the backbone's {self.features} features: choose a backbone that ends in "
                "a global average, or side=null"
            )
        kept = F.adaptive_avg_pool2d(maps, self.side).flatten(1)
        return maps.mean((2, 3)), self.layers(kept)
