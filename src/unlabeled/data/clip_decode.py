"""From a recording to clips, pictures and sound: the CPU half of their augmentation.

A clip has one span of time and one box for all its pictures. Sound comes from the same span: the
longer of the two is drawn within the recording, the shorter lies in its middle. Clips longer than
the recording start at its beginning and go round; sound is silent beyond the recording's ends.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from unlabeled.batch import Batch
from unlabeled.data.clip_parts import Crop, Sound, Square, heard
from unlabeled.data.decode import Decode, Interpolation
from unlabeled.data.recordings import Recording, shown
from unlabeled.draws import Draws


class ClipDecode(Protocol):
    """A recording in; out, what a batch has of one sample: tensors without their first dimension.

    `repr` says everything that decides them.
    """

    @property
    def gives(self) -> frozenset[str]:
        """The entries of a batch that it fills."""
        ...

    def __call__(self, recording: Recording, *key: int | str) -> Batch:
        """`key` fixes what is random. Raises `UnreadableError`."""
        ...


class Clips:
    """Random clips of a recording: `crops`, with their `frames`, and sound if asked for.

    `frames` (T,) are positions in the recording's `times`, of the first clip; `audio` (samples,).

    Args:
        frames: pictures of a clip.
        rate: of them, in a second.
        crop: the part of the pictures that is shown.
        count: clips of each recording, each with a time and a box of its own.
        sound: what is heard; with one clip only.
        speed: lowest and highest speed that a clip is played at, log-uniform: at 2 its pictures
            lie twice as far apart. Not with sound, which keeps its own.
    """

    def __init__(
        self,
        *,
        frames: int,
        rate: float,
        crop: Crop,
        count: int = 1,
        sound: Sound | None = None,
        speed: Sequence[float] = (1.0, 1.0),
    ) -> None:
        if frames < 1 or rate <= 0 or count < 1:
            raise ValueError(
                f"frames, rate and count must be positive, got {frames}, {rate} and {count}"
            )
        if sound is not None and count > 1:
            raise ValueError(f"sound belongs to one clip, and count={count}: choose count=1")
        low, high = speed if len(speed) == 2 else (0.0, 0.0)
        if not 0 < low <= high:
            raise ValueError(f"speed must be [low, high] with 0 < low <= high, got {[*speed]}")
        if sound is not None and (low, high) != (1, 1):
            raise ValueError(f"sound keeps its speed: choose speed=[1,1], got {[*speed]}")
        self.frames, self.rate, self.crop, self.count = frames, rate, crop, count
        self.sound, self.speed = sound, (float(low), float(high))

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"crops", "frames"} | ({"audio"} if self.sound else set()))

    def __call__(self, recording: Recording, *key: int | str) -> Batch:
        (low, high), audio = self.speed, None
        crops, first = [], None
        for i in range(self.count):
            u = Draws(*key, "speed", i).uniform()[0].item()
            rate = self.rate / (low * (high / low) ** u)
            long, when = self.frames / rate, ("time", i) if i else ("time",)
            middle, sound = heard(recording, None if i else self.sound, long, *key, *when)
            audio = audio if i else sound
            found = clip(recording, middle - long / 2, self.frames, rate)
            first = found if first is None else first
            crops.append(self.crop(recording.pictures(found.tolist()), Draws(*key, "box", i)))
        return entries(crops, first, audio)

    def __repr__(self) -> str:
        rest = f"count={self.count}, crop={self.crop!r}, sound={self.sound!r}, speed={self.speed}"
        return f"Clips(frames={self.frames}, rate={self.rate}, {rest})"


class Evenly:
    """Clips, or pictures, whose middles divide a recording evenly: to evaluate.

    Of a recording without pictures, with `sound`, there is the sound alone, and no crops.

    Args:
        size: side in pixels.
        resize: the short side first becomes that; None: `size`.
        frames: pictures of a clip; None: single pictures (3, size, size) instead of clips.
        rate: pictures of a clip in a second.
        clips: of each recording: so many `crops`.
        sound: what is heard about the middle of the recording.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    def __init__(
        self,
        *,
        size: int,
        resize: int | None = None,
        frames: int | None = None,
        rate: float = 16.0,
        clips: int = 1,
        sound: Sound | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        if (frames is not None and frames < 1) or rate <= 0 or clips < 1:
            raise ValueError(
                f"frames, rate and clips must be positive, got {frames}, {rate} and {clips}"
            )
        self.crop = Square(size=size, resize=resize, interpolation=interpolation)
        self.frames, self.rate, self.clips, self.sound = frames, rate, clips, sound

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"crops", "frames"} | ({"audio"} if self.sound else set()))

    def __call__(self, recording: Recording, *key: int | str) -> Batch:
        crops, first = [], None
        alone = self.sound is not None and not len(recording.times)
        for i in range(0 if alone else self.clips):
            middle = (i + 0.5) * recording.seconds / self.clips
            if self.frames is None:
                found = shown(recording.times, torch.tensor([middle]))
            else:
                long = self.frames / self.rate
                start = min(max(0.0, middle - long / 2), max(0.0, recording.seconds - long))
                found = clip(recording, start, self.frames, self.rate)
            first = found if first is None else first
            crop = self.crop(recording.pictures(found.tolist()), Draws(*key, i))
            crops.append(crop[0] if self.frames is None else crop)
        audio = None if self.sound is None else self.sound(recording, recording.seconds / 2)
        return entries(crops, first, audio)

    def __repr__(self) -> str:
        rest = f"clips={self.clips}, crop={self.crop!r}, sound={self.sound!r}"
        return f"Evenly(frames={self.frames}, rate={self.rate}, {rest})"


class Picture:
    """One picture of a recording, cut as an image is, and the sound about it if asked for.

    Args:
        decode: of images.
        random: at any time, not the picture in the middle.
        sound: what is heard.
    """

    def __init__(self, *, decode: Decode, random: bool = True, sound: Sound | None = None) -> None:
        self.decode, self.random, self.sound = decode, random, sound

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"crops", "frames"} | ({"audio"} if self.sound else set()))

    def __call__(self, recording: Recording, *key: int | str) -> Batch:
        if self.random:
            at, audio = heard(recording, self.sound, 0.0, *key, "time")
            found = shown(recording.times, torch.tensor([at]))
        else:
            times = recording.times
            found = shown(times, times[len(times) // 2 :][:1])
            at = float(times[found])
            audio = None if self.sound is None else self.sound(recording, at)
        (picture,) = recording.pictures(found.tolist())
        return entries(self.decode(picture, *key), found, audio)

    def __repr__(self) -> str:
        return f"Picture(decode={self.decode!r}, random={self.random}, sound={self.sound!r})"


def entries(crops: list[Tensor], frames: Tensor | None, audio: Tensor | None) -> Batch:
    """What a batch has of one sample."""
    batch = Batch(crops=crops)
    if frames is not None:
        batch["frames"] = frames
    if audio is not None:
        batch["audio"] = audio
    return batch


def clip(recording: Recording, start: float, frames: int, rate: float) -> Tensor:
    """Positions (frames,) int64 of pictures at a constant rate from a time on, going round."""
    times = max(0.0, start) + torch.arange(frames, dtype=torch.float64) / rate
    # A picture's time and the same time computed otherwise may differ by a rounding.
    return shown(recording.times, (times + 1e-6) % max(recording.seconds, 1e-6))
