"""The log-spectrogram, on the device: for augmentations of sound, and for networks of sound."""

import torch
from torch import Tensor, nn


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
        """(B, 1, window // 2 + 1, frames) of (B, samples), in float32 at least."""
        if audio.ndim != 2:
            raise ValueError(
                f"a spectrogram is of sounds (B, samples), got {tuple(audio.shape)}: where the "
                "network makes its own, set method.augment.spectrogram=null"
            )
        if audio.shape[-1] < self.window:
            raise ValueError(
                f"a spectrogram's window of {self.window} samples is longer than the sound, "
                f"{audio.shape[-1]}: raise decode.sound.seconds or lower the window"
            )
        exact = audio if audio.dtype == torch.float64 else audio.float()
        options = {"window": self.hann.to(exact.dtype), "center": False, "return_complex": True}
        spectrum = torch.stft(exact, self.window, self.hop, **options)
        power = spectrum.real.square() + spectrum.imag.square()
        s = power.clamp(min=self.floor).log().div_(self.scale)[:, None]
        if self.range is not None:
            s = torch.maximum(s, s.amax((1, 2, 3), keepdim=True) - self.range)
        if self.centred:
            mean, spread = s.mean((1, 2, 3), keepdim=True), s.std((1, 2, 3), keepdim=True)
            s = (s - mean) / spread.clamp(min=1e-5)
        return s
