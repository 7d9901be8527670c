"""Pictures and sound of media files, through PyAV, whose wheels bring FFmpeg's libraries along.

torchcodec, which needs a system's FFmpeg and is made for one version of torch each, gives the same
pictures and was no faster: `python scripts/bench.py --only video` compares them. What makes the
difference: pictures that nothing asks for and no other picture is predicted from are not decoded.

- Pictures are those that a player would show at a time: of variable rates too, upright (rotation
  flag), with the pixels as stored (a pixel that is not square stays so).
- Sound is the track that FFmpeg would play beside the pictures, the mean of its channels (FFmpeg's
  own mix exceeds 1 where they are alike), resampled by FFmpeg and placed by its time stamps: silent
  before its start, in gaps, and beyond its end.
- One thread decodes: data modules have workers.
- A file without pictures (empty, zero length, sound only, a cover) is unreadable; so is one that
  ends before the pictures that are asked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.ffmpeg import opened, pictured, reading
from unlabeled.data.media_sound import mixed
from unlabeled.data.rgb import UnreadableError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

    Make = Callable[[VideoFrame], np.ndarray]

AHEAD = 8  # pictures that a seek must save
EXACT = 2 | 0x80000  # swscale's BILINEAR and BITEXACT: free, unlike ACCURATE_RND
AREA = 32


class Facts(NamedTuple):
    """What is known of a file before anything is decoded; times in ticks of `base` seconds."""

    pts: np.ndarray  # (F,) int64, rising: when each picture appears; empty: unreadable
    keys: np.ndarray  # (K,) int64, rising: those that decoding can start from
    end: int  # when the last picture disappears
    base: float
    timed: bool  # false: the file's times are of no use, and its pictures are counted instead
    sounding: bool
    reason: str  # why it is unreadable, or ""


class Film:
    """A file as a `Recording`. It is open from the first picture or sound on, until it is dropped.

    Args:
        path: the file.
        facts: what the index knows of it.
        kept: where its motion is kept, once computed; None: nowhere.
    """

    def __init__(self, path: Path, facts: Facts, kept: Path | None = None) -> None:
        self.path, self.facts, self.kept = path, facts, kept
        self._file: InputContainer | None = None

    @property
    def times(self) -> Tensor:
        return torch.from_numpy((self.facts.pts - self.facts.pts[0]) * self.facts.base)

    @property
    def seconds(self) -> float:
        return (self.facts.end - int(self.facts.pts[0])) * self.facts.base

    @property
    def sounding(self) -> bool:
        return self.facts.sounding

    def pictures(self, positions: Sequence[int]) -> Tensor:
        wanted = sorted(set(positions))
        with reading():
            found = dict(zip(wanted, self._made(wanted, rgb), strict=True))
            pixels = np.stack([found[i] for i in positions])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def sound(self, start: float, seconds: float, rate: int) -> Tensor:
        if not self.sounding:
            raise UnreadableError("it has no sound")
        first = start + int(self.facts.pts[0]) * self.facts.base
        with reading():
            return mixed(self._opened(), first, round(seconds * rate), rate)

    def motion(self) -> Tensor:
        """Mean absolute difference of neighbours, grey and 64 pixels wide; kept on disk."""
        count = len(self.facts.pts)
        found = None if self.kept is None else _kept(self.kept, count - 1)
        if found is None:
            with reading():
                small = self._made(range(count), grey)
            moved = [np.abs(b - a).mean() for a, b in pairwise(small)]
            found = torch.tensor(moved, dtype=torch.float32)
            if self.kept is not None:
                _keep(self.kept, found)
        return found

    def _opened(self) -> InputContainer:
        if self._file is None:
            self._file = opened(self.path)
        return self._file

    def _made(self, wanted: Sequence[int], make: Make) -> list[np.ndarray]:
        """What is made of the frames at rising positions."""
        pts, keys = self.facts.pts, self.facts.keys
        if not self.facts.timed:
            return self._counted(wanted, make)
        made: list[np.ndarray] = []
        start = 0
        for i in range(1, len(wanted) + 1):
            # To decode on is best, but where a key picture lies well ahead of what was wanted last.
            ahead = i == len(wanted) or _key(keys, pts[wanted[i]]) > _key(
                keys, pts[min(wanted[i - 1] + AHEAD, len(pts) - 1)]
            )
            if ahead:
                made += self._stretch([int(pts[k]) for k in wanted[start:i]], make)
                start = i
        return made

    def _stretch(self, wanted: list[int], make: Make) -> list[np.ndarray]:
        """What is made of the frames at rising times, decoded in one go."""
        key = _key(self.facts.keys, wanted[0])
        enough = int(self.facts.pts[-3:][0])
        for back in (0, 1, 2, 4, 8, key + 1):  # seeks may overshoot: again from further before
            if back <= key:
                file = self._opened()
                at = int(self.facts.keys[key - back])
                file.seek(at, stream=pictured(file), backward=True)
            else:
                self._file = None
                file = self._opened()
            made = list(map(make, _decoded(file, wanted, enough)))
            if made:
                return made
            if back > key:
                break
        raise UnreadableError(f"no picture at {wanted[0] * self.facts.base:.2f} s can be decoded")

    def _counted(self, wanted: Sequence[int], make: Make) -> list[np.ndarray]:
        """What is made of the frames at rising positions, all decoded from the first on."""
        self._file = None
        file, asked = self._opened(), set(wanted)
        made: list[np.ndarray] = []
        i, frame = -1, None
        for i, frame in enumerate(file.decode(pictured(file))):
            if i in asked:
                made.append(make(frame))
            if len(made) == len(asked):
                return made
        if frame is None or i + 3 < len(self.facts.pts):  # as in `_decoded`
            raise UnreadableError("it ends before its last picture")
        return made + [make(frame)] * (len(asked) - len(made))


def _decoded(file: InputContainer, wanted: list[int], enough: int) -> Iterator[VideoFrame]:
    """The last frames at or before rising times; none if decoding begins after the first.

    A file may end at the time `enough`: some announce a picture or two more than they give.
    """
    video = pictured(file)
    codec, asked = video.codec_context, set(wanted)
    codec.flush_buffers()
    codec.skip_frame, whole = "DEFAULT", True
    last: VideoFrame | None = None
    at = 0
    for packet in file.demux(video):
        if whole != (packet.pts is None or packet.pts in asked):
            whole = not whole
            codec.skip_frame = "DEFAULT" if whole else "NONREF"
        for frame in packet.decode():
            if frame.pts is None or frame.is_corrupt:
                continue
            while frame.pts > wanted[at]:
                if last is None:
                    return
                yield last
                if (at := at + 1) == len(wanted):
                    return
            last = frame
            if frame.pts == wanted[at]:
                yield frame
                if (at := at + 1) == len(wanted):
                    return
    if last is not None:
        if last.pts < enough:  # type: ignore[operator]  # see above
            raise UnreadableError("it ends before its last picture")
        yield from [last] * (len(wanted) - at)


def _key(keys: np.ndarray, pts: int) -> int:
    """Position of the last key picture at or before a time; -1: there is none."""
    return int(np.searchsorted(keys, pts, side="right")) - 1


def rgb(frame: VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, upright."""
    found = frame.reformat(format="rgb24", interpolation=EXACT, threads=1).to_ndarray()
    return np.rot90(found, frame.rotation // 90) if frame.rotation % 360 else found


def grey(frame: VideoFrame) -> np.ndarray:
    """(h, 64) int16, as stored."""
    height = max(2, round(64 * frame.height / frame.width))
    small = frame.reformat(64, height, "gray", interpolation=AREA, threads=1)
    return small.to_ndarray().astype(np.int16)


def _kept(path: Path, count: int) -> Tensor | None:
    try:
        found = np.load(path, allow_pickle=False)
    except Exception:  # on damaged files numpy raises nearly anything
        return None
    return torch.from_numpy(found) if found.shape == (count,) else None


def _keep(path: Path, values: Tensor) -> None:
    with suppress(OSError):  # a read-only home costs time, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            np.save(file, values.numpy())
        os.replace(file.name, path)
