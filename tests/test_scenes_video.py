"""Scenes in motion: exact tracks, ways apart from classes, sounds that tell the class."""

import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from unlabeled.data.clip_decode import Clips, Evenly
from unlabeled.data.clip_parts import Sound, Square
from unlabeled.data.clips import Recordings
from unlabeled.data.scenes_video import ScenesVideo
from unlabeled.scenes.motion import LEAN, MOTIONS, NEAR, Moving, way
from unlabeled.scenes.render import picture
from unlabeled.scenes.solids import CLASSES
from unlabeled.scenes.sound import TIMBRES, sounds
from unlabeled.scenes.tracks import tracks
from unlabeled.scenes.world import ZOOM, World


def moving(frames=6, **rest):
    return Moving(World(solids=rest.pop("solids", 1), cards=0), frames=frames, rate=6.0, **rest)


def test_a_recording_is_a_function_of_its_position_and_of_the_time():
    long, short = moving(frames=9), moving(frames=3)
    for frame in (0, 2):
        a, b = long.at("train", [3, 7], frame), short.at("train", [7], frame)
        assert torch.equal(picture(a, 16)[1], picture(b, 16)[0])
    assert torch.equal(long.motions("train", range(9))[4:], long.motions("train", range(4, 9)))
    assert not torch.equal(long.motions("train", range(50)), long.motions("test", range(50)))


@pytest.mark.parametrize("kind", range(len(MOTIONS)), ids=MOTIONS)
def test_ways_stay_in_view_go_round_and_are_smooth(kind):
    phase = torch.linspace(0, 2, 401)[:, None]
    kinds = torch.full_like(phase, kind, dtype=torch.int64)
    home = torch.tensor([0.3, -0.4]).expand(401, 1, 2)
    place, near, yaw = way(phase, kinds, home)
    assert place.abs().max() <= 1 + 1e-6
    assert near.abs().max() <= 1
    for x in (place, near, yaw):
        assert torch.allclose(x[:201], x[200:], atol=1e-5)
        assert (x[1:] - x[:-1]).abs().max() < 0.15
    moves = MOTIONS[kind] not in ("approach", "swing")
    assert (place.std(0).max() > 0.3) == moves
    assert (near.std() > 0.3) == (MOTIONS[kind] == "approach")


def test_solids_stay_above_the_floor_and_whole_in_view():
    scenes = moving(frames=12, solids=2)
    for frame in range(12):
        scene = scenes.at("train", range(40), frame)
        centre, size = scene.centre[:, :2], scene.size[:, :2]
        lowest = centre[..., 1] - size
        assert (lowest >= -scene.floor[:, None] - 1e-4).all()
        edge = centre[..., :2].abs() + size[..., None]
        assert (edge <= (-centre[..., 2:] * ZOOM) * 1.01).all()


def test_tracks_hold_what_is_seen_of_a_solid_in_every_picture():
    scenes = moving(frames=5)
    boxes = tracks(scenes, "test", range(12), 32)
    for i, each in enumerate(boxes):
        assert each.shape == (1, 5, 4)
        for frame in range(5):
            scene = scenes.at("test", [i], frame)
            alone = picture(scene, 32, 1).int()
            gone = picture(type(scene)(**{**vars(scene), "there": scene.there & False}), 32, 1)
            left, top, right, bottom = each[0, frame].tolist()
            rows, columns = (alone - gone.int()).abs().sum((0, 1)).nonzero().unbind(1)
            # its shadow is elsewhere too, but nothing of the solid is outside
            inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
            assert inside.any()
            assert rows[inside].min() == top
            assert columns[inside].max() == right - 1
    middle = scenes.scenes("test", range(12)).centre[:, 0]
    at = -middle[:, 2] * ZOOM
    x = (middle[:, 0] / at + 1) / 2 * 32
    seen = torch.stack([(b[0, 2, 0] + b[0, 2, 2]) / 2 for b in boxes])
    assert (x - seen).abs().max() < 4


def test_a_solid_that_is_hidden_has_no_box():
    scenes = moving(frames=2, solids=3)
    found = tracks(scenes, "train", range(60), 16)
    assert {len(t) for t in found} == {1, 2, 3}
    hidden = torch.cat([t.isnan().all(-1).flatten() for t in found])
    assert hidden.any()
    assert hidden.float().mean() < 0.2


def test_the_way_says_nothing_about_the_class_unless_asked_to():
    from scipy.stats import chi2_contingency

    n = 4000
    for motion, related in (("random", False), ("class", True)):
        scenes = moving(motion=motion)
        kinds, classes = scenes.motions("train", range(n)), scenes.world.classes(range(n))
        table = torch.zeros(len(CLASSES), len(MOTIONS))
        table.index_put_((classes, kinds), torch.ones(n), accumulate=True)
        if not related:
            assert chi2_contingency(table.numpy()).pvalue > 1e-3
        assert bool(((table > 0).sum(1) == 1).all()) == related
    still = moving(motion="none")
    assert torch.equal(picture(still.at("t", [0], 0), 16), picture(still.at("t", [0], 5), 16))


def spectra(heard, rate):
    """Mean log spectra by bands, without the level."""
    windows = heard.unfold(1, 512, 256) * torch.hann_window(512)
    power = torch.fft.rfft(windows).abs().square()[..., 1:129].unflatten(-1, (32, 4)).mean(-1)
    bands = (power.mean(1) + 1e-6).log()
    swing = (power.sum(-1).sqrt().std(1) / power.sum(-1).sqrt().mean(1))[:, None]
    return torch.cat([bands - bands.mean(1, keepdim=True), 3 * swing], dim=1)


def nearest(x, y, test_x, test_y):
    return KNeighborsClassifier(10).fit(x, y).score(test_x, test_y)


def test_sound_tells_the_class_and_pixels_do_not():
    scenes = moving(frames=8)
    n, m = 400, 200
    y, test_y = (scenes.world.classes(range(k)).numpy() for k in (n, m))
    x, test_x = (
        spectra(sounds(scenes, s, range(k), 8000), 8000).numpy()
        for s, k in (("train", n), ("test", m))
    )
    assert nearest(x, y, test_x, test_y) > 0.5
    mute = {"timbre": "random"}
    x, test_x = (
        spectra(sounds(scenes, s, range(k), 8000, **mute), 8000).numpy()
        for s, k in (("train", n), ("test", m))
    )
    assert nearest(x, y, test_x, test_y) < 0.2
    flat, test_flat = (
        torch.stack([picture(scenes.at(s, range(k), f), 16, 1) for f in (0, 4, 7)], 1)
        .flatten(1)
        .numpy()
        for s, k in (("train", n), ("test", m))
    )
    chance = 1 / len(CLASSES)
    bar = chance + 4 * math.sqrt(chance * (1 - chance) / m)
    assert nearest(flat, y, test_flat, test_y) < bar
    # nor where each class has its own way: the middle picture, which evaluations of images see
    own = moving(frames=8, motion="class")
    still, test_still = (
        picture(own.at(s, range(k), 4), 16, 1).flatten(1).numpy()
        for s, k in (("train", n), ("test", m))
    )
    assert nearest(still, y, test_still, test_y) < bar


def test_sound_is_louder_when_the_solid_is_faster():
    scenes = moving(frames=12)
    ways = scenes.motions("train", range(300))
    bounce = (ways == MOTIONS.index("bounce")).nonzero().flatten().tolist()
    steady = [i for i in bounce if TIMBRES[i % len(CLASSES)][3] == 0][:12]
    heard = sounds(scenes, "train", steady, 8000, noise=0.0)
    level = heard.unfold(1, 400, 400).square().mean(-1).sqrt()
    times = (torch.arange(level.shape[1]) + 0.5) * 400 / 8000
    fast = scenes.loudness("train", steady, times)
    for a, b in zip(level, fast, strict=True):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.8
    assert fast.max() == 1


def layout(**rest):
    return ScenesVideo(**{"size": 16, "frames": 4, "train": 12, "test": 6, "sound": 2000, **rest})


def test_the_layout_renders_once_and_gives_recordings(tmp_path, caplog):
    first = layout()(tmp_path, 0)
    assert "rendering 12 train recordings" in caplog.text
    caplog.clear()
    again = layout()(tmp_path, 1)
    assert not caplog.text
    assert first["train"].identity() == again["train"].identity()
    assert layout(motion="class")(tmp_path, 0)["test"].identity() != first["test"].identity()
    one = first["train"].recording(5)
    assert one.frames.shape == (4, 3, 16, 16)
    assert len(one.audio) == 1000
    assert one.motion().shape == (3,)
    wanted = picture(layout().moving.at("train", [5], 2), 16, 1)[0]
    assert torch.equal(one.pictures([2])[0], wanted)
    assert first["train"].labels.tolist() == [i % 10 for i in range(12)]
    ways = layout(target="motion")(tmp_path, 0)["train"]
    assert ways.classes == MOTIONS
    assert torch.equal(ways.labels, first["train"].annotations["motion"].stacked())


def test_annotations_are_of_the_picture_in_the_middle(tmp_path):
    data = Recordings(
        root=str(tmp_path),
        layout=layout(),
        decode=Clips(frames=2, rate=8.0, crop=Square(size=16)),
        eval_decode=Evenly(size=16, sound=Sound(seconds=0.25, rate=2000)),
        batch_size=4,
        workers=0,
    )
    data.setup("fit")
    (batch,) = data.scan("test")
    assert (batch["frames"] == 2).all()
    assert batch["audio"].shape == (6, 500)
    track = data.annotation("test", "tracks").several(range(6))
    for i, boxes in enumerate(data.annotation("test", "boxes").several(range(6))):
        assert torch.equal(boxes, track[i][:, 2])
    assert data.names("test", "motion") == MOTIONS
    assert data.annotation("test", "normals")[0].shape == (3, 16, 16)
    assert torch.equal(data.image("test", 3), batch["crops"][0][3])


@pytest.mark.parametrize(
    "rest",
    [
        *({"size": 4}, {"train": 0}, {"frames": 0}, {"rate": 0.0}, {"motion": "wild"}),
        *({"timbre": "x"}, {"target": "x"}, {"sound": 10}, {"noise": -1.0}),
    ],
)
def test_impossible_settings_are_refused(rest):
    with pytest.raises(ValueError, match=str(next(iter(rest)))):
        layout(**rest)


def test_constants():
    assert len(TIMBRES) == len(CLASSES)
    assert 0 < NEAR < 0.5
    assert math.pi / 4 > LEAN
