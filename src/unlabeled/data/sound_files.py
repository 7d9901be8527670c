"""Recordings of sound alone, in files: what is known of them, and the sound of any span."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.ffmpeg import opened, reading, sounded
from unlabeled.data.files import Kind
from unlabeled.data.media import Facts
from unlabeled.data.media_sound import mixed
from unlabeled.data.rgb import UnreadableError

if TYPE_CHECKING:
    from av.container import InputContainer

SOUNDS = Kind(
    "sound files",
    frozenset(
        (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".wma")
    ),
)
NONE = np.zeros(0, dtype=np.int64)
MUTE = "it has no pictures, only sound"


class SoundFile:
    """A file as a `Recording` without pictures; times are from where its sound begins.

    It is open from the first sound on, until it is dropped. A span is the mean of the channels,
    resampled by FFmpeg, and silent beyond the file's ends.

    Args:
        path: the file.
        facts: what the index knows of it, by `probe_sound`.
    """

    times = torch.zeros(0, dtype=torch.float64)
    sounding = True

    def __init__(self, path: Path, facts: Facts) -> None:
        self.path, self.facts = path, facts
        self._file: InputContainer | None = None

    @property
    def seconds(self) -> float:
        return (self.facts.end - int(self.facts.pts[0])) * self.facts.base

    def pictures(self, positions: Sequence[int]) -> Tensor:
        raise UnreadableError(MUTE)

    def sound(self, start: float, seconds: float, rate: int) -> Tensor:
        first = start + int(self.facts.pts[0]) * self.facts.base
        with reading():
            if self._file is None:
                self._file = opened(self.path)
            return mixed(self._file, first, round(seconds * rate), rate)

    def motion(self) -> Tensor:
        raise UnreadableError(MUTE)


def probe_sound(path: Path) -> Facts:
    """What a file says of its sound: all its packets are read, the first is decoded.

    `pts` has its beginning alone, `end` its end; without any sound (another file, no samples) it
    is unreadable. What is silent is sound.
    """
    try:
        with reading():
            return _probed(path)
    except UnreadableError as error:
        return Facts(NONE, NONE, 0, 0.0, False, False, str(error))


def _probed(path: Path) -> Facts:
    with opened(path) as file:
        audio = sounded(file)
        if audio is None:
            raise UnreadableError("it has no sound")
        base = float(audio.time_base or 0)
        packets = [x for x in file.demux(audio) if x.size and x.pts is not None]
    if not packets or base <= 0:
        raise UnreadableError("its sound has no length")
    with opened(path) as file:
        if next(file.decode(sounded(file)), None) is None:
            raise UnreadableError("its sound has no length")
    begin = min(int(x.pts) for x in packets if x.pts is not None)
    end = max(int(x.pts) + int(x.duration or 0) for x in packets if x.pts is not None)
    if end <= begin:
        raise UnreadableError("its sound has no length")
    return Facts(np.array([begin], dtype=np.int64), NONE, end, base, True, True, "")
