"""A backbone that looks at an image patch by patch, as CPC's papers evaluate theirs."""

from typing import Any

from torch import Tensor, nn


class Patchwise(nn.Module):
    """Features averaged over a grid of overlapping patches, each of which is seen alone.

    A network that was trained on patches (CPC) meets what it knows: its padding lies where it lay,
    and no map is larger than it ever was. Costs more than the image at once, the more patches
    overlap.

    Args:
        model: the backbone behind it.
        size: side of a patch in pixels.
        stride: from a patch to the next, in pixels.
    """

    def __init__(self, model: nn.Module, *, size: int = 64, stride: int = 32) -> None:
        super().__init__()
        if size < 1 or stride < 1:
            raise ValueError(f"size and stride must be at least 1, got {size} and {stride}")
        self.model, self.size, self.stride = model, size, stride
        self.dim = int(model.dim)  # type: ignore[arg-type]
        inner: Any = getattr(model, "config", None)
        target = "unlabeled.backbones.patchwise.Patchwise"
        own = {"_target_": target, "model": inner, "size": size, "stride": stride}
        self.config: dict[str, Any] | None = inner and own

    def patches(self, x: Tensor) -> Tensor:
        """(B, P, 3, size, size) of images (B, 3, H, W), row by row."""
        for side in x.shape[-2:]:
            if side < self.size or (side - self.size) % self.stride:
                raise ValueError(
                    f"patches of size={self.size} with stride={self.stride} do not fill a side of "
                    f"{side} pixels: choose images of {self.size} + n * {self.stride}"
                )
        windows = x.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride)
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x)
        return self.model(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]).mean(1)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The model's own maps (B, C, h, w) of a patch, averaged over patches."""
        patches = self.patches(x)
        maps = self.model.stages(patches.flatten(0, 1))  # type: ignore[operator]
        return {name: y.unflatten(0, patches.shape[:2]).mean(1) for name, y in maps.items()}
