"""Sound on the device: its level, and views of pictures beside it."""

from collections.abc import Mapping, Sequence

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


class PictureSound(nn.Module):
    """Views of the pictures or clips, and after them the sound or its spectrogram.

    Args:
        chains: of the pictures or clips, as in `Views`.
        spectrogram: of the sound; None: the sound as it is, for networks that make their own.
        gain: of the sound, before.
        repeat: as in `Views`.
    """

    def __init__(
        self,
        chains: Sequence[Ops] | Mapping[str, Ops],
        spectrogram: LogSpectrogram | None,
        gain: Gain | None = None,
        repeat: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.pictures, self.spectrogram, self.gain = Views(chains, repeat), spectrogram, gain

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        """`views`: (B, [T,] 3, S, S) each, then (B, 1, bins, frames) or the sound (B, samples)."""
        if "audio" not in batch:
            raise ValueError("there is no sound: choose a decode with one, decode.sound=...")
        batch = self.pictures(batch, draws.fork("pictures"))
        audio = batch["audio"]  # type: ignore[typeddict-item]
        if self.gain is not None:
            audio = self.gain(audio, draws.fork("gain"))
        heard = audio if self.spectrogram is None else self.spectrogram(audio)
        return {**batch, "views": [*batch["views"], heard]}  # type: ignore
