"""Every image at the same contrast: a fixed step in front of any backbone."""

from torch import Tensor, nn

from unlabeled.backbones.behind import Behind


class Contrast(Behind):
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
        if rms <= 0:
            raise ValueError(f"rms must be positive, got {rms}")
        super().__init__(model, {"rms": rms})
        self.rms = rms

    def seen(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) at this contrast; constant ones are zero."""
        x = x - x.mean((2, 3), keepdim=True)
        scale = x.square().mean((1, 2, 3), keepdim=True).clamp(min=1e-8).rsqrt()
        return x * (scale * self.rms)
