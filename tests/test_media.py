"""Pictures and sound out of media files, whatever they were encoded like."""

import os

import av
import numpy as np
import pytest
import torch
from media_files import number_of, numbered, tone, write

from unlabeled.data.clip_decode import Picture
from unlabeled.data.clip_parts import Sound
from unlabeled.data.decode import Crops
from unlabeled.data.media import Film
from unlabeled.data.media_index import probe
from unlabeled.data.rgb import UnreadableError

COUNT = 60


def film(path, kept=None):
    facts = probe(path)
    assert not facts.reason, facts.reason
    return Film(path, facts, kept)


def numbers(recording, positions):
    return [number_of(picture) for picture in recording.pictures(positions)]


@pytest.mark.parametrize(
    ("name", "codec", "between"),
    [
        ("a.mp4", "libx264", 3),
        ("b.mkv", "libx264", 2),
        ("c.avi", "mpeg4", 0),
        ("d.avi", "mpeg4", 2),
        ("e.avi", "libx264", 2),  # its times cannot be trusted: pictures are counted
        ("f.webm", "libvpx", 0),
        ("g.ts", "libx264", 2),
        ("h.mpg", "mpeg2video", 2),
        ("i.mov", "libx264", 0),
    ],
)
def test_every_picture_is_the_one_that_was_asked_for(tmp_path, name, codec, between):
    rate = 25 if codec == "mpeg2video" else 10
    path = write(tmp_path / name, numbered(COUNT), codec=codec, between=between, rate=rate)
    whole = film(path)
    assert len(whole.times) == COUNT
    assert whole.seconds == pytest.approx(COUNT / rate, abs=1e-6)
    assert whole.times[1:].numpy() == pytest.approx(np.arange(1, COUNT) / rate, abs=2e-3)
    assert numbers(whole, range(COUNT)) == list(range(COUNT))
    draw = np.random.default_rng(0)
    for count in (1, 2, 5, 9):
        positions = draw.integers(0, COUNT, count).tolist()
        assert numbers(whole, positions) == positions, positions
        assert numbers(film(path), positions) == positions, positions
    assert numbers(whole, [59, 0, 59, 30]) == [59, 0, 59, 30]


def test_pictures_at_varying_times(tmp_path):
    times = np.cumsum([0, *([0.04, 0.2, 0.1, 0.5] * 6)])
    whole = film(write(tmp_path / "a.mkv", numbered(len(times)), times))
    assert whole.times.numpy() == pytest.approx(times, abs=1e-3)
    assert whole.seconds > times[-1]
    assert numbers(whole, [3, 4, 17, 24]) == [3, 4, 17, 24]


@pytest.mark.parametrize("turned", [90, 180, 270, -90])
def test_the_rotation_flag_turns_pictures_upright(tmp_path, turned):
    pictures = np.zeros((5, 48, 64, 3), dtype=np.uint8)
    pictures[:, :16, :16] = 255  # above, left
    flat = film(write(tmp_path / "flat.mp4", pictures)).pictures([2])[0]
    path = write(tmp_path / "turned.mp4", pictures, rotation=turned)
    assert torch.equal(film(path).pictures([2])[0], torch.rot90(flat, turned // 90, (1, 2)))


def test_pictures_that_nothing_needs_are_not_decoded(tmp_path, monkeypatch):
    from unlabeled.data import media

    path = write(tmp_path / "a.mp4", numbered(COUNT), between=3, group=60)
    made = []
    monkeypatch.setattr(media, "rgb", lambda f, rgb=media.rgb: made.append(f.pts) or rgb(f))
    assert numbers(film(path), [20, 41]) == [20, 41]
    assert len(made) == 2  # and no other picture becomes RGB


def test_a_clip_is_decoded_once_for_all_its_views(tmp_path, monkeypatch):
    whole = film(write(tmp_path / "a.mp4", numbered(30), tracks=[tone(3, 300)]))
    asked = []
    monkeypatch.setattr(whole, "pictures", lambda p, ask=whole.pictures: asked.append(p) or ask(p))
    sound = Sound(seconds=1.0, rate=8000)
    found = Picture(decode=Crops(size=8, count=6), sound=sound)(whole, 3)
    assert len(found["crops"]) == 6
    assert len(asked) == 1


def test_a_sound_keeps_its_place_at_any_rate(tmp_path):
    """A click at 2 s; lossless, so that it is a click still."""
    click = np.zeros((1, 4 * 16000), dtype=np.float32)
    click[0, 2 * 16000] = 1.0
    path = write(tmp_path / "a.mkv", numbered(40), tracks=[click], sound_codec="flac")
    for rate in (8000, 16000, 22050, 48000):
        for start in (1.5, 1.9, 0.73):
            heard = film(path).sound(start, 1.5, rate)
            assert heard.shape == (round(1.5 * rate),)
            assert heard.dtype == torch.float32
            assert abs(int(heard.abs().argmax()) - round((2 - start) * rate)) <= 1


def test_a_span_sounds_as_the_same_span_of_the_whole(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 5 * 16000)).astype(np.float32)
    for name, codec in (("a.mkv", "flac"), ("b.mp4", "aac")):
        whole = film(write(tmp_path / name, numbered(50), tracks=[noise], sound_codec=codec))
        everything = whole.sound(0.0, 5.0, 16000)
        assert torch.allclose(whole.sound(3.0, 1.0, 16000), everything[48000:64000], atol=1e-4)


def test_channels_are_mixed_and_the_first_track_is_heard(tmp_path):
    low, high = tone(3, 250)[0], tone(3, 1000)[0]
    path = write(
        tmp_path / "a.mkv", numbered(30), tracks=[np.stack([low, 0 * low])], sound_codec="flac"
    )
    heard = film(path).sound(1.0, 1.0, 16000).numpy()
    assert heard == pytest.approx(low[16000:32000] / 2, abs=1e-3)
    path = write(
        tmp_path / "b.mkv", numbered(30), tracks=[low[None], high[None]], sound_codec="flac"
    )
    spectrum = torch.fft.rfft(film(path).sound(1.0, 1.0, 16000)).abs()
    assert int(spectrum.argmax()) == 250


def test_beyond_a_sound_there_is_silence(tmp_path):
    path = write(
        *(tmp_path / "a.mkv", numbered(50)),
        tracks=[tone(1, 300)],
        sound_codec="flac",
        sound_start=2.0,
    )
    heard = film(path).sound(1.0, 3.0, 16000)
    loud = heard.abs() > 0.1
    assert not loud[:15900].any()
    assert loud[16000:32000].float().mean() > 0.5
    assert not loud[32100:].any()


def test_a_file_without_sound_says_so(tmp_path):
    whole = film(write(tmp_path / "a.mp4", numbered(10)))
    assert not whole.sounding
    with pytest.raises(UnreadableError, match="no sound"):
        whole.sound(0.0, 1.0, 16000)


def test_motion_is_measured_once_and_kept(tmp_path):
    pictures = numbered(10)
    pictures[5:] = pictures[5]
    path = write(tmp_path / "a.mp4", pictures)
    moved = film(path, tmp_path / "kept.npy").motion()
    assert moved.shape == (9,)
    assert (moved[:5] > 2).all()
    assert (moved[5:] < 0.5).all()
    facts = probe(path)
    path.unlink()
    assert torch.equal(Film(path, facts, tmp_path / "kept.npy").motion(), moved)
    (tmp_path / "kept.npy").write_bytes(b"damaged")
    with pytest.raises(UnreadableError):
        Film(path, facts, tmp_path / "kept.npy").motion()


def test_what_cannot_be_read_says_why(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no film")
    with av.open(str(tmp_path / "heard.mkv"), "w") as file:
        sound = file.add_stream("flac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate, frame.pts = 16000, 0
        file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    with av.open(str(tmp_path / "long.mkv"), "w") as file:  # a stream of zero length
        video = file.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        file.start_encoding()
    whole = write(tmp_path / "whole.mkv", numbered(COUNT), group=5)
    part = tmp_path / "part.mp4"
    part.write_bytes(write(tmp_path / "b.mp4", numbered(COUNT)).read_bytes()[:2000])
    for name in ("empty.mp4", "text.mp4", "heard.mkv", "long.mkv", "part.mp4", "none.mp4"):
        facts = probe(tmp_path / name)
        assert facts.reason, name
        assert not len(facts.pts)
    recording = film(whole)
    whole.write_bytes(whole.read_bytes()[: os.path.getsize(whole) // 2])  # after it was indexed
    assert numbers(recording, [3]) == [3]
    with pytest.raises(UnreadableError, match="picture"):
        recording.pictures([40, 50])
