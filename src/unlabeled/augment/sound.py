"""Sound on the device: its level, place and gaps, and views of pictures beside it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unlabeled.augment.views import Ops, Views
from unlabeled.batch import Batch
from unlabeled.draws import Draws, to
from unlabeled.spectrogram import LogSpectrogram


class Gain(nn.Module):
    """Each sound louder or softer by a factor, uniform in [1 - most, 1 + most]."""

    def __init__(self, *, most: float = 0.1) -> None:
        super().__init__()
        if not 0 <= most < 1:
            raise ValueError(f"most must be in [0, 1), got {most}")
        self.most = most

    def forward(self, audio: Tensor, draws: Draws) -> Tensor:
        """(B, samples) of (B, samples)."""
        factor = draws.uniform(1, low=1 - self.most, high=1 + self.most)
        return audio * to(factor, audio.device)


class Shift(nn.Module):
    """Each sound moved in time within its span, by up to `most` of its length, going round."""

    def __init__(self, *, most: float = 0.1) -> None:
        super().__init__()
        if not 0 <= most <= 1:
            raise ValueError(f"most is a share of the span, in [0, 1], got {most}")
        self.most = most

    def forward(self, audio: Tensor, draws: Draws) -> Tensor:
        """(B, samples) of (B, samples)."""
        if not self.most:
            return audio
        long = audio.shape[1]
        by = (draws.uniform(1, low=-self.most, high=self.most) * long).round().long()
        place = torch.arange(long, device=audio.device)
        return audio.gather(1, (place - to(by, audio.device)) % long)


class Masks(nn.Module):
    """Bands of frequencies and spans of time of each spectrogram, set to its mean.

    SpecAugment's masks, Park et al. 2019, https://arxiv.org/abs/1904.08779: each is uniformly 0 to
    so many bins or frames wide, and lies anywhere.

    Args:
        frequencies: most bins of a band.
        times: most frames of a span.
        count: bands, and spans.
    """

    def __init__(self, *, frequencies: int = 27, times: int = 25, count: int = 1) -> None:
        super().__init__()
        if min(frequencies, times) < 0 or count < 1:
            least = "frequencies and times must be at least 0, count 1"
            raise ValueError(f"{least}, got {frequencies=}, {times=}, {count=}")
        self.frequencies, self.times, self.count = frequencies, times, count

    @property
    def widest(self) -> int:
        """Of all masks; 0: nothing is hidden."""
        return max(self.frequencies, self.times)

    def forward(self, s: Tensor, draws: Draws) -> Tensor:
        """(B, 1, bins, frames) of such."""
        if not self.widest:
            return s
        bands = self._hidden(s.shape[2], self.frequencies, draws.fork("frequencies"))
        spans = self._hidden(s.shape[3], self.times, draws.fork("times"))
        hidden = to(bands, s.device)[:, None, :, None] | to(spans, s.device)[:, None, None]
        return torch.where(hidden, s.mean((1, 2, 3), keepdim=True), s)

    def _hidden(self, size: int, most: int, draws: Draws) -> Tensor:
        """(B, size) bool."""
        if most > size:
            raise ValueError(f"a mask of {most} is wider than a spectrogram's {size}: lower it")
        width = draws.fork("width").integers(most + 1, self.count)
        start = (draws.fork("start").uniform(self.count) * (size - width + 1)).long()
        place = torch.arange(size) - start[..., None]
        return ((place >= 0) & (place < width[..., None])).any(1)


class PictureSound(nn.Module):
    """Views of the pictures or clips, and after them the sound or its spectrogram.

    Args:
        chains: of the pictures or clips, as in `Views`.
        spectrogram: of the sound; None: the sound as it is, for networks that make their own.
        gain: of the sound, before.
        repeat: as in `Views`.
        shift: of the sound, before.
        masks: of the spectrogram.
    """

    def __init__(
        self,
        chains: Sequence[Ops] | Mapping[str, Ops],
        spectrogram: LogSpectrogram | None,
        gain: Gain | None = None,
        repeat: Sequence[int] | None = None,
        shift: Shift | None = None,
        masks: Masks | None = None,
    ) -> None:
        super().__init__()
        if masks is not None and masks.widest and spectrogram is None:
            raise ValueError("masks hide parts of a spectrogram, and spectrogram is null")
        self.pictures, self.spectrogram, self.gain = Views(chains, repeat), spectrogram, gain
        self.shift, self.masks = shift, masks

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        """`views`: (B, [T,] 3, S, S) each, then (B, 1, bins, frames) or the sound (B, samples)."""
        if "audio" not in batch:
            raise ValueError("there is no sound: choose a decode with one, decode.sound=...")
        batch = self.pictures(batch, draws.fork("pictures"))
        audio = batch["audio"]  # type: ignore[typeddict-item]
        if self.gain is not None:
            audio = self.gain(audio, draws.fork("gain"))
        if self.shift is not None:
            audio = self.shift(audio, draws.fork("shift"))
        heard = audio if self.spectrogram is None else self.spectrogram(audio)
        if self.masks is not None:
            heard = self.masks(heard, draws.fork("masks"))
        return {**batch, "views": [*batch["views"], heard]}  # type: ignore
