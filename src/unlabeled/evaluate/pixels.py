"""The baseline that has learned nothing: the pixels themselves."""

import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import denormalize
from unlabeled.spectrogram import LogSpectrogram

CELLS = 4  # along each side of a place of `PixelMaps`


class Pixels(nn.Module):
    """An image's values in [0, 1], or all of a clip's, as features; of at most 32 x 32 pixels.

    Args:
        side: every image is resized to this; None keeps those of at most 32 as they are.
    """

    def __init__(self, *, side: int | None = None) -> None:
        super().__init__()
        if side is not None and side < 1:
            raise ValueError(f"side must be at least 1 pixel, got {side}")
        self.side = side
        self._dim = None if side is None else 3 * side * side

    @property
    def dim(self) -> int:
        """Width of the features, known from the first image on where no side is given."""
        if self._dim is None:
            raise ValueError("Pixels(side=None) has no width before it saw an image")
        return self._dim

    def forward(self, x: Tensor) -> Tensor:
        x = denormalize(x)
        size = [self.side or min(32, s) for s in x.shape[-2:]]
        if size != list(x.shape[-2:]):
            rows = x.flatten(0, -4)  # pictures of clips too
            small = F.interpolate(rows, size, mode="bilinear", antialias=True, align_corners=False)
            x = small.unflatten(0, x.shape[:-3])
        flat = x.flatten(1)
        self._dim = flat.shape[1]
        return flat

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """One stage, `pixels`, whose channels are the values and whose map is 1 x 1."""
        return {"pixels": self(x)[:, :, None, None]}

    def hear(self, audio: Tensor) -> Tensor:
        """The log-spectrograms of sounds (B, samples), of at most 32 x 32, as features.

        What pixels are to pictures; powers 100 dB below a sound's maximum and less are equal.
        """
        window = min(512, audio.shape[1])
        options = {"window": window, "hop": max(1, window // 2), "scale": 1.0, "range": 23.03}
        s = LogSpectrogram(**options).to(audio.device)(audio)  # type: ignore[arg-type]
        size = [min(32, side) for side in s.shape[-2:]]
        s = F.interpolate(s, size, mode="bilinear", antialias=True, align_corners=False)
        return s.flatten(1)

    def extra_repr(self) -> str:
        return f"side={self.side}"


class PixelMaps(nn.Module):
    """Pixels where detectors and segmenters expect a backbone's stages: maps res2 to res5.

    A place of a map is the 4 x 4 averages of the pixels that it stands for, 48 channels; places
    are 4, 8, 16 and 32 pixels wide, as a ResNet's. Images are continued to whole places.
    """

    def __init__(self) -> None:
        super().__init__()
        self.res2 = nn.PixelUnshuffle(CELLS)
        self.res3, self.res4, self.res5 = _Coarser(), _Coarser(), _Coarser()

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, h, w) to maps (B, 48, h / 4, w / 4) ... (B, 48, h / 32, w / 32)."""
        height, width = (-side % 32 for side in x.shape[-2:])
        maps, found = F.pad(x, (0, width, 0, height), mode="replicate"), {}
        for name in ("res2", "res3", "res4", "res5"):
            maps = found[name] = self.get_submodule(name)(maps)
        return found


class _Coarser(nn.Module):
    """Places of twice the width: (B, 48, h, w) to (B, 48, h / 2, w / 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.avg_pool2d(F.pixel_shuffle(x, CELLS), 2), CELLS)
