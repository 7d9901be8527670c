"""From an encoder's last map back to pixels."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.parts.bottleneck import Bottleneck, Norm, after
from unlabeled.parts.bottleneck import bottleneck as between
from unlabeled.parts.pixels import normalized


class Decoder(nn.Module):
    """Doubles a map's sides once per width and once more, to a normalised image.

    Convolutions that a norm follows have no bias, nor has the last one: the context encoder's
    official code sets biases to 0 before every step.

    Args:
        channels: of the encoder's last map, `dim` of most backbones.
        widths: channels after every doubling but the last.
        up: "resize" (nearest neighbours, then 3x3) or "transposed" (4x4 with stride 2).
        bottleneck: see `bottleneck.bottleneck`, with `side` and `units`.
        side: of the map behind the bottleneck.
        units: width of a "pooled" or "dense" bottleneck.
        norm: "batch", "sync" (over processes) or "none".
        output: "linear", or "tanh", whose range are pixels from black to white: those of the
            image, normalised like it, so that nothing has to reach what tanh cannot.
        init_std: weights of convolutions start from N(0, init_std), scales of norms from
            N(1, init_std); None: PyTorch's. The context encoder's is 0.02.
    """

    def __init__(
        self,
        channels: int,
        *,
        widths: Sequence[int],
        up: Literal["resize", "transposed"] = "resize",
        bottleneck: Bottleneck = "map",
        side: int = 7,
        units: int = 256,
        norm: Norm = "batch",
        output: Literal["linear", "tanh"] = "linear",
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if up not in ("resize", "transposed"):
            raise ValueError(f"up must be resize or transposed, got {up!r}")
        if output not in ("linear", "tanh"):
            raise ValueError(f"output must be linear or tanh, got {output!r}")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be positive, one per doubling, got {list(widths)}")
        self.output = output
        self.bottleneck, width = between(bottleneck, channels, side=side, units=units, norm=norm)
        blocks: list[nn.Module] = []
        for following in widths:
            blocks += [*_doubled(up, width, following, norm == "none"), *after(norm, following)]
            width = following
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*_doubled(up, width, 3, False))
        if init_std is not None:
            initialise(self, init_std)

    def forward(self, x: Tensor, size: int) -> Tensor:
        """An image (B, 3, size, size) of a map (B, channels, h, w).

        Where doublings do not lead to that size, what they lead to is interpolated.
        """
        x = self.last(self.blocks(self.bottleneck(x)))
        if x.shape[-1] != size or x.shape[-2] != size:
            x = F.interpolate(x, size=(size, size), mode="bilinear")
        return normalized((x.tanh() + 1) / 2) if self.output == "tanh" else x


def last_map(backbone: nn.Module, x: Tensor) -> Tensor:
    """The map (B, C, h, w) of the backbone's last stage."""
    return list(cast(Any, backbone).stages(x).values())[-1]


def _doubled(up: str, width: int, following: int, bias: bool) -> list[nn.Module]:
    if up == "transposed":
        return [nn.ConvTranspose2d(width, following, 4, 2, 1, bias=bias)]
    return [
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(width, following, 3, padding=1, bias=bias),
    ]


def initialise(network: nn.Module, std: float) -> None:
    """As DCGAN starts: convolutions from N(0, std), norms from N(1, std), biases at 0."""
    for module in network.modules():
        kernel = isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        if kernel or isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 0.0 if kernel else 1.0, std)  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
