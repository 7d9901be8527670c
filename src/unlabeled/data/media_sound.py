"""The sound of a media file, mixed to one channel at any rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.ffmpeg import sounded
from unlabeled.data.rgb import UnreadableError

if TYPE_CHECKING:
    from av.container import InputContainer

MARGIN = 0.05  # seconds on both sides of a span, for the filter that changes the rate
RUN_UP = 0.5  # seconds decoded before it: what MP3 and AAC remember
BACK = (0.0, 1.0, 4.0, 16.0)  # seconds further before, if a seek overshoots


def mixed(file: InputContainer, start: float, count: int, rate: int) -> Tensor:
    """(count,) float32 in [-1, 1]: a span of a file's sound, silent where there is none.

    It is the mean of the channels, at another rate by FFmpeg. The first sample is that nearest to
    `start`.

    Args:
        file: open.
        start: seconds, on the file's clock.
        count: samples wanted.
        rate: of them, in a second.

    Raises:
        UnreadableError: there is no sound.
    """
    import av

    audio = sounded(file)
    if audio is None:
        raise UnreadableError("it has no sound")
    own = audio.codec_context.sample_rate
    first = math.floor((start - MARGIN) * own)
    long = math.ceil((count / rate + 2 * MARGIN) * own)
    found = np.zeros(long, dtype=np.float32)
    any(_filled(file, audio, first, found, back) for back in BACK)
    if own != rate:
        frame = av.AudioFrame.from_ndarray(found[None], format="fltp", layout="mono")
        frame.sample_rate = own
        change = av.AudioResampler("fltp", "mono", rate)
        made = [x.to_ndarray()[0] for x in (*change.resample(frame), *change.resample(None))]
        found = np.concatenate(made)
    skip = round((start - first / own) * rate)
    return torch.from_numpy(found[skip : skip + count].clip(-1, 1))


def _filled(file: InputContainer, audio: Any, first: int, into: np.ndarray, back: float) -> bool:
    """Puts the sound where its time stamps say; whether decoding began early enough."""
    import av

    own, tick = audio.codec_context.sample_rate, float(audio.time_base)
    begins = (audio.start_time or 0) * tick
    begin = max(first / own - RUN_UP - back, begins)
    file.seek(round(begin / tick), stream=audio, backward=True)
    audio.codec_context.flush_buffers()
    floats = av.AudioResampler("fltp", None, own)
    opening = True
    for frame in file.decode(audio):
        if frame.pts is None:
            continue
        at = round(frame.pts * tick * own) - first
        if opening and at > 0 and frame.pts * tick > begins + 0.1 and back < BACK[-1]:
            return False
        opening = False
        if at >= len(into):
            break
        for part in floats.resample(frame):
            samples = part.to_ndarray().mean(0)
            low, high = max(at, 0), min(at + len(samples), len(into))
            if low < high:
                into[low:high] = samples[low - at : high - at]
            at += len(samples)
    return True
