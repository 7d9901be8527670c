"""Tracked patches: the ranking loss, which negatives count, and where pairs come from."""

import importlib.util
import sys
from dataclasses import fields, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from processes import mean, on_processes
from test_relative_position import alone, near
from torch import nn

from unlabeled.data.clips import Recordings
from unlabeled.data.layouts import HeldOut
from unlabeled.data.recordings import Kept, Memory
from unlabeled.data.scenes_video import ScenesVideo
from unlabeled.data.splits import parted
from unlabeled.data.tracks import Tracked, TrackPair, Tracks, WithTracks
from unlabeled.dist import rank, world_size
from unlabeled.methods.tracking import Tracking
from unlabeled.parts.triplets import gaps, selected


class Flat(nn.Module):
    """Features of a patch: a linear map of its pixels."""

    dim: ClassVar[int] = 6

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3 * 4 * 4, self.dim)

    def forward(self, x):
        return self.map(x.flatten(1))


def method(progress=0.0, **options):
    torch.manual_seed(0)
    given = {"dim": 5, "negatives": 3, **options}

    class At(Tracking):
        progress = property(lambda self: done)

    done = progress
    return alone(At(Flat(), nn.Identity(), None, **given).double())


INDEX = torch.tensor([4, 7, 4, 1, 0, 9])  # recording 4 has two tracks in the batch


def batch_of(index=INDEX):
    g = torch.Generator().manual_seed(3)
    views = torch.randn(2, len(index), 3, 4, 4, generator=g, dtype=torch.float64)
    share = len(index) // world_size()
    some = slice(rank() * share, (rank() + 1) * share)
    return {"views": list(views[:, some]), "index": index[some]}


def distances(made, batch):
    """D of every two of the 2N patches, and the recording of each."""
    x = torch.stack(batch["views"], 1).flatten(0, 1)
    h = made.head(made.backbone(x))
    d = torch.stack([torch.stack([1 - F.cosine_similarity(a, b, dim=0) for b in h]) for a in h])
    return d.detach(), batch["index"].repeat_interleave(2).tolist()


@pytest.mark.parametrize("hard", [1.0, 0.0])
def test_the_loss_is_its_formula(hard):
    """All negatives (there are at most ten of other recordings), written as loops."""
    made, batch = method(negatives=20, hard=hard, drawn_until=0.0), batch_of()
    d, owner = distances(made, batch)
    total, count, right = 0.0, 0, 0
    for i in range(6):
        first, last = 2 * i, 2 * i + 1
        for n in range(12):
            if owner[n] == owner[first]:
                continue
            count += 1
            for anchor in (first, last):
                total += max(0.0, float(d[first, last] - d[anchor, n]) + 0.5) / 2
                right += float(d[first, last] < d[anchor, n]) / 2
    assert count == 2 * 8 + 4 * 10  # those of recording 4 are none for one another
    found = made.measure(batch, 0)
    assert found["ranking"].item() == pytest.approx(total / count, rel=1e-9)
    assert found["accuracy"].item() == pytest.approx(right / count, rel=1e-6)


def test_patches_of_one_video_are_never_negatives():
    """Recordings 4 and 7 were cut from one video, 1 and 0 from another."""
    made, batch = method(negatives=20, hard=1.0, drawn_until=0.0), batch_of()
    batch["group"] = torch.tensor([2, 2, 2, 5, 5, 3])
    d, _ = distances(made, batch)
    owner = batch["group"].repeat_interleave(2).tolist()
    costs = [
        max(0.0, float(d[2 * i, 2 * i + 1] - d[anchor, n]) + 0.5)
        for i in range(6)
        for n in range(12)
        for anchor in (2 * i, 2 * i + 1)
        if owner[n] != owner[2 * i]
    ]
    found = made.measure(batch, 0)["ranking"].item()
    assert found == pytest.approx(sum(costs) / len(costs), rel=1e-9)
    batch["group"] = torch.full((6,), 2)
    assert made.measure(batch, 0)["ranking"].item() == 0.0  # none has a negative: a step of nothing


def test_hard_negatives_are_the_subset_of_largest_loss():
    made, batch = method(progress=0.5, negatives=3, hard=1.0), batch_of()
    d, owner = distances(made, batch)
    total = 0.0
    for i in range(6):
        first, last = 2 * i, 2 * i + 1
        costs = [
            sum(max(0.0, float(d[first, last] - d[a, n]) + 0.5) / 2 for a in (first, last))
            for n in range(12)
            if owner[n] != owner[first]
        ]
        total += sum(sorted(costs)[-3:])
    assert made.loss(batch)["ranking"].item() == pytest.approx(total / 18, rel=1e-9)
    early = method(progress=0.3, negatives=3, hard=1.0, drawn_until=0.375)
    assert early.loss(batch)["ranking"] < made.loss(batch)["ranking"] - 1e-6  # drawn ones


def test_selection_takes_the_hardest_and_draws_the_rest_among_what_is_allowed():
    g = torch.Generator().manual_seed(0)
    cost, noise = torch.rand(300, 8, generator=g), torch.rand(300, 8, generator=g)
    allowed = torch.ones(300, 8, dtype=torch.bool)
    allowed[:, 2] = False
    taken = selected(cost, allowed, noise, 2, 3)
    assert (taken.sum(1) == 5).all()
    assert not taken[:, 2].any()
    hardest = cost.masked_fill(~allowed, -1).topk(2, dim=1).indices
    assert taken.gather(1, hardest).all()
    share = selected(cost, allowed, noise, 0, 3).float().mean(0)[allowed[0]]
    assert (share - 3 / 7).abs().max() < 0.1  # uniform
    few = allowed & (torch.arange(8) < 2)
    assert torch.equal(selected(cost, few, noise, 2, 3), few)
    assert not selected(cost, allowed & False, noise, 2, 3).any()


def test_equal_embeddings_cost_the_margin_and_separated_ones_nothing():
    made = method(negatives=4)
    with torch.no_grad():
        made.head.weight.zero_()
    assert made.loss(batch_of())["ranking"].item() == pytest.approx(0.5, abs=1e-12)
    pairs = torch.eye(4, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    apart = gaps(pairs, pairs.flatten(0, 1))
    other = torch.arange(4).repeat_interleave(2) != torch.arange(4)[:, None]
    assert (F.relu(apart + 1.0)[other[:, None].expand(-1, 2, -1)] == 0).all()


def test_triplets_without_a_loss_have_no_gradient():
    g = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(3, 2, 4, generator=g, dtype=torch.float64), dim=2)
    z.requires_grad_()
    others = F.normalize(torch.randn(9, 4, generator=g, dtype=torch.float64), dim=1)
    cost = F.relu(gaps(z, others) + 0.2)
    assert 0 < (cost == 0).sum() < cost.numel()
    (cost * (cost == 0)).sum().backward()
    assert (z.grad == 0).all()
    cost = F.relu(gaps(z, others) + 0.2)
    cost[0, 0][cost[0, 0] > 0].sum().backward()
    assert (z.grad[0] != 0).any()
    assert (z.grad[1:] == 0).all()


def test_a_batch_of_one_recording_costs_nothing():
    made = method()
    loss = made.loss(batch_of(torch.full((6,), 3)))["ranking"]
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in made.parameters())


def alike():
    made = method(progress=0.9, negatives=4, hard=0.5)
    loss = made.loss(batch_of())["ranking"]
    loss.backward()
    return [mean(loss.detach()), *(mean(p.grad) for p in made.parameters())]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_equal_one(count):
    one = alike()
    for found in on_processes(count, alike):
        for a, b in zip(one, found, strict=True):
            near(a, b, atol=1e-12)


def test_pictures_show_a_pair_and_what_it_is_mistaken_for():
    made, batch = method(), batch_of()
    d, owner = distances(made, batch)
    columns = made.pictures(batch)
    nearest = columns.pop("nearest of another recording")
    assert list(columns) == ["first", "last"]
    x = torch.stack(batch["views"], 1).flatten(0, 1)
    for i in range(6):
        both = (d[2 * i] + d[2 * i + 1]).tolist()
        best = min((n for n in range(12) if owner[n] != owner[2 * i]), key=lambda n: both[n])
        shown = x[best] * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1).double()
        shown = shown + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).double()
        torch.testing.assert_close(nearest[i], shown.clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"margin": 2.5}, "margin must be in"),
        ({"negatives": 0}, "negatives must be"),
        ({"hard": 1.5}, "hard must be"),
        ({"drawn_until": -1}, "drawn_until must be"),
    ],
)
def test_wrong_settings_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        method(**options)


# The index, and pairs cut by it.


def recordings(n=6, frames=5, side=20):
    """Pixel (y, x) of frame t of recording i shows (10 i + t, y, x)."""
    x = torch.zeros(n, frames, 3, side, side, dtype=torch.uint8)
    x[:, :, 0] = (10 * torch.arange(n)[:, None] + torch.arange(frames))[..., None, None].byte()
    x[:, :, 1] = torch.arange(side)[:, None].byte()
    x[:, :, 2] = torch.arange(side).byte()
    return Memory(x, 5.0, None, 0, torch.arange(n) % 2, ("a", "b"))


def kept(folder, split):
    """Recordings 1, 3 (two) and 4 have tracks; box edges tell which."""
    owner = torch.tensor([1, 3, 3, 4])
    frames = torch.tensor([[0, 3], [1, 4], [0, 2], [2, 4]])
    corner = torch.tensor([[2, 3], [4, 5], [6, 7], [8, 9]]).float()
    boxes = torch.stack(
        [torch.cat([corner, corner + 8], 1), torch.cat([corner - 1, corner + 7], 1)], 1
    )
    found = Tracks(owner, frames, boxes)
    folder.mkdir(exist_ok=True)
    found.write(folder / "train.npz", split.identity())
    return found


@pytest.fixture
def tracked(tmp_path):
    split = recordings()
    kept(tmp_path, split)
    layout = WithTracks(lambda root, seed: {"train": split}, str(tmp_path))
    return layout(tmp_path, 0)["train"]


def test_a_pair_shows_the_boxes_of_one_track(tracked):
    cut = TrackPair(size=8)
    seen = set()
    for key in range(12):
        made = cut(tracked.recording(3), 0, key)
        first, last = made["crops"]
        a, b = made["frames"].tolist()
        assert (a, b) in {(1, 4), (0, 2)}
        left = 4 if a == 1 else 6
        assert (first[0] == 30 + a).all()
        assert (last[0] == 30 + b).all()
        assert first[2, 0].tolist() == list(range(left, left + 8))
        assert last[2, 0].tolist() == list(range(left - 1, left + 7))
        assert first[1, :, 0].tolist() == list(range(left + 1, left + 9))
        again = cut(tracked.recording(3), 0, key)
        assert all(map(torch.equal, made["crops"], again["crops"]))
        seen.add(a)
    assert seen == {0, 1}
    plain = cut(tracked.recording(0), 0)  # none: the middle, first and last
    assert plain["frames"].tolist() == [0, 4]
    assert plain["crops"][0].shape == (3, 8, 8)


def test_boxes_beyond_the_picture_are_cut_at_its_edge():
    whole = recordings(1).recording(0)
    boxes = torch.tensor([[[-5.0, -3, 5, 7], [30.0, 30, 40, 40]]])
    found = TrackPair(size=2)(Tracked(whole, torch.tensor([[0, 1]]), boxes), 0)
    assert all(x.shape == (3, 2, 2) for x in found["crops"])
    assert found["crops"][1][1:].unique().tolist() == [19]  # the last pixel


def test_training_visits_recordings_with_tracks_and_these_alone(tracked):
    orders = [tracked.order(2, 0, epoch).tolist() for epoch in range(5)]
    for order in orders:
        assert len(order) == 6
        assert sorted(order) == [1, 1, 3, 3, 4, 4]
    assert len(set(map(tuple, orders))) > 1
    assert orders[2] == tracked.order(2, 0, 2).tolist()
    with pytest.raises(ValueError, match="nothing was tracked"):
        tracked.take(torch.tensor([0, 2])).order(1, 0, 0)


def test_parts_of_a_split_keep_their_tracks(tracked):
    part = tracked.take(torch.tensor([4, 0, 3, 1]))
    assert len(part) == 4
    for new, old in enumerate((4, 0, 3, 1)):
        a, b = part.recording(new), tracked.recording(old)
        assert torch.equal(a.frames, b.frames)
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.pictures([0]), b.pictures([0]))
    assert torch.equal(part.take(torch.tensor([2])).recording(0).boxes, tracked.recording(3).boxes)
    assert part.labels.tolist() == [0, 0, 1, 1]


def test_groups_stay_together_beside_tracks(tracked):
    assert tracked.groups is None

    class Grouped(Memory):
        groups = torch.tensor([0, 0, 1, 1, 2, 2])

    whole = tracked.whole
    split = replace(
        tracked, whole=Grouped(**{f.name: getattr(whole, f.name) for f in fields(whole)})
    )
    for seed in range(5):
        rest, chosen = parted(split, 0.34, seed)
        groups = [set(split.groups[part].tolist()) for part in (rest, chosen)]
        assert groups[0].isdisjoint(groups[1])
        assert len(chosen) == 2


def test_an_index_of_other_recordings_or_none_is_refused(tmp_path):
    split = recordings()
    kept(tmp_path, split)

    def of(other):
        return WithTracks(lambda root, seed: {"train": other}, str(tmp_path))(tmp_path, 0)

    with pytest.raises(ValueError, match="other recordings"):
        of(recordings(side=24))
    whole = (tmp_path / "train.npz").read_bytes()
    for damaged in (b"no", whole[: len(whole) // 2]):
        (tmp_path / "train.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"no index of tracks.*mine_tracks"):
            of(split)
    (tmp_path / "train.npz").unlink()
    with pytest.raises(ValueError, match=r"no index of tracks.*mine_tracks"):
        of(split)


def test_patches_need_an_index():
    with pytest.raises(ValueError, match=r"data\.tracks"):
        Recordings(
            root=".", layout=HeldOut, decode=TrackPair(size=8), eval_decode=TrackPair(size=8)
        )


# Mining.


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'unlabeled[tracks]'")
    spec = importlib.util.spec_from_file_location("mine_tracks", ROOT / "scripts/mine_tracks.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine_tracks", module)
    spec.loader.exec_module(module)
    return module


def square(shift=3, camera=0, frames=9):
    """A textured square that moves over a textured wall, which a camera may move along."""
    g = torch.Generator().manual_seed(5)
    wall = F.interpolate(torch.rand(1, 1, 40, 50, generator=g), (160, 200), mode="bilinear")[0]
    thing = F.interpolate(torch.rand(1, 1, 10, 10, generator=g), (40, 40), mode="nearest")[0]
    found = []
    for t in range(frames):
        x = wall.roll(camera * t, 2)[:, :128, :128].clone()
        x[:, 40:80, 20 + shift * t : 60 + shift * t] = thing
        found.append(x.expand(3, -1, -1))
    return Kept((torch.stack(found) * 255).byte(), 8.0)


def mining(script, **changed):
    settings = dict(length=6, every=2, side=128, patch=0.4, moving=0.5, least=0.05, most=0.75)
    return script.Mining(**{**settings, "tracker": "flow", **changed})


@pytest.mark.parametrize("camera", [0, 2])
def test_what_moves_is_tracked_though_the_camera_may_move_too(script, camera):
    found = list(script.mined(square(camera=camera), mining(script)))
    assert found
    for track in found:
        assert track.frames.tolist() == list(range(track.frames[0], track.frames[0] + 7))
        middle = (track.boxes[:, :2] + track.boxes[:, 2:]) / 2
        true = np.stack([40 + 3 * track.frames, np.full(7, 60)], 1)
        assert np.abs(middle - true).max() < 10  # the square is 40 wide


def test_nothing_is_tracked_where_nothing_moves_or_all_does(script):
    assert not list(script.mined(square(shift=0), mining(script)))
    assert not list(script.mined(square(), mining(script, most=0.1, least=0.0)))
    assert not list(script.mined(square(frames=6), mining(script)))  # too short
    boxes = [x.boxes for x in script.mined(square(), mining(script, tracker="mil", every=9))]
    assert all(b.shape == (7, 4) for b in boxes)


def test_the_index_is_resumed_and_read(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNLABELED_DATA", str(tmp_path))
    monkeypatch.setattr(script, "CHUNK", 4)
    few = ["data.layout.size=48", "data.layout.train=8", "data.layout.test=4"]
    options = ["--length=4", "--every=3", "--least=0.02", "--side=96", "--workers=1"]
    command = [str(tmp_path / "tracks"), "data=scenes_video", *few, *options]
    assert script.main(command) == 0
    first = (tmp_path / "tracks/train.npz").read_bytes()
    assert (tmp_path / "tracks/tracks.png").stat().st_size > 1000
    parts = sorted((tmp_path / "tracks/parts").glob("*.npz"))
    assert len(parts) == 3
    parts[1].unlink()
    before = parts[0].stat().st_mtime_ns
    assert script.main(command) == 0
    assert parts[0].stat().st_mtime_ns == before
    assert (tmp_path / "tracks/train.npz").read_bytes() == first
    assert script.main([*command, "--every", "2"]) == 2
    assert "other recordings or settings" in capsys.readouterr().err
    assert script.main([str(tmp_path / "x"), "data=fashion_mnist_mini"]) == 2
    assert "not recordings" in capsys.readouterr().err
    layout = WithTracks(ScenesVideo(size=48, train=8, test=4), str(tmp_path / "tracks"))
    split = layout(tmp_path / "scenes_video", 0)["train"]
    counts = split.first.diff()
    assert counts.sum() > 0
    some = int(counts.argmax())
    pair = TrackPair(size=16)(split.recording(some), 0)
    assert [x.shape for x in pair["crops"]] == [(3, 16, 16)] * 2
