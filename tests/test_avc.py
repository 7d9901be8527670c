"""Look, Listen and Learn: spectrograms, the loss of both heads, what leaks, localisation."""

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from processes import mean, on_processes
from scipy.signal import stft
from test_relative_position import alone, near
from torch import nn

from unlabeled.augment.sound import Gain, LogSpectrogram, Masks, PictureSound, Shift
from unlabeled.backbones.look_listen import LookListen
from unlabeled.dist import rank, world_size
from unlabeled.draws import Draws
from unlabeled.methods.avc import AVC
from unlabeled.parts.sounding import distances, overlay
from unlabeled.parts.sources import another, several


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spectrograms_are_those_of_scipy():
    audio = noise(3, 4000) * 0.1
    found = LogSpectrogram(window=256, hop=100)(audio)
    _, _, z = stft(
        audio.numpy(), window="hann", nperseg=256, noverlap=156, boundary=None, padded=False
    )
    power = np.abs(z * 128) ** 2  # scipy divides by the window's sum
    wanted = np.log(np.maximum(power, 1e-12)) / 5
    assert found.shape == (3, 1, 129, 1 + (4000 - 256) // 100)
    assert np.abs(found[:, 0].numpy() - wanted).max() < 1e-3


def test_a_second_at_48_khz_has_the_papers_size():
    assert LogSpectrogram()(torch.zeros(1, 48000)).shape == (1, 1, 257, 198)
    assert LogSpectrogram(hop=242)(torch.zeros(1, 48000)).shape[-1] == 197  # as the entry has it


def test_silence_is_finite_and_the_range_is_limited():
    silent = LogSpectrogram(centred=True)(torch.zeros(2, 1000))
    assert silent.isfinite().all()
    tone = (torch.arange(8000) / 8000 * 2 * math.pi * 1000).sin()[None]
    whole = LogSpectrogram(scale=1.0)(tone)
    limited = LogSpectrogram(scale=1.0, range=10 * math.log(10))(tone)
    assert limited.amax() == whole.amax()
    assert (limited.amax() - limited.amin()).item() == pytest.approx(23.026, abs=1e-3)
    assert whole[0, 0].mean(1).argmax() == 1000 * 512 // 8000
    even = LogSpectrogram(centred=True)(noise(4, 2000))
    assert torch.allclose(even.mean((1, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(even.std((1, 2, 3)), torch.ones(4), atol=1e-4)


def test_the_level_differs_by_sound_and_stays_within_its_bounds():
    audio = torch.ones(500, 3)
    louder = Gain(most=0.1)(audio, Draws(1, rows=500))
    assert (louder == louder[:, :1]).all()
    assert 0.9 <= louder.min() < 0.905
    assert 1.095 < louder.max() <= 1.1


def test_sounds_go_round_within_their_span():
    x = torch.arange(200.0).expand(500, -1)
    moved = Shift(most=0.25)(x, Draws(0, rows=500))
    by = moved.argmin(1)
    assert torch.equal(moved, torch.stack([a.roll(int(k)) for a, k in zip(x, by, strict=True)]))
    by = torch.where(by > 100, by - 200, by)
    assert -50 <= by.min() < -45
    assert 45 < by.max() <= 50
    assert torch.equal(Shift(most=0.0)(x, Draws(0, rows=500)), x)


def test_masks_hide_bands_and_spans_of_each_spectrogram():
    s = torch.randn(400, 1, 20, 30)
    found = Masks(frequencies=6, times=9, count=2)(s, Draws(0, rows=400))
    hidden = found != s
    assert torch.equal(found[hidden], s.mean((1, 2, 3), keepdim=True).expand_as(s)[hidden])
    bands, spans = hidden.all(3)[:, 0], hidden.all(2)[:, 0]
    assert torch.equal(hidden[:, 0], bands[:, :, None] | spans[:, None])
    for rows, most in ((bands, 6), (spans, 9)):
        counts = rows.sum(1)
        assert counts.min() == 0
        assert most < counts.max() <= 2 * most  # two of them
        starts = (rows[:, 1:] & ~rows[:, :-1]).sum(1) + rows[:, 0]
        assert starts.max() == 2
        assert rows.any(0).all()  # anywhere
    assert torch.equal(Masks(frequencies=0, times=0)(s, Draws(0, rows=400)), s)
    with pytest.raises(ValueError, match="a mask of 21 is wider than a spectrogram's 20"):
        Masks(frequencies=21, times=0)(s, Draws(0, rows=400))


def test_augmentations_of_sound_are_applied_in_turn():
    batch = {"crops": [torch.zeros(4, 3, 8, 8, dtype=torch.uint8)], "index": torch.arange(4)}
    batch["audio"] = torch.randn(4, 4000)
    options = {"shift": Shift(most=0.5), "masks": Masks(frequencies=60, times=5)}
    made = PictureSound([[]], LogSpectrogram(), **options)
    draws = Draws(0, rows=4)
    sound = Shift(most=0.5)(batch["audio"], draws.fork("shift"))
    wanted = options["masks"](LogSpectrogram()(sound), draws.fork("masks"))
    assert torch.equal(made(batch, Draws(0, rows=4))["views"][1], wanted)
    with pytest.raises(ValueError, match="spectrogram is null"):
        PictureSound([[]], None, masks=Masks())
    bare = PictureSound([[]], None, masks=Masks(frequencies=0, times=0))
    assert torch.equal(bare(batch, Draws(0, rows=4))["views"][1], batch["audio"])


def test_what_cannot_be_is_refused():
    for bad in ({"frequencies": -1}, {"times": -1}, {"count": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Masks(**bad)
    with pytest.raises(ValueError, match="most"):
        Shift(most=1.5)
    with pytest.raises(ValueError, match="longer than the sound, 100"):
        LogSpectrogram()(torch.zeros(1, 100))
    for bad in ({"window": 0}, {"floor": 0.0}, {"range": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LogSpectrogram(**bad)
    with pytest.raises(ValueError, match="most"):
        Gain(most=1.0)
    with pytest.raises(ValueError, match=r"decode\.sound"):
        PictureSound([[]], LogSpectrogram())({"crops": [], "index": torch.arange(1)}, Draws(0))
    with pytest.raises(ValueError, match="head"):
        method("sideways")
    with pytest.raises(ValueError, match="4 blocks need 8 rows"):
        LookListen()(torch.zeros(1, 3, 7, 9))


def test_the_network_is_the_papers():
    net = LookListen(channels=1)
    maps = net.stages(torch.zeros(1, 1, 257, 198))
    sizes = [tuple(m.shape[1:]) for m in maps.values()]
    assert sizes == [(64, 257, 198), (128, 128, 99), (256, 64, 49), (512, 32, 24)]  # 32 x 24: paper
    assert net.dim == 512
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 8
    x = noise(2, 3, 32, 32)
    small = LookListen(widths=[4, 6]).eval()
    assert torch.equal(small(x), small.stages(x)["conv2"].flatten(2).max(2).values)


class Flat(nn.Module):
    def __init__(self, into, dim):
        super().__init__()
        self.map, self.dim = nn.Linear(into, dim), dim

    def forward(self, x):
        return self.map(x.flatten(1))


class Mapped(nn.Module):
    """Features are the mean of a map of them."""

    dim: ClassVar[int] = 3

    def forward(self, x):
        return x.mean((2, 3))

    def stages(self, x):
        return {"last": x}


def method(head="fused", net=None, heard=7):
    torch.manual_seed(0)
    net = net or Flat(3 * 4 * 4, 5)
    sound = Flat(heard, 6)
    return alone(AVC(net, nn.Identity(), None, sound=sound, head=head, dim=8).double())


def batch_of(rows=12, index=None):
    share = rows // world_size()
    some = slice(rank() * share, (rank() + 1) * share)
    pictures, sounds = noise(rows, 3, 4, 4, seed=1).double(), noise(rows, 7, seed=2).double()
    index = torch.arange(rows) if index is None else index
    return {"views": [pictures[some], sounds[some]], "index": index[some]}


def literal(made, batch, shift):
    """One pair after the other."""
    pictures, sounds = batch["views"]
    n, total, right, pairs = len(pictures), 0.0, 0, 0
    source = batch.get("group", batch["index"]).tolist()
    for i in range(n):
        around = [(i + shift + k) % n for k in range(n)]
        others = [j for j in around if source[j] != source[i]]
        for j, y in ((i, 1), *((j, 0) for j in others[:1])):
            v, a = made.backbone(pictures[i : i + 1])[0], made.sound(sounds[j : j + 1])[0]
            if made.kind == "fused":
                h = (made.head[0].weight @ torch.cat([v, a]) + made.head[0].bias).clamp(min=0)
                logits = (made.head[-1].weight @ h + made.head[-1].bias).tolist()
            else:
                v, a = made.pair.see(v[None])[0], made.pair.hear(a[None])[0]
                d = (v / v.norm() - a / a.norm()).norm()
                logits = (made.head.weight[:, 0] * d + made.head.bias).tolist()
            total += math.log(sum(map(math.exp, logits))) - logits[y]
            right += logits.index(max(logits)) == y
            pairs += 1
    return total / pairs, right / pairs


def drawn_shift(made, n):
    return 1 + int(made.shared_draws("shift").integers(n - 1))


@pytest.mark.parametrize("head", ["fused", "distance"])
@pytest.mark.parametrize("twice", [False, True])
def test_the_loss_is_its_formula(head, twice):
    made = method(head)
    made.step = 3
    shift = drawn_shift(made, 12)
    index = torch.arange(12)
    if twice:  # a recording stands for the one that its shift would meet
        index[shift % 12] = 0
    batch = batch_of(index=index)
    loss, right = literal(made, batch, shift)
    assert made.loss(batch)["correspondence"].item() == pytest.approx(loss, rel=1e-9)
    found = made.measure(batch, 5)
    made.step = -6  # what `measure` stands for
    again, right = literal(made, batch, drawn_shift(made, 12))
    assert found["correspondence"].item() == pytest.approx(again, rel=1e-9)
    assert found["accuracy"].item() == pytest.approx(right)


@pytest.mark.parametrize("videos", [[0] * 6 + [1] * 6, [0, 0, 1, 1] * 3, [0] * 11 + [1], [0] * 12])
def test_two_clips_of_one_video_are_never_a_negative(videos):
    made = method()
    batch = {**batch_of(), "group": torch.tensor(videos)}
    for made.step in range(4):
        loss, _ = literal(made, batch, drawn_shift(made, 12))
        assert made.loss(batch)["correspondence"].item() == pytest.approx(loss, rel=1e-9)
    own = batch["group"]
    for shift in range(1, 12):
        place, found = another(own, own, torch.arange(12) + shift)
        assert found.tolist() == [len(set(videos)) > 1] * 12
        assert (own[place] != own)[found].all()


class Trainer:
    def __init__(self, **data):
        self.datamodule = type("Data", (), data)()


def test_data_without_negatives_are_refused():
    several(Trainer(batch_size=2, count=2), "fit")
    several(Trainer(batch_size=2, count=5, sources=lambda self, split: 2), "fit")
    several(Trainer(batch_size=1, count=1), "test")
    with pytest.raises(ValueError, match=r"data\.batch_size of 2 or more, got 1"):
        several(Trainer(batch_size=1, count=5), "fit")
    with pytest.raises(ValueError, match="the 5 training recordings are cut from 1"):
        several(Trainer(batch_size=2, count=5, sources=lambda self, split: 1), "fit")


def test_shifts_are_derangements_of_every_kind():
    made, seen = method(), set()
    for made.step in range(200):
        seen.add(drawn_shift(made, 12))
    assert seen == set(range(1, 12))


def test_chance_costs_log_2():
    made = method()
    with torch.no_grad():
        made.head[-1].weight.zero_()
        made.head[-1].bias.zero_()
    assert made.loss(batch_of())["correspondence"].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("head", ["fused", "distance"])
def test_without_sound_the_answer_depends_on_the_picture_alone(head):
    made = method(head)
    batch = batch_of()
    v = made.backbone(batch["views"][0])
    silent = made.sound(torch.zeros_like(batch["views"][1]))
    assert torch.equal(made.logits(v, silent), made.logits(v, silent.roll(3, 0)))
    pictures, _ = batch["views"]
    mute = {**batch, "views": [pictures, torch.zeros_like(batch["views"][1])]}
    assert made.measure(mute, 0)["accuracy"].item() == pytest.approx(0.5)


def test_coinciding_embeddings_have_a_finite_gradient():
    x = noise(3, 4).requires_grad_()
    distances(x, x.detach().clone()).sum().backward()
    assert x.grad.isfinite().all()


def alike(head="fused"):
    made = method(head)
    made.step = 2
    batch = batch_of()
    loss = made.loss({**batch, "group": batch["index"] // 4})["correspondence"]
    loss.backward()
    return [mean(loss.detach()), *(mean(p.grad) for p in made.parameters())]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_equal_one(count):
    one = alike()
    for found in on_processes(count, alike):
        for a, b in zip(one, found, strict=True):
            near(a, b, atol=1e-12)


def test_a_place_that_sounds_is_found():
    made = method("distance", Mapped())
    with torch.no_grad():  # directions as they are
        for part in (made.pair.see, made.pair.hear):
            for layer in (part[0], part[-1]):
                layer.weight.zero_()
                layer.bias.zero_()
                layer.weight[:3, :3].copy_(torch.eye(3))
        made.sound.map.weight.zero_()
        made.sound.map.bias.zero_()
        made.sound.map.weight[:3, :3].copy_(torch.eye(3))
    picture = torch.tensor([1.0, 0.2, 0.2]).view(1, 3, 1, 1).expand(2, 3, 4, 4).clone().double()
    picture[0, :, 2, 1] = torch.tensor([0.2, 1.0, 0.2])
    picture[1, :, 0, 3] = torch.tensor([0.2, 1.0, 0.2])
    sound = torch.zeros(2, 7, dtype=torch.float64)
    sound[:, 1] = 1.0
    where = made.localise(picture, made.sound(sound)).flatten(1).argmax(1)
    assert where.tolist() == [2 * 4 + 1, 3]
    columns = made.pictures({"views": [picture, sound], "index": torch.arange(2)})
    assert list(columns) == ["picture", "its sound", "another's"]
    for x in columns.values():
        assert x.shape == (2, 3, 4, 4)
        assert ((x >= 0) & (x <= 1)).all()


def test_maps_are_drawn_over_grey_pictures():
    pictures = torch.full((1, 3, 4, 4), 0.5)
    maps = torch.zeros(1, 4, 4)
    maps[0, 1, 2] = 1.0
    drawn = overlay(pictures, maps)
    assert drawn[0, 1].flatten().argmax() == 6
    assert drawn[0, 2].flatten().argmin() == 6
    assert torch.equal(overlay(pictures, maps), overlay(pictures, 3 * maps - 5))
    assert overlay(pictures, torch.zeros(1, 2, 2)).isfinite().all()
