"""Pictures over time with their sound, and sets of them: what decodes of clips read from.

Times are in seconds from a recording's first picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from unlabeled.data.rgb import UnreadableError
from unlabeled.data.splits import Split, digest
from unlabeled.truth import Annotation


class Recording(Protocol):
    """One recording; what is asked for is decoded, nothing else."""

    @property
    def times(self) -> Tensor:
        """(F,) float64, rising: when each picture appears, the first at 0; empty: sound alone."""
        ...

    @property
    def seconds(self) -> float:
        """How long the pictures last, that of the last one included; without any, the sound."""
        ...

    @property
    def sounding(self) -> bool:
        """Whether there is sound at all."""
        ...

    def pictures(self, positions: Sequence[int]) -> Tensor:
        """Pictures (T, 3, H, W) uint8 at positions in `times`, in that order.

        Raises:
            UnreadableError: they cannot be decoded.
        """
        ...

    def sound(self, start: float, seconds: float, rate: int) -> Tensor:
        """One channel (round(seconds * rate),) float32 in [-1, 1], silent where there is none.

        Raises:
            UnreadableError: it cannot be decoded, or there is no sound.
        """
        ...

    def motion(self) -> Tensor:
        """(F - 1,) float32: how much moves from each picture to the next, in any unit.

        Raises:
            UnreadableError: the pictures cannot be decoded.
        """
        ...


def shown(times: Tensor, seconds: Tensor) -> Tensor:
    """Positions (T,) int64 of the pictures that are seen at some times.

    Args:
        times: (F,) of a recording.
        seconds: (T,); before the first picture it is seen, after the last one that.

    Raises:
        UnreadableError: there are no pictures.
    """
    if not len(times):
        raise UnreadableError("it has no pictures, only sound")
    late = torch.searchsorted(times, seconds.to(times.dtype), right=True) - 1
    return late.clamp(0, len(times) - 1)


class Kept:
    """A recording in memory.

    Args:
        frames: (F, 3, H, W) uint8.
        rate: pictures in a second.
        audio: (samples,) integers of 16 bits or floats in [-1, 1], from the first picture on;
            None: there is no sound.
        audio_rate: samples in a second.
    """

    def __init__(
        self, frames: Tensor, rate: float, audio: Tensor | None = None, audio_rate: int = 0
    ) -> None:
        self.frames, self.rate, self.audio, self.audio_rate = frames, rate, audio, audio_rate

    @property
    def times(self) -> Tensor:
        return torch.arange(len(self.frames), dtype=torch.float64) / self.rate

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.rate

    @property
    def sounding(self) -> bool:
        return self.audio is not None

    def pictures(self, positions: Sequence[int]) -> Tensor:
        return self.frames[torch.as_tensor(positions, dtype=torch.int64)]

    def sound(self, start: float, seconds: float, rate: int) -> Tensor:
        if self.audio is None:
            raise UnreadableError("it has no sound")
        whole = self.audio if self.audio.is_floating_point() else self.audio.float() / 32768
        return spanned(whole.float(), self.audio_rate, start, seconds, rate)

    def motion(self) -> Tensor:
        return differences(self.frames)


def differences(frames: Tensor) -> Tensor:
    """(F - 1,): mean absolute difference of neighbours among pictures (F, 3, H, W) uint8."""
    x = frames.to(torch.int16)
    return (x[1:] - x[:-1]).abs().float().flatten(1).mean(1)


def spanned(audio: Tensor, rate: int, start: float, seconds: float, wanted: int) -> Tensor:
    """Part of a sound (samples,) at another rate: (round(seconds * wanted),), silent beyond it.

    Linear interpolation between samples, after a mean over those that become one where the rate
    falls by more than a half: for synthetic sound; files are resampled by their decoder.
    """
    count = round(seconds * wanted)
    at = (start + torch.arange(count, dtype=torch.float64) / wanted) * rate
    step = rate // wanted
    if step > 1:
        wide = audio[: len(audio) // step * step].view(-1, step).mean(1)
        audio, at = wide, at / step - (step - 1) / (2 * step)
    low = at.floor()
    share = (at - low).float()
    padded = torch.cat([audio.new_zeros(1), audio, audio.new_zeros(1)])
    first = (low.long() + 1).clamp(0, len(padded) - 1)
    second = (low.long() + 2).clamp(0, len(padded) - 1)
    return padded[first] * (1 - share) + padded[second] * share


@runtime_checkable
class Recorded(Protocol):
    """A split whose samples are recordings; `image` is the picture in the middle of each."""

    def recording(self, i: int) -> Recording:
        """One of them. Raises `UnreadableError`."""
        ...


@dataclass(frozen=True)
class Memory:
    """Recordings of one length in memory.

    Args:
        frames: (N, F, 3, H, W) uint8.
        rate: pictures in a second.
        audio: (N, samples) int16 or float32 in [-1, 1], or None.
        audio_rate: samples in a second.
        labels: (N,) int64 into `classes`, or None.
        classes: names of the classes; empty without labels.
        annotations: by kind, see `unlabeled.truth`: of the picture in the middle, `tracks` of all.
        names: of key-points and factors, by kind.
    """

    frames: Tensor
    rate: float
    audio: Tensor | None
    audio_rate: int
    labels: Tensor | None
    classes: tuple[str, ...]
    annotations: Mapping[str, Annotation] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frames)

    def name(self, i: int) -> str:
        """What to call a recording in a message."""
        return f"recording {i}"

    def lengths(self) -> Tensor:
        """(N,) int64: pictures of each."""
        return torch.full((len(self),), self.frames.shape[1])

    def recording(self, i: int) -> Kept:
        """One of them."""
        audio = None if self.audio is None else self.audio[i]
        return Kept(self.frames[i], self.rate, audio, self.audio_rate)

    def image(self, i: int) -> Tensor:
        """The picture in the middle, RGB (3, H, W) uint8."""
        return middle(self.recording(i))

    def take(self, positions: Tensor) -> "Memory":
        """Some of the recordings, in the order of `positions`."""
        labels = None if self.labels is None else self.labels[positions]
        audio = None if self.audio is None else self.audio[positions]
        known = {kind: x.take(positions) for kind, x in self.annotations.items()}
        rest = {"labels": labels, "audio": audio, "annotations": known}
        return replace(self, frames=self.frames[positions], **rest)

    def identity(self) -> str:
        """A hash of which recordings these are, in their order, with their labels."""
        parts = [self.frames.contiguous().numpy().data, repr((self.rate, self.audio_rate)).encode()]
        if self.audio is not None:
            parts.append(self.audio.contiguous().numpy().data)
        return digest(parts, self.labels, self.classes)


def middle(recording: Recording) -> Tensor:
    """The picture in the middle of a recording (3, H, W). Raises `UnreadableError`."""
    (picture,) = recording.pictures([len(recording.times) // 2])
    return picture


class Blank:
    """What stands for a recording that cannot be read: grey, humming and never too short.

    Args:
        pictured: false: it has no pictures, as those of the split that it stands in.
    """

    seconds = 400.0
    sounding = True

    def __init__(self, *, pictured: bool = True) -> None:
        self.times = torch.arange(10_000 if pictured else 0, dtype=torch.float64) / 25

    def pictures(self, positions: Sequence[int]) -> Tensor:
        grey = torch.full((1, 3, 1, 1), 128, dtype=torch.uint8)
        return grey.expand(len(positions), 3, 256, 256)

    def sound(self, start: float, seconds: float, rate: int) -> Tensor:  # decodes refuse silence
        hum = torch.arange(round(seconds * rate)) * (100 * 2 * torch.pi / rate)
        return hum.sin().sign()

    def motion(self) -> Tensor:
        return torch.zeros(len(self.times) - 1)


def sample(split: Split, i: int) -> Tensor | Recording:
    """What decodes take: the recording where there is one, else the image.

    Raises:
        UnreadableError: it cannot be read.
    """
    return split.recording(i) if isinstance(split, Recorded) else split.image(i)
