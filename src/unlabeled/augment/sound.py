"""Sound on the device: its level, and the log-spectrogram that networks see."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from unlabeled.augment.views import Ops, Views
from unlabeled.batch import Batch
from unlabeled.draws import Draws, to


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


class LogSpectrogram(nn.Module):
    """The logarithm of the short-time power spectrum, as a picture of one channel.

        S = log(max(|STFT|^2, floor)) / scale, then within `range` of each sound's maximum

    Frames lie within the sound: nothing is padded, and their number is 1 + (samples - window) //
    hop; 1 s at 48 kHz with a window of 512 and a hop of 240 has 257 x 198.

    Args:
        window: samples of a frame (a Hann window), and length of the transform.
        hop: samples from frame to frame.
        floor: the least power: no logarithm of zero.
        scale: what the logarithm is divided by (L3's public code: 5).
        range: values this far below the sound's maximum and less become equal; None: no limit.
            In units of S: 100 dB are 23.03 / scale.
        centred: each sound's mean is taken off, and it is divided by its standard deviation.
    """

    hann: Tensor

    def __init__(
        self,
        *,
        window: int = 512,
        hop: int = 240,
        floor: float = 1e-12,
        scale: float = 5.0,
        range: float | None = None,
        centred: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("window", window), ("hop", hop), ("floor", floor), ("scale", scale)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if range is not None and range <= 0:
            raise ValueError(f"range must be positive, got {range}")
        self.window, self.hop, self.floor, self.scale = window, hop, floor, scale
        self.range, self.centred = range, centred
        self.register_buffer("hann", torch.hann_window(window), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, 1, window // 2 + 1, frames) float32 of (B, samples)."""
        if audio.shape[-1] < self.window:
            raise ValueError(
                f"a spectrogram's window of {self.window} samples is longer than the sound, "
                f"{audio.shape[-1]}: raise decode.sound.seconds or lower the window"
            )
        options = {"window": self.hann, "center": False, "return_complex": True}
        spectrum = torch.stft(audio.float(), self.window, self.hop, **options)
        power = spectrum.real.square() + spectrum.imag.square()
        s = power.clamp(min=self.floor).log().div_(self.scale)[:, None]
        if self.range is not None:
            s = torch.maximum(s, s.amax((1, 2, 3), keepdim=True) - self.range)
        if self.centred:
            mean, spread = s.mean((1, 2, 3), keepdim=True), s.std((1, 2, 3), keepdim=True)
            s = (s - mean) / spread.clamp(min=1e-5)
        return s


class PictureSound(nn.Module):
    """Views of the pictures or clips, and after them the spectrogram of the sound.

    Args:
        chains: of the pictures or clips, as in `Views`.
        spectrogram: of the sound.
        gain: of the sound, before.
        repeat: as in `Views`.
    """

    def __init__(
        self,
        chains: Sequence[Ops] | Mapping[str, Ops],
        spectrogram: LogSpectrogram,
        gain: Gain | None = None,
        repeat: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.pictures, self.spectrogram, self.gain = Views(chains, repeat), spectrogram, gain

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        """`views`: (B, [T,] 3, S, S) each, then (B, 1, bins, frames)."""
        if "audio" not in batch:
            raise ValueError("there is no sound: choose a decode with one, decode.sound=...")
        batch = self.pictures(batch, draws.fork("pictures"))
        audio = batch["audio"]  # type: ignore[typeddict-item]
        if self.gain is not None:
            audio = self.gain(audio, draws.fork("gain"))
        return {**batch, "views": [*batch["views"], self.spectrogram(audio)]}  # type: ignore
