"""Cuts a film into short clips with their sound, those of one part of it to test on.

    python scripts/make_clips.py film.mp4 clips
    python scripts/make_clips.py film.mp4 clips --train 0 392 --test 392 490 --side 144
    unlabeled experiment=bunny/avc data.root=clips

A clip is OUT/train/<second>.mp4 or OUT/test/<second>.mp4, named after where it begins. It has the
film's pictures from there on to the picture before its end, at their times, the first at 0, made
smaller; and the sound of that very span, one channel. Nothing of the test part is in a training
clip. The film is decoded once from one clip to the next; clips that are there are not made again,
so that the same command goes on where it was stopped. H.264 with a key picture every half second,
where decoding a random picture begins.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from unlabeled.data.ffmpeg import library, opened, pictured
from unlabeled.data.media import Film
from unlabeled.data.media_index import probe

RATE = 48000  # samples in a second
TICK = Fraction(1, 90000)


class Cut(NamedTuple):
    """A span of the film, in seconds, and the file it becomes."""

    start: float
    stop: float
    path: Path


def cuts(out: Path, parts: dict[str, tuple[float, float]], seconds: float) -> list[Cut]:
    """Spans of one length that fill each part from its beginning; what is left over is dropped."""
    found = []
    for side, (low, high) in parts.items():
        for i in range(int((high - low) / seconds + 1e-9)):
            start = low + i * seconds
            found.append(Cut(start, start + seconds, out / side / f"{start:09.3f}.mp4"))
    return sorted(found)


def write(film: Film, frames: list[Any], cut: Cut, side: int) -> None:
    """One clip of decoded frames, whole or not at all."""
    first = frames[0]
    short = side / min(first.width, first.height)
    width, height = (max(2, round(n * short / 2) * 2) for n in (first.width, first.height))
    partial = cut.path.with_name(f".{cut.path.name}.partial")
    with closing(library().open(str(partial), "w", format="mp4")) as file:
        rate = round(len(frames) / (cut.stop - cut.start))
        video = file.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "medium"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.time_base = TICK
        video.codec_context.gop_size, video.codec_context.max_b_frames = max(1, rate // 2), 2
        sound = None
        if film.sounding:
            sound = file.add_stream("aac", rate=RATE, layout="mono", bit_rate=128_000)
        for frame in frames:
            small = frame.reformat(width, height, "yuv420p", interpolation="AREA")
            small.pts = round((frame.pts - first.pts) * frame.time_base / TICK)
            small.time_base, small.pict_type = TICK, 0
            file.mux(video.encode(small))
        file.mux(video.encode(None))
        if sound is not None:
            zero = int(film.facts.pts[0]) * film.facts.base
            begin = float(first.pts * first.time_base) - zero
            heard = film.sound(begin, cut.stop - cut.start, RATE).numpy()
            whole = library().AudioFrame.from_ndarray(heard[None], format="fltp", layout="mono")
            whole.sample_rate, whole.pts, whole.time_base = RATE, 0, Fraction(1, RATE)
            file.mux(sound.encode(whole))
            file.mux(sound.encode(None))
    partial.rename(cut.path)


def spans(path: Path, film: Film, todo: list[Cut]) -> Iterator[tuple[Cut, list[Any]]]:
    """The frames of each span, which follow one another in time."""
    base, zero = film.facts.base, int(film.facts.pts[0])
    times = film.times.numpy()
    with opened(path) as file:
        video = pictured(file)
        video.codec_context.thread_count = 0  # all cores: nothing else runs beside this
        last: Cut | None = None
        frames = iter(())
        for cut in todo:
            wanted = film.facts.pts[np.flatnonzero((times >= cut.start) & (times < cut.stop))]
            if not len(wanted):
                continue
            if last is None or cut.start > last.stop:
                file.seek(max(zero, int(wanted[0]) - round(2 / base)), stream=video)
                frames = file.decode(video)
            found = []
            for frame in frames:
                if frame.pts >= wanted[0]:
                    found.append(frame)
                if frame.pts >= wanted[-1]:
                    break
            if [frame.pts for frame in found] != wanted.tolist():
                raise ValueError(f"{path} cannot be decoded from {cut.start:g} to {cut.stop:g} s")
            last = cut
            yield cut, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("film", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each clip")
    parser.add_argument("--train", type=float, nargs=2, default=(0.0, 392.0), metavar="SECOND")
    parser.add_argument("--test", type=float, nargs=2, default=(392.0, 490.0), metavar="SECOND")
    parser.add_argument("--side", type=int, default=144, help="short side in pixels")
    args = parser.parse_args()
    try:
        parts = {"train": tuple(args.train), "test": tuple(args.test)}
        (a, b), (c, d) = parts.values()
        if not (0 <= a < b and 0 <= c < d) or max(a, c) < min(b, d):
            raise ValueError(f"train and test must be spans that do not overlap, got {parts}")
        if args.seconds <= 0 or args.side < 16:
            raise ValueError("--seconds must be positive, and --side at least 16")
        library()
        facts = probe(args.film)
        if facts.reason:
            raise ValueError(f"{args.film} cannot be read: {facts.reason}")
        film = Film(args.film, facts)
        if film.seconds < max(b, d) - 1:
            raise ValueError(f"{args.film} lasts {film.seconds:.1f} s, less than {max(b, d):g} s")
        every = cuts(args.out, parts, args.seconds)
        for side in parts:
            (args.out / side).mkdir(parents=True, exist_ok=True)
        todo = [cut for cut in every if not cut.path.exists()]
        made = spans(args.film, film, todo)
        for cut, frames in track(made, total=len(todo), description="clips"):
            write(film, frames, cut, args.side)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    counts = {side: sum(cut.path.parent.name == side for cut in every) for side in parts}
    print(f"{args.out}: {counts['train']} clips to train on and {counts['test']} to test on")


if __name__ == "__main__":
    main()
