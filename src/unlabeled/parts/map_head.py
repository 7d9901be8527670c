"""A small convolutional head from a backbone's maps to a map of any size."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from unlabeled.parts.features import evaluating


class MapHead(nn.Module):
    """Brings stages to one width and one size, adds them, and predicts `out` numbers per place.

    Args:
        backbone: with `stages`; it is not kept.
        out: channels of the prediction.
        width: channels of the head.
        stages: names of the stages; None: the last, which evaluations look at.
    """

    def __init__(
        self,
        backbone: nn.Module,
        out: int,
        *,
        width: int = 256,
        stages: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        known = channels(backbone)
        self.stages = list(known)[-1:] if stages is None else list(stages)
        unknown = [name for name in self.stages if name not in known]
        if unknown or not self.stages:
            raise ValueError(f"stages must be some of {list(known)}, got {self.stages}")
        if list(known)[-1] not in self.stages:
            raise ValueError(
                f"stages={self.stages} lack the last, {list(known)[-1]}: it would rest"
            )
        self.lateral = nn.ModuleList(
            nn.Conv2d(known[name], width, 1, bias=False) for name in self.stages
        )
        self.predict = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1),
        )

    def forward(self, maps: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
        """Predictions (B, out, *size) of a backbone's maps by name."""
        parts = [lateral(maps[n]) for n, lateral in zip(self.stages, self.lateral, strict=True)]
        grown = [F.interpolate(x, size=tuple(size), mode="bilinear") for x in parts]
        return self.predict(torch.stack(grown).sum(0) if len(grown) > 1 else grown[0])


def channels(backbone: nn.Module) -> dict[str, int]:
    """Channels of a backbone's stages, in order, found without computing anything."""
    network = _Stages(backbone)
    size = getattr(backbone, "size", 64)
    with evaluating(network):
        named = [*network.named_parameters(), *network.named_buffers()]
        shapes = {name: torch.empty_like(x, device="meta") for name, x in named}
        maps = functional_call(network, shapes, (torch.zeros(1, 3, size, size, device="meta"),))
    return {name: x.shape[1] for name, x in maps.items()}


class _Stages(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.backbone.stages(x)  # type: ignore[operator]
