"""Clips, pictures and sound of recordings, without any file."""

from functools import partial

import pytest
import torch

from unlabeled.data.clip_decode import Clips, Evenly, Picture, clip
from unlabeled.data.clip_parts import Box, Sound, Square, heard
from unlabeled.data.clips import Recordings
from unlabeled.data.decode import Center, Crops
from unlabeled.data.recordings import Kept, Memory, differences, shown, spanned
from unlabeled.data.rgb import UnreadableError

RATE, FRAMES, AUDIO = 10.0, 30, 800  # three seconds


def recording(sound="ramp", seed=0):
    """Every picture shows its number; sound is its time / 3, or silence, or none."""
    frames = torch.arange(FRAMES, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 12, 16)
    time = torch.arange(int(FRAMES / RATE * AUDIO)) / AUDIO
    audio = {"ramp": time / 3, "silent": time * 0, "late": (time > 2.6) * 0.5, None: None}[sound]
    return Kept(frames.contiguous(), RATE, audio, AUDIO)


def layout(root, seed, *, sounds=("ramp",) * 12):
    made = [recording(s) for s in sounds]
    audio = torch.stack([r.audio for r in made])
    labels = torch.arange(len(made)) % 3
    noise = torch.randint(0, 255, (len(made), FRAMES, 3, 12, 16), generator=torch.Generator())
    split = Memory(noise.to(torch.uint8), RATE, audio, AUDIO, labels, ("a", "b", "c"))
    return {"train": split, "test": split.take(torch.arange(6))}


def test_the_picture_that_is_shown_at_a_time_with_a_varying_rate():
    times = torch.tensor([0.0, 0.1, 0.5, 0.6], dtype=torch.float64)
    at = torch.tensor([-1.0, 0.0, 0.09, 0.1, 0.49, 0.5, 9.0])
    assert shown(times, at).tolist() == [0, 0, 0, 1, 1, 2, 3]


def test_a_clip_has_a_constant_rate_and_goes_round():
    assert clip(recording(), 1.0, 4, 5.0).tolist() == [10, 12, 14, 16]
    assert clip(recording(), 2.8, 4, 10.0).tolist() == [28, 29, 0, 1]
    assert clip(recording(), 0.0, 4, 20.0).tolist() == [0, 0, 1, 1]


def test_pictures_and_sound_are_of_the_same_span():
    whole = recording()
    short = Clips(frames=4, rate=8.0, crop=Square(size=8), sound=Sound(seconds=1.5, rate=AUDIO))
    long = Clips(frames=8, rate=4.0, crop=Square(size=8), sound=Sound(seconds=0.5, rate=AUDIO))
    for decode, seconds in ((short, 0.5), (long, 2.0)):
        middles = []
        for key in range(40):
            found = decode(whole, key)
            frames, audio = found["frames"], found["audio"]
            assert torch.equal(found["crops"][0][:, 0, 0, 0].long(), frames)
            pictured = frames[0] / RATE + seconds / 2
            # both spans have the same middle, but for the time a picture lasts
            assert abs(float(audio.mean()) * 3 - pictured) < 1 / RATE
            assert audio.min() >= 0
            assert len(audio) == round(decode.sound.seconds * AUDIO)
            middles.append(float(pictured))
        assert max(middles) - min(middles) > 0.7 * (3 - max(seconds, decode.sound.seconds))
    at_the_end = Sound(seconds=1.0, rate=AUDIO)(whole, 2.9)
    assert abs(float(at_the_end.mean()) * 3 - 2.5) < 1e-3  # moved back into the recording


def test_clips_are_played_at_speeds_between_two():
    whole = recording()
    decode = Clips(frames=4, rate=RATE, crop=Square(size=8), speed=[0.5, 2.0], count=2)
    steps = [
        (decode(whole, key)["crops"][i][:, 0, 0, 0].long()) for key in range(300) for i in (0, 1)
    ]
    spans = torch.stack([(x[-1] - x[0]) for x in steps]).double()  # of 3 steps, never round the end
    assert spans.min() in (1, 2)
    assert spans.max() in (5, 6)
    assert (spans < 3).double().mean() == pytest.approx(0.42, abs=0.1)  # as many below as above
    assert (spans > 3).double().mean() == pytest.approx(0.42, abs=0.1)
    double = Clips(frames=4, rate=RATE, crop=Square(size=8), speed=[2.0, 2.0])
    for key in range(20):
        frames = double(whole, key)["frames"]
        assert (frames.diff() == 2).all()
    plain, same = (
        Clips(frames=4, rate=RATE, crop=Square(size=8), **more) for more in ({}, {"speed": [1, 1]})
    )
    assert torch.equal(plain(whole, 3)["frames"], same(whole, 3)["frames"])


def test_equal_keys_cut_equal_clips_and_one_box_holds_for_a_clip():
    noise = torch.randint(0, 255, (1, 3, 40, 30)).to(torch.uint8).expand(FRAMES, -1, -1, -1)
    still = Kept(noise.contiguous(), RATE)
    decode = Clips(frames=5, rate=RATE, crop=Box(size=8), count=2)
    first, again, other = (decode(still, *key)["crops"] for key in ((1, 2), (1, 2), (1, 3)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    for crop in first:
        assert crop.shape == (5, 3, 8, 8)
        assert crop.dtype == torch.uint8
        assert (crop == crop[:1]).all()


def test_silent_spans_are_drawn_again_and_silent_recordings_are_unreadable():
    sound = Sound(seconds=0.2, rate=AUDIO, silence=-60.0)
    for key in range(20):
        try:
            middle, audio = heard(recording("late"), sound, 0.0, key)
        except UnreadableError:
            continue
        assert middle > 2.4
        assert audio is not None
        assert audio.abs().max() == 0.5
    with pytest.raises(UnreadableError, match="silent: below -60"):
        heard(recording("silent"), sound, 0.0, 1)
    with pytest.raises(UnreadableError, match="no sound"):
        heard(recording(None), sound, 0.0, 1)
    middle, audio = heard(recording("silent"), Sound(seconds=0.2, rate=AUDIO), 0.0, 1)
    assert audio is not None
    assert audio.abs().max() == 0


def test_clips_to_evaluate_divide_a_recording_evenly():
    decode = Evenly(frames=2, rate=RATE, size=8, clips=3)
    crops = decode(recording(), "plain")["crops"]
    assert [c[0, 0, 0, 0].item() for c in crops] == [4, 14, 24]
    assert decode(recording(), "other")["frames"].tolist() == [4, 5]
    pictures = Evenly(size=8, clips=2)(recording(), "plain")["crops"]
    assert [(c.shape, c[0, 0, 0].item()) for c in pictures] == [((3, 8, 8), 7), ((3, 8, 8), 22)]


def test_sound_at_another_rate():
    time = torch.arange(8000) / 8000
    tone = (2 * torch.pi * 50 * time).sin()
    for rate in (2000, 8000, 16000):
        found = spanned(tone, 8000, 0.25, 0.5, rate)
        wanted = (2 * torch.pi * 50 * (0.25 + torch.arange(rate // 2) / rate)).sin()
        assert len(found) == rate // 2
        assert (found - wanted).abs().max() < 0.02
    beyond = spanned(tone, 8000, 0.9, 0.2, 8000)
    assert beyond[900:].abs().max() == 0
    assert beyond[:700].abs().max() > 0.9


def module(decode, workers=0, **rest):
    options = {"root": "nowhere", "layout": layout, "batch_size": 4, "workers": workers}
    fixed = Evenly(frames=2, rate=RATE, size=8)
    return Recordings(**{**options, "decode": decode, "eval_decode": fixed, **rest})


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_what_the_decode_gives(workers):
    sound = Sound(seconds=0.5, rate=AUDIO)
    decode = Clips(frames=4, rate=RATE, crop=Box(size=8), sound=sound)
    data = module(decode, workers)
    data.setup("fit")
    assert data.gives == {"index", "crops", "frames", "audio", "label"}
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    for batch in batches:
        assert batch["crops"][0].shape == (4, 4, 3, 8, 8)
        assert batch["frames"].shape == (4, 4)
        assert batch["audio"].shape == (4, 400)
        for row, i in enumerate(batch["index"].tolist()):
            one = decode(layout(None, 0)["train"].recording(i), 0, 0, i)
            assert torch.equal(batch["crops"][0][row], one["crops"][0])
            assert torch.equal(batch["audio"][row], one["audio"])
            assert batch["label"][row] == i % 3


def test_image_decodes_take_one_picture_of_each_recording():
    data = module(Crops(size=8, count=2), eval_decode=Center(size=8))
    data.setup("fit")
    (first, *_) = data.train_dataloader()
    assert [c.shape for c in first["crops"]] == [(4, 3, 8, 8)] * 2
    assert first["frames"].shape == (4, 1)
    (batch,) = data.scan("test")
    assert batch["crops"][0].shape == (6, 3, 8, 8)
    assert (batch["frames"] == 15).all()
    assert torch.equal(data.thumbnail("test", 2), batch["crops"][0][2])
    assert data.image("test", 1).shape == (3, 12, 16)


def test_recordings_without_sound_are_counted_named_and_replaced():
    sounds = ["ramp"] * 11 + ["silent"]
    picture = Picture(decode=Center(size=8), sound=Sound(seconds=0.2, rate=AUDIO, silence=-50.0))
    data = module(picture, layout=partial(layout, sounds=sounds), max_unreadable=0.1)
    data.setup("fit")
    indices = torch.cat([batch["index"] for batch in data.train_dataloader()])
    assert 11 not in indices
    assert (indices == 0).sum() == 2
    (reason,) = data.unreadable["train"].values()
    assert reason == "it is silent: below -50.0 dB"
    strict = module(picture, layout=partial(layout, sounds=sounds), max_unreadable=0.0)
    with pytest.raises(ValueError, match=r"recording 11 \(it is silent"):
        list(strict.train_dataloader())


def test_motion_is_the_difference_of_neighbours():
    frames = torch.randint(0, 255, (4, 3, 6, 5)).to(torch.uint8)
    wanted = [(frames[i + 1].int() - frames[i].int()).abs().float().mean() for i in range(3)]
    assert torch.allclose(differences(frames), torch.stack(wanted))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Clips(frames=0, rate=1.0, crop=Square(size=8)),
        lambda: Clips(
            frames=2, rate=1.0, crop=Square(size=8), count=2, sound=Sound(seconds=1, rate=8)
        ),
        lambda: Clips(frames=2, rate=1.0, crop=Square(size=8), speed=[2.0, 1.0]),
        lambda: Clips(frames=2, rate=1.0, crop=Square(size=8), speed=[0.0, 1.0]),
        lambda: Clips(
            frames=2,
            rate=1.0,
            crop=Square(size=8),
            speed=[1.0, 2.0],
            sound=Sound(seconds=1, rate=8),
        ),
        lambda: Evenly(frames=2, rate=0.0, size=8),
        lambda: Sound(seconds=0.0, rate=8000),
        lambda: Box(size=8, scale=[0.5, 0.2]),
        lambda: Box(size=8, ratio=[2.0, 0.7]),
        lambda: Square(size=8, resize=6),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError, match=r"\d"):
        make()
