"""Sounds without pictures as recordings: files, folders, ESC-50; what needs pictures says so."""

import csv
import logging
import math
import wave

import numpy as np
import pytest
import torch
from media_files import numbered, tone
from media_files import write as film

from unlabeled.data.audio_layouts import ESC50, AudioFolder
from unlabeled.data.clip_decode import Clips, Evenly, Picture
from unlabeled.data.clip_parts import Sound, Square
from unlabeled.data.clips import Recordings
from unlabeled.data.decode import Center
from unlabeled.data.recordings import Recorded
from unlabeled.data.rgb import UnreadableError
from unlabeled.data.sound_files import SoundFile, probe_sound
from unlabeled.data.sound_spans import Spans
from unlabeled.data.video_layouts import VideoFolder
from unlabeled.evaluate.knn import KNN
from unlabeled.evaluate.linear import Linear
from unlabeled.evaluate.suite import evaluate, obstacle

RATE = 4000
CATEGORIES = ("dog", "rain")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNLABELED_CACHE", str(tmp_path / "cache"))


def wav(path, samples, rate=RATE):
    """Writes (channels, n) or (n,) floats as 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.atleast_2d(samples)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
    return path


def sine(hertz, seconds=0.5, rate=RATE, level=0.5, phase=0.0):
    return level * np.sin(2 * math.pi * hertz * np.arange(round(seconds * rate)) / rate + phase)


def esc50(root, categories=CATEGORIES, sources=2, takes=2, hertz=lambda k: 300 * (k + 1), **more):
    """A tiny tree in ESC-50's layout: of each class `sources` in each fold, `takes` of each."""
    rows, number = [], 0
    draw = np.random.default_rng(0)
    for fold in range(1, 6):
        for k, kind in enumerate(categories):
            for _ in range(sources):
                number += 1
                for take in range(takes):
                    name = f"{fold}-{number}-{'ABCDE'[take]}-{7 * k}.wav"
                    low = draw.normal(size=round(0.5 * RATE)) * 0.05
                    sound = sine(hertz(k), phase=draw.uniform(0, 6)) + low
                    wav(root / "audio" / name, sound.clip(-1, 1))
                    esc10 = str(k < 2)
                    rows.append((name, fold, 7 * k, kind, esc10, number, "ABCDE"[take]))
    table(root, rows, **more)
    return rows


COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file", "take")


def table(root, rows, columns=COLUMNS):
    (root / "meta").mkdir(parents=True, exist_ok=True)
    with (root / "meta/esc50.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def module(root, layout, seconds=0.25, **more):
    decode = Evenly(size=8, sound=Sound(seconds=seconds, rate=RATE))
    given = {"batch_size": 4, "workers": 0, "val_share": 0.25, **more}
    return Recordings(root=str(root), layout=layout, decode=decode, eval_decode=decode, **given)


def test_a_sound_file_gives_the_mean_of_its_channels_at_any_time_and_rate(tmp_path):
    left, right = sine(200, 1.0), sine(200, 1.0, level=0.1)
    path = wav(tmp_path / "a.wav", np.stack([left, right]))
    here = SoundFile(path, probe_sound(path))
    assert here.seconds == pytest.approx(1.0)
    assert here.sounding
    assert len(here.times) == 0
    found = here.sound(0.25, 0.5, RATE)
    expected = torch.from_numpy((left + right)[1000:3000] / 2).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert here.sound(0.0, 0.5, 2 * RATE).shape == (RATE,)
    beyond = here.sound(0.9, 0.3, RATE)
    assert beyond[:400].abs().max() > 0.2
    assert not beyond[401:].any()
    for asked in (lambda: here.pictures([0]), here.motion):
        with pytest.raises(UnreadableError, match="no pictures, only sound"):
            asked()


@pytest.mark.parametrize(("end", "codec"), [("flac", "flac"), ("mp3", "mp3"), ("ogg", "libopus")])
def test_compressed_sounds_are_read_too(tmp_path, end, codec):
    import av

    path, wanted = tmp_path / f"a.{end}", sine(440, 1.0, 16000)
    with av.open(str(path), "w") as file:
        sound = file.add_stream(codec, rate=16000, layout="mono")
        for start in range(0, 16000, 1000):  # encoders take small frames
            part = wanted[None, start : start + 1000].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    here = SoundFile(path, probe_sound(path))
    assert here.seconds == pytest.approx(1.0, abs=0.1)
    found = here.sound(0.25, 0.5, 8000)
    spectrum = torch.fft.rfft(found).abs()
    assert int(spectrum.argmax()) * 2 == pytest.approx(440, abs=4)
    assert float(found.std()) == pytest.approx(0.5 / 2**0.5, rel=0.1)


def test_what_is_no_sound_is_unreadable_and_silence_is_sound(tmp_path):
    empty = wav(tmp_path / "empty.wav", np.zeros((1, 0)))
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_bytes(b"no sound at all")
    mute = film(tmp_path / "mute.mp4", numbered(4))
    for path in (empty, tmp_path / "nothing.wav", tmp_path / "text.wav", mute, tmp_path / "gone"):
        facts = probe_sound(path)
        assert facts.reason, path
        assert not facts.sounding
    assert "no sound" in probe_sound(mute).reason
    assert "no length" in probe_sound(empty).reason
    silent = wav(tmp_path / "silent.wav", np.zeros(2000))
    here = SoundFile(silent, probe_sound(silent))
    assert here.seconds == pytest.approx(0.5)
    assert not here.sound(0, 0.5, RATE).any()


def test_decodes_of_pictures_refuse_a_sound(tmp_path):
    path = wav(tmp_path / "a.wav", sine(200))
    here = SoundFile(path, probe_sound(path))
    sound = Sound(seconds=0.1, rate=RATE)
    for decode in (
        Picture(decode=Center(size=8)),
        Picture(decode=Center(size=8), random=False, sound=sound),
        Clips(frames=2, rate=4.0, crop=Square(size=8), sound=sound),
        Evenly(size=8),
        Evenly(size=8, frames=2),
    ):
        with pytest.raises(UnreadableError, match="no pictures, only sound"):
            decode(here, 0)
    found = Evenly(size=8, sound=sound)(here, 0)
    assert found["crops"] == []
    assert "frames" not in found
    assert torch.equal(found["audio"], here.sound(0.2, 0.1, RATE))


def test_spans_lie_evenly_from_end_to_end(tmp_path):
    ramp = np.arange(RATE) / RATE
    path = wav(tmp_path / "a.wav", ramp)
    here = SoundFile(path, probe_sound(path))
    audio = Spans(count=5, sound=Sound(seconds=0.4, rate=RATE))(here)["audio"]
    assert audio.shape == (5, 1600)
    assert audio[:, 0].tolist() == pytest.approx([0, 0.15, 0.3, 0.45, 0.6], abs=1e-3)
    assert audio[-1, -1] == pytest.approx(1.0, abs=1e-3)
    (one,) = Spans(count=1, sound=Sound(seconds=0.4, rate=RATE))(here)["audio"]
    assert one[0] == pytest.approx(0.3, abs=1e-3)
    long = Spans(count=3, sound=Sound(seconds=2.0, rate=RATE))(here)["audio"]
    assert torch.equal(long[0], long[2])  # all of a recording that is too short, then silence
    assert not long[0, RATE + 1 :].any()
    given = Spans(count=2).of(Sound(seconds=0.1, rate=10))
    assert repr(given) == "Spans(count=2, sound=Sound(seconds=0.1, rate=10, silence=None))"
    assert repr(Spans(count=2, sound=Sound(seconds=0.3, rate=5)).of(None)).count("0.3")
    for ask in (lambda: Spans().of(None), lambda: Spans()(here)):
        with pytest.raises(ValueError, match="length and rate of sound are not known"):
            ask()
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        Spans(count=0)


def test_a_folder_of_sounds_has_classes_and_splits(tmp_path, caplog):
    root = tmp_path / "set"
    for side, count in (("train", 4), ("test", 2)):
        for k, kind in enumerate(CATEGORIES):
            for i in range(count):
                wav(root / side / kind / f"{i}.wav", sine(200 * (k + 1)))
    wav(root / "train/dog/short.wav", sine(200, 0.1))
    film(root / "train/dog/film.mp4", numbered(20), tracks=[tone(2, 440)])
    with caplog.at_level(logging.WARNING):
        splits = AudioFolder(shortest=0.3)(root, 0)
    train = splits["train"]
    assert isinstance(train, Recorded)
    assert (len(train), len(splits["test"])) == (8, 4)
    assert "of 9 recordings, 0 without sound and 1 shorter than 0.3 s" in caplog.text
    assert train.classes == CATEGORIES
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert train.take(torch.tensor([5])).name(0) == "train/rain/1.wav"
    assert len(VideoFolder()(root, 0)["train"]) == 1  # films have an index of their own
    assert len(AudioFolder()(root, 0)["train"]) == 9
    with pytest.raises(UnreadableError, match="only sound"):
        train.image(0)
    assert AudioFolder(labels=False)(root, 0)["train"].labels is None
    with pytest.raises(ValueError, match="no sound files under"):
        AudioFolder()(film(tmp_path / "films/a.mp4", numbered(4)).parent, 0)
    with pytest.raises(ValueError, match=r"test_share must be in \[0, 1\), got 1"):
        AudioFolder(test_share=1)


@pytest.mark.parametrize("inside", ["", "ESC-50-master"])
def test_esc50_has_folds_that_divide_no_source(tmp_path, inside):
    root = tmp_path / "esc50"
    rows = esc50(root / inside)
    source = {f"audio/{row[0]}": row[5] for row in rows}
    seen = []
    for fold in range(1, 6):
        data = module(root, ESC50(), batch_size=2).fold(fold)
        splits = data._read().splits
        names = {side: [x.name(i) for i in range(len(x))] for side, x in splits.items()}
        assert (len(names["train"]), len(names["test"])) == (32, 8)
        assert all(f"audio/{fold}-" in name for name in names["test"])
        sides = [{source[name] for name in each} for each in names.values()]
        assert not sides[0] & sides[1]
        assert splits["train"].classes == CATEGORIES
        assert splits["test"].labels.tolist() == [0] * 4 + [1] * 4
        fit, held = data.selection()
        parts = [{source[names["train"][i]] for i in part} for part in (fit, held)]
        assert parts[1]
        assert not parts[0] & parts[1]
        seen += names["test"]
    assert sorted(seen) == sorted(source)


def test_esc10_is_part_of_esc50(tmp_path):
    esc50(tmp_path, categories=("dog", "rain", "fire"), sources=1, takes=1)
    assert ESC50()(tmp_path, 0)["train"].classes == ("dog", "rain", "fire")
    ten = ESC50(esc10=True)(tmp_path, 0)
    assert ten["train"].classes == ("dog", "rain")
    assert (len(ten["train"]), len(ten["test"])) == (8, 2)


def test_an_esc50_that_is_not_one_says_why(tmp_path):
    with pytest.raises(ValueError, match="fold must be 1, 2, 3, 4 or 5, got 6"):
        ESC50(fold=6)
    with pytest.raises(ValueError, match=r"cannot read the list of recordings .*esc50\.csv"):
        ESC50()(tmp_path, 0)
    rows = esc50(tmp_path, sources=1, takes=1)
    for wrong, said in (
        ([(*row[:5], 1, "A") for row in rows], "1 src_file are in two folds, the first 1"),
        ([(*row[:3], f"{i}", *row[4:]) for i, row in enumerate(rows)], "two categories"),
        ([(*rows[0][:1], "one", *rows[0][2:])], "line 2: every column needs a value"),
        ([row for row in rows if row[1] > 1], "fold 1 leaves nothing to train or to test on"),
        ([("lost.wav", *row[1:]) for row in rows], r"first sound of .* is not there: .*lost\.wav"),
    ):
        table(tmp_path, wrong)
        with pytest.raises(ValueError, match=said):
            ESC50()(tmp_path, 0)
    table(tmp_path, [row[:5] for row in rows], columns=["filename", "fold", "target", "category"])
    with pytest.raises(ValueError, match=r"no column \['esc10', 'src_file'\]"):
        ESC50()(tmp_path, 0)
    table(tmp_path, rows)
    with pytest.raises(ValueError, match="fold 6 leaves nothing"):
        module(tmp_path, ESC50()).fold(6).setup("test")


def test_unreadable_sounds_are_counted_named_and_hum(tmp_path, caplog):
    root = tmp_path / "esc50"
    rows = esc50(root)
    bad, lost = (root / "audio" / rows[i][0] for i in (-1, -2))
    bad.write_bytes(b"no sound")
    lost.unlink()
    data = module(root, ESC50(), max_unreadable=0.1)
    with caplog.at_level(logging.WARNING):
        batches = list(data.scan("train", batch_size=16))
    assert list(data.unreadable["train"]) == [30, 31]
    assert f"audio/{bad.name} (InvalidDataError" in caplog.text
    assert [b["audio"].shape for b in batches] == [(16, 1000)] * 2
    assert all(b["crops"] == [] for b in batches)
    assert batches[-1]["audio"][-1].abs().mean() > 0.9
    strict = module(root, ESC50(), max_unreadable=0.0)
    with pytest.raises(ValueError, match=r"max_unreadable=0 allows"):
        list(strict.scan("train"))


def test_the_data_module_gives_sound_alone_and_a_picture_of_it(tmp_path):
    esc50(tmp_path)
    data = module(tmp_path, ESC50())
    assert {"crops", "frames", "audio"} <= data.gives
    data.setup("fit")
    assert data.gives == {"audio", "index", "label"}
    assert data.sounding("train")
    batch = next(iter(data.train_dataloader()))
    assert batch["audio"].shape == (4, 1000)
    picture = data.thumbnail("test", 0)
    assert (picture.dtype, picture.shape) == (torch.uint8, (3, 257, 2))
    loudest = 256 - int(picture[0].float().mean(1).argmax())
    assert loudest * RATE / 512 == pytest.approx(300, abs=2 * RATE / 512)  # rows from the bottom
    assert picture.max() == 255


class Ears(torch.nn.Module):
    """Hears where the spectrum lies, sees the mean colour."""

    dim = 3

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.mean((2, 3)) * self.gain

    def stages(self, x):
        return {"conv1": x}

    def hear(self, audio):
        power = torch.fft.rfft(audio).abs().square()
        return power[:, :480].unflatten(1, (-1, 8)).sum(2).sqrt() * self.gain


def test_evaluations_that_listen_run_without_pictures_and_others_say_so(tmp_path):
    esc50(tmp_path / "set")
    data = module(tmp_path / "set", ESC50())
    data.setup("test")
    evals = {
        "knn": KNN(k=[1]),
        "heard": KNN(k=[1], stage="sound"),
        "linear": Linear(stages=["sound"], epochs=20, lrs=[0.1], batch_size=8),
        "all": Linear(),
    }
    given = {"backbone": Ears(), "data": data, "out": tmp_path, "seed": 0}
    found = evaluate(evals, random_backbone=Ears(), **given)
    why = "the data have no pictures, only sound"
    assert found.skipped == {"knn": why, "all": why}
    assert found.values["heard/k1_t0.07/top1"] == 1.0
    assert found.values["linear/sound/top1"] == 1.0
    raw = found.details["heard/k1_t0.07/top1"]["baselines"]
    assert raw["pixels"] == 1.0  # of raw spectrograms: pure tones are easy
    assert raw["random"] == 1.0
    assert obstacle(KNN(k=[1], stage="sound"), data) is None


def test_methods_of_pictures_refuse_sounds(tmp_path, compose):
    from unlabeled.train import run

    esc50(tmp_path / "set")
    small = ["trainer=cpu", "logger=none", "callbacks=none", "data.workers=0", "data.batch_size=4"]
    lines = ["method=simclr", "data=esc50", f"data.root={tmp_path / 'set'}", *small, "evals=none"]
    with pytest.raises(ValueError, match=r"SimCLR needs \['crops'\] in every batch; the data give"):
        run(compose(*lines), tmp_path / "run")
