"""DCGAN's discriminator (Radford, Metz and Chintala, ICLR 2016. https://arxiv.org/abs/1511.06434)."""

from torch import Tensor, nn

from unlabeled.parts.bottleneck import Norm, after
from unlabeled.parts.decoder import initialise


class Discriminator(nn.Module):
    """Tells true images from made ones: 4x4 convolutions of stride 2 down to a side below 8.

    Args:
        side: of the images, in pixels.
        width: channels after the first convolution; each following one doubles them. The first
            has no norm, none has a bias (see `decoder.Decoder`).
        norm: "batch", "sync" (over processes) or "none".
        init_std: see `decoder.Decoder`.
    """

    def __init__(
        self, *, side: int = 64, width: int = 64, norm: Norm = "sync", init_std: float = 0.02
    ) -> None:
        super().__init__()
        if side < 8 or width < 1:
            raise ValueError(f"a discriminator needs side >= 8 and width >= 1, got {side}, {width}")
        self.side = side
        layers: list[nn.Module] = []
        channels, out = 3, width
        while side >= 8:
            layers += [
                nn.Conv2d(channels, out, 4, 2, 1, bias=False),
                *after("none" if channels == 3 else norm, out, slope=0.2),
            ]
            channels, out, side = out, 2 * out, side // 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, side, bias=False))
        initialise(self, init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B,) of images (B, 3, side, side) being true."""
        if x.shape[-2:] != (self.side, self.side):
            raise ValueError(
                f"a discriminator for {self.side} pixels got {x.shape[-2]}x{x.shape[-1]}: set "
                "discriminator.side"
            )
        return self.layers(x).flatten()
