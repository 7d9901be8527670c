"""Media files for tests, written with PyAV; this file has no tests of its own."""

from fractions import Fraction

import av
import numpy as np

TICK = Fraction(1, 1000)


def numbered(count, height=48, width=64):
    """Pictures (count, height, width, 3) whose brightness says their number: grey 4 i, under 64."""
    grey = np.arange(count, dtype=np.uint8)[:, None, None, None] * 4
    return np.broadcast_to(grey, (count, height, width, 3)).copy()


def number_of(picture):
    """The number of such a picture, (3, H, W)."""
    return round(float(picture.float().mean()) / 4)


def tone(seconds, hertz, rate=16000, channels=1, level=0.5):
    """(channels, samples) float32."""
    time = np.arange(round(seconds * rate)) / rate
    return np.tile((level * np.sin(2 * np.pi * hertz * time)).astype(np.float32), (channels, 1))


def write(
    path,
    pictures,
    times=None,
    *,
    rate=10,
    codec="libx264",
    tracks=(),
    sound_rate=16000,
    sound_codec="aac",
    sound_start=0.0,
    rotation=0,
    between=2,
    group=12,
):
    """Writes a file.

    Args:
        path: its ending chooses the container.
        pictures: (F, H, W, 3) uint8.
        times: (F,) seconds; None: at `rate`.
        rate: pictures in a second.
        codec: of the pictures.
        tracks: arrays (channels, samples), one for each track of sound.
        sound_rate: of them.
        sound_codec: of them.
        sound_start: seconds of the first sample.
        rotation: degrees of the rotation flag.
        between: most pictures between two that others are predicted from.
        group: pictures from one key picture to the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        options = {"crf": "1"} if codec == "libx264" else {}
        video = file.add_stream(codec, rate=rate, options=options)
        video.height, video.width = pictures.shape[1:3]
        video.pix_fmt, video.bit_rate = "yuv420p", 4_000_000
        video.codec_context.gop_size, video.codec_context.max_b_frames = group, between
        if rotation:
            video.set_display_rotation(rotation)
        video.codec_context.time_base = Fraction(1, rate) if times is None else TICK
        layouts = {1: "mono", 2: "stereo", 6: "5.1"}
        sounds = []
        for track in tracks:
            sound = file.add_stream(sound_codec, rate=sound_rate, layout=layouts[len(track)])
            sounds.append((sound, track))
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i if times is None else round(times[i] / TICK)
            frame.time_base = video.codec_context.time_base
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        for sound, track in sounds:
            kind = "fltp" if sound_codec == "aac" else "s16p"
            samples = track if kind == "fltp" else (track * 32767).astype(np.int16)
            if sound_codec == "flac":
                kind, samples = "s16", samples.T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples), format=kind, layout=layouts[len(track)]
            )
            frame.sample_rate = sound_rate
            frame.pts, frame.time_base = round(sound_start * sound_rate), Fraction(1, sound_rate)
            file.mux(sound.encode(frame))
            file.mux(sound.encode(None))
    return path
