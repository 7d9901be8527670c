"""What of a recording's pictures is shown, and what is heard beside them."""

import math

import torch
from torch import Tensor

from unlabeled.data.decode import Interpolation, resized
from unlabeled.data.recordings import Recording
from unlabeled.data.resample import TRIES, boxes, short_side
from unlabeled.data.rgb import UnreadableError
from unlabeled.draws import Draws

SILENT_TRIES = 10  # spans that are drawn before a recording counts as silent


class Box:
    """One random resized crop for all pictures, with torchvision's distribution of boxes.

    Args:
        size: side in pixels.
        scale: lowest and highest share of a picture's area.
        ratio: lowest and highest width / height.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    def __init__(
        self,
        *,
        size: int,
        scale: tuple[float, float] | list[float] = (0.08, 1.0),
        ratio: tuple[float, float] | list[float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bilinear",
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        for name, given in (("scale", scale), ("ratio", ratio)):
            low, high = given
            if not 0 < low <= high or (name == "scale" and high > 1):
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high, got {given}")
        self.size, self.interpolation = size, interpolation
        self.scale, self.ratio = (scale[0], scale[1]), (ratio[0], ratio[1])

    def __call__(self, pictures: Tensor, draws: Draws) -> Tensor:
        """(T, 3, size, size) uint8 of pictures (T, 3, H, W) uint8."""
        height, width = pictures.shape[-2:]
        box = boxes(draws.uniform(TRIES, 4), height, width, self.scale, self.ratio)
        top, left, h, w = box[0].tolist()
        part = pictures[..., top : top + h, left : left + w]
        return resized(part, self.size, self.size, self.interpolation)

    def __repr__(self) -> str:
        return f"Box(size={self.size}, scale={self.scale}, ratio={self.ratio}, {_by(self)})"


class Square:
    """A square of all pictures, after their short side became `resize`: the middle, or anywhere.

    Args:
        size: side in pixels.
        resize: the short side first becomes that; None: `size`.
        random: anywhere, not the middle.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    def __init__(
        self,
        *,
        size: int,
        resize: int | None = None,
        random: bool = False,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self.size, self.resize = size, size if resize is None else resize
        self.random, self.interpolation = random, interpolation
        if not 1 <= size <= self.resize:
            raise ValueError(f"need 1 <= size <= resize, got size={size}, resize={resize}")

    def __call__(self, pictures: Tensor, draws: Draws) -> Tensor:
        """(T, 3, size, size) uint8 of pictures (T, 3, H, W) uint8."""
        height, width = short_side(pictures.shape[-2], pictures.shape[-1], self.resize)
        pictures = resized(pictures, height, width, self.interpolation)
        room = (height - self.size, width - self.size)
        at = (draws.uniform(2)[0] * (torch.tensor(room) + 1)).long() if self.random else None
        top, left = (r // 2 for r in room) if at is None else at.tolist()
        return pictures[..., top : top + self.size, left : left + self.size].contiguous()

    def __repr__(self) -> str:
        return f"Square(size={self.size}, resize={self.resize}, random={self.random}, {_by(self)})"


Crop = Box | Square


class Sound:
    """How much sound there is beside the pictures.

    Args:
        seconds: of sound.
        rate: samples in a second.
        silence: spans quieter than this (decibels of the root mean square, 0 being a full square
            wave) are drawn again, and a recording with none louder counts as unreadable; None:
            any will do.
    """

    def __init__(self, *, seconds: float, rate: int, silence: float | None = None) -> None:
        if seconds <= 0 or rate < 1:
            raise ValueError(f"seconds and rate must be positive, got {seconds} and {rate}")
        self.seconds, self.rate, self.silence = seconds, rate, silence

    def __call__(self, recording: Recording, middle: float) -> Tensor:
        """(samples,) about a time, as far as possible within the recording."""
        start = min(middle - self.seconds / 2, recording.seconds - self.seconds)
        return recording.sound(max(0.0, start), self.seconds, self.rate)

    def silent(self, audio: Tensor) -> bool:
        """Whether it is too quiet."""
        if self.silence is None:
            return False
        power = float(audio.double().square().mean())
        return power <= 0 or 10 * math.log10(power) < self.silence

    def __repr__(self) -> str:
        return f"Sound(seconds={self.seconds}, rate={self.rate}, silence={self.silence})"


def heard(
    recording: Recording, sound: Sound | None, long: float, *key: int | str
) -> tuple[float, Tensor | None]:
    """The middle of a random span of time, at least `long` seconds, and what is heard about it.

    Raises:
        UnreadableError: it is silent wherever it was tried.
    """
    span = long if sound is None else max(long, sound.seconds)
    room = max(0.0, recording.seconds - span)
    for u in Draws(*key).uniform(SILENT_TRIES)[0].tolist():
        middle = u * room + min(span, recording.seconds) / 2
        if sound is None:
            return middle, None
        audio = sound(recording, middle)
        if not sound.silent(audio):
            return middle, audio
    raise UnreadableError(f"it is silent: below {sound.silence} dB")  # type: ignore[union-attr]


def _by(crop: Box | Square) -> str:
    return f"interpolation={crop.interpolation!r}"
