"""Spans of a recording's sound without its pictures: to evaluate what was learned of sound."""

from typing import Self

import torch

from unlabeled.batch import Batch
from unlabeled.data.clip_decode import entries
from unlabeled.data.clip_parts import Sound
from unlabeled.data.recordings import Recording


class Spans:
    """Spans of sound that lie evenly over a recording: `audio` (count, samples).

    The first begins with the recording and the last ends with it; they overlap where the
    recording is short. One alone is in its middle.

    Args:
        count: of each recording.
        sound: length and rate of each; None: to be given, see `of`.
    """

    gives = frozenset({"audio"})

    def __init__(self, *, count: int = 10, sound: Sound | None = None) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count, self.sound = count, sound

    def of(self, sound: Sound | None) -> Self:
        """The same spans; their length and rate are these where none were given.

        Raises:
            ValueError: neither has any.
        """
        if (chosen := self.sound or sound) is None:
            raise ValueError("length and rate of sound are not known: set data.eval_decode.sound")
        return type(self)(count=self.count, sound=chosen)

    def __call__(self, recording: Recording, *key: int | str) -> Batch:
        if self.sound is None:
            raise ValueError("length and rate of sound are not known: see `of`")
        room = max(0.0, recording.seconds - self.sound.seconds)
        steps = [i / (self.count - 1) for i in range(self.count)] if self.count > 1 else [0.5]
        half = self.sound.seconds / 2
        audio = [self.sound(recording, share * room + half) for share in steps]
        return entries([], None, torch.stack(audio))

    def __repr__(self) -> str:
        return f"Spans(count={self.count}, sound={self.sound!r})"
