"""Every image at the same contrast: a fixed step in front of any backbone."""

from typing import Any

from torch import Tensor, nn


class Contrast(nn.Module):
    """A backbone that sees images with centred channels and one root mean square.

    Relative position's patches are normalised so that gradients of brightness are a less useful
    cue (Doersch et al., 2015, official code: to 50 of 255 grey levels). The step is part of the
    network because patches that lost two colours have a third of the energy of images that kept
    them: evaluations see what training saw.

    Args:
        model: the backbone behind it.
        rms: over all values of an image, in units of normalised images: 0.87 is 50 grey levels.
    """

    def __init__(self, model: nn.Module, *, rms: float = 0.87) -> None:
        super().__init__()
        if rms <= 0:
            raise ValueError(f"rms must be positive, got {rms}")
        self.model, self.rms = model, rms
        self.dim = int(model.dim)  # type: ignore[arg-type]
        inner: Any = getattr(model, "config", None)
        target = "unlabeled.backbones.contrast.Contrast"
        self.config: dict[str, Any] | None = inner and {
            "_target_": target,
            "model": inner,
            "rms": rms,
        }

    def normalized(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) at this contrast; constant ones are zero."""
        x = x - x.mean((2, 3), keepdim=True)
        scale = x.square().mean((1, 2, 3), keepdim=True).clamp(min=1e-8).rsqrt()
        return x * (scale * self.rms)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalized(x))

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The model's own maps."""
        return self.model.stages(self.normalized(x))  # type: ignore[operator]
