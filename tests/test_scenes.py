"""Rendered scenes: solids against their formulas, exact labels, no short cut to the class."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import f_oneway
from sklearn.neighbors import KNeighborsClassifier

from unlabeled.data import scenes as layout
from unlabeled.data.decode import Center, Crops
from unlabeled.data.images import Images
from unlabeled.data.scenes import Scenes
from unlabeled.evaluate.pixels import Pixels
from unlabeled.scenes.labels import labels
from unlabeled.scenes.render import picture, trace
from unlabeled.scenes.solids import CARDS, CLASSES, POINTS, SOLIDS, hit, key_points
from unlabeled.scenes.world import FACTOR_NAMES, FACTORS, World
from unlabeled.truth import Annotated

PLAIN = dict.fromkeys(("position", "rotation", "scale"), 0.0)


def in_star(x, y):
    """Between the centre and the edge from a tip to the next notch, after folding ten times."""
    angle = (torch.atan2(x, y) % (2 * math.pi / 5) - math.pi / 5).abs()  # 0 at a notch
    u, v = x.hypot(y) * angle.cos(), x.hypot(y) * angle.sin()
    tip = 0.97 * math.cos(math.pi / 5), 0.97 * math.sin(math.pi / 5)
    return v * (tip[0] - 0.42) >= (u - 0.42) * tip[1]


def in_triangle(x, y):
    return (y > -0.5) & (y < 1 - math.sqrt(3) * x.abs())


INSIDE = {  # solid -> whether points are inside, from school geometry
    "ball": lambda x, y, z: x**2 + y**2 + z**2 < 0.85**2,
    "cube": lambda x, y, z: torch.stack([x, y, z]).abs().amax(0) < 0.66,
    "cylinder": lambda x, y, z: (x.hypot(z) < 0.6) & (y.abs() < 0.78),
    "cone": lambda x, y, z: (x.hypot(z) < 0.78 * (0.95 - y) / 1.65) & (y > -0.7),
    "torus": lambda x, y, z: (x.hypot(y) - 0.66).hypot(z) < 0.27,
    "pyramid": lambda x, y, z: (
        (torch.maximum(x.abs(), z.abs()) < 0.7 * (0.95 - y) / 1.57) & (y > -0.62)
    ),
    "capsule": lambda x, y, z: x**2 + (y - y.clamp(-0.5, 0.5)) ** 2 + z**2 < 0.46**2,
    "octahedron": lambda x, y, z: x.abs() + y.abs() + z.abs() < 0.98,
    "cross": lambda x, y, z: (
        (torch.stack([x, y, z]).abs().sort(0).values[1] < 0.28)
        & (torch.stack([x, y, z]).abs().amax(0) < 0.88)
    ),
    "star": lambda x, y, z: in_star(x, y) & (z.abs() < 0.2),
    "disc": lambda x, y, z: (x.hypot(y) < 1) & (z.abs() < 0.03),
    "square": lambda x, y, z: (torch.maximum(x.abs(), y.abs()) < 0.8) & (z.abs() < 0.03),
    "triangle": lambda x, y, z: in_triangle(x, y) & (z.abs() < 0.03),
}


def march(name, origin, direction, far=6.0, steps=1500):
    """The first point inside, by small steps: t and whether there is one."""
    t = torch.linspace(0, far, steps, dtype=torch.float64)
    points = origin.double()[:, :, None] + direction.double()[:, :, None] * t
    inside = INSIDE[name](*points)
    return t[inside.to(torch.uint8).argmax(1)], inside.any(1)


def rays(count, seed=0):
    """From a sphere of radius 3 to somewhere near the middle; never along an axis."""
    g = torch.Generator().manual_seed(seed)
    origin = 3 * F.normalize(torch.randn(3, count, generator=g), dim=0)
    direction = F.normalize(torch.randn(3, count, generator=g) * 0.45 - origin, dim=0)
    return origin, direction


@pytest.mark.parametrize("name", SOLIDS)
def test_rays_meet_solids_where_marching_finds_them(name):
    origin, direction = rays(300)
    t, normal = hit(list(SOLIDS).index(name), origin, direction)
    wanted, found = march(name, origin, direction)
    # a step may miss a grazed edge, and a thin card between two steps
    assert (t.isfinite() == found).float().mean() > (0.9 if name in CARDS else 0.98)
    both = t.isfinite() & found
    assert both.sum() > (30 if name in CARDS else 100)
    assert (t.double() - wanted)[both].abs().quantile(0.98) < 6 / 1500 + 2e-3
    points, n = (origin + t * direction)[:, both].double(), normal[:, both].double()
    assert n.norm(dim=0).sub(1).abs().max() < 1e-5
    assert ((n * direction[:, both]).sum(0) < 1e-3).all()
    assert INSIDE[name](*(points - 4e-3 * n)).float().mean() > 0.97
    assert not INSIDE[name](*(points + 4e-3 * n)).any()


@pytest.mark.parametrize("name", SOLIDS)
def test_normals_are_at_right_angles_to_the_surface(name):
    kind = list(SOLIDS).index(name)
    origin, direction = rays(600, seed=1)
    t, n = hit(kind, origin, direction)
    here = origin + t * direction
    for axis in range(3):
        moved = direction.clone()
        moved[axis] += 2e-2
        t2, n2 = hit(kind, origin, moved)
        step = origin + t2 * moved - here
        same = t.isfinite() & t2.isfinite() & ((n * n2).sum(0) > 0.9)  # not over an edge
        slope = ((n + n2) / 2 * step).sum(0).abs() / step.norm(dim=0)
        assert same.sum() > 50
        assert slope[same].quantile(0.97) < 0.04  # radians


def test_solids_fit_their_boxes():
    for name, inside in INSIDE.items():
        p = torch.rand(3, 40000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        p = p[:, inside(*(p * 2.4 - 1.2))] * 2.4 - 1.2
        low, high = (torch.tensor(x, dtype=torch.float64) for x in SOLIDS[name][1:])
        assert (p >= low[:, None]).all(), name
        assert (p <= high[:, None]).all(), name
        assert ((p.amax(1) - p.amin(1)) > 0.8 * (high - low)).all(), name


def test_key_points_lie_on_the_surface():
    for name, points in zip(CLASSES, key_points(), strict=True):
        out = points / points.norm(dim=1, keepdim=True)
        if name == "torus":  # away from the ring
            ring = F.normalize(points * torch.tensor([1, 1, 0]), dim=1) * 0.66
            out = F.normalize(points - ring, dim=1)
        inside = INSIDE[name]
        assert inside(*(points - 0.01 * out).double().T).all(), name
        assert not inside(*(points + 0.01 * out).double().T).any(), name


def test_an_image_is_a_function_of_seed_split_and_index():
    made = Scenes(size=24)
    many = made.pictures("train", range(50))
    assert made.pictures("train", [7]).equal(many[7:8])
    assert made.pictures("train", [33, 7, 2]).equal(many[[33, 7, 2]])
    assert not made.pictures("test", [7]).equal(many[7:8])
    assert not Scenes(size=24, seed=1).pictures("train", [7]).equal(many[7:8])
    flat = many.flatten(1).float()
    assert torch.pdist(flat).min() > 100  # no two are alike


def test_nothing_but_the_shape_depends_on_the_class(monkeypatch):
    world = World(cards=5)
    drawn = world.scenes("train", range(40))
    monkeypatch.setattr(World, "classes", lambda self, at: (torch.as_tensor(at) * 7 + 3) % 10)
    other = world.scenes("train", range(40))
    for field in dataclasses.fields(drawn):
        same = torch.equal(*(torch.as_tensor(getattr(x, field.name)) for x in (drawn, other)))
        assert same == (field.name != "kind"), field.name
    assert drawn.kind[:, 1:].equal(other.kind[:, 1:])


def test_factors_are_as_frequent_in_every_class_and_vary():
    factors = World().scenes("train", range(1000)).factors.numpy()
    assert factors.shape == (1000, len(FACTOR_NAMES))
    of_class = np.arange(1000) % 10
    for name, column in zip(FACTOR_NAMES, factors.T, strict=True):
        assert f_oneway(*(column[of_class == c] for c in range(10))).pvalue > 1e-3, name
        assert column.std() > 0.1 * (column.max() - column.min()) > 0, name


def test_classes_are_balanced():
    assert World().classes(range(200)).bincount().tolist() == [20] * 10


OWN = {  # factor -> the columns it moves; the view at a depth limits the place of larger solids
    "position": {"x", "y", "room_depth"},
    "scale": {"size", "x", "y"},
    "rotation": {"yaw", "pitch", "roll"},
    "colour": {"hue"},
    "texture": {"pattern", "frequency"},
    "light": {"light_azimuth", "light_height", "ambient"},
    "room": {"room_depth"},
    "clutter": {"cards"},
}


@pytest.mark.parametrize("factor", FACTORS)
def test_one_factor_is_drawn_anew_and_no_other(factor):
    made = Scenes(size=32)
    first, second = (made.world.scenes("train", range(60), x) for x in (None, {factor: 1}))
    moved = (first.factors != second.factors).any(0).tolist()
    changed = {name for name, here in zip(FACTOR_NAMES, moved, strict=True) if here}
    assert changed
    assert changed <= OWN[factor]
    assert made.pictures("train", [3], {factor: 0}).equal(made.pictures("train", [3]))
    before, after = (
        made.pictures("train", range(12)),
        made.pictures("train", range(12), {factor: 1}),
    )
    assert (before != after).flatten(1).any(1).sum() >= 11
    if factor in ("colour", "texture", "light"):
        maps = [[x["normals"] for x in labels(s, 32)] for s in (first, second)]
        assert torch.stack(maps[0]).equal(torch.stack(maps[1]))


@pytest.mark.parametrize("factor", FACTORS)
def test_a_factor_that_may_not_vary_is_fixed(factor):
    held = World(vary={factor: 0.0}).scenes("train", range(60)).factors
    free = World().scenes("train", range(60)).factors
    own = OWN[factor] - ({"x", "y"} if factor == "scale" else {"room_depth"})
    if factor == "room":
        own = {"room_depth"}
    for name in own:
        column = FACTOR_NAMES.index(name)
        spread = held[:, column].std()
        if name == "hue":
            spread = held[:, column].sub(0.5).abs().max()
        assert spread < 1e-3 < free[:, column].std(), name


def seen_from(scene, i, size):
    """(size, size) bool: pixels of the first solid, by marching through it."""
    along = (torch.arange(size).double() + 0.5) / size - 0.5
    d = torch.stack([along.repeat(size), -along.repeat_interleave(size), -torch.ones(size**2)])
    turn, scale = scene.turn[i, 0].double(), scene.size[i, 0].double()
    o = turn.T @ -scene.centre[i, 0].double()[:, None] / scale
    name = CLASSES[scene.kind[i, 0]]
    return march(name, o.expand_as(d), turn.T @ d / scale, far=6.0, steps=700)[1].view(size, size)


def test_masks_are_the_pixels_that_show_the_solid():
    size, scene = 24, World(cards=0).scenes("train", range(20))
    for i, known in enumerate(labels(scene, size)):
        wanted = seen_from(scene, i, size)
        assert (known["masks"].bool() == wanted).float().mean() > 0.985
        assert known["masks"].max() == 1
        assert known["segmentation"].equal(known["masks"] * (i % 10 + 1))


def test_boxes_hold_the_visible_pixels():
    found = labels(World(solids=3).scenes("train", range(40)), 48)
    assert {len(known["boxes"]) for known in found} == {1, 2, 3}
    for known in found:
        masks = known["masks"].numpy()
        assert sorted(set(np.unique(masks)) - {0}) == list(range(1, len(known["boxes"]) + 1))
        for m, (box, kind) in enumerate(zip(known["boxes"], known["box_labels"], strict=True)):
            rows, columns = np.nonzero(masks == m + 1)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == edges
            assert (known["segmentation"].numpy()[masks == m + 1] == kind.item() + 1).all()


def test_normals_have_length_one_and_face_the_camera():
    scene = World().scenes("test", range(20))
    hits = trace(scene, 32)
    maps = torch.stack([known["normals"] for known in labels(scene, 32)])
    assert maps.norm(dim=1).sub(1).abs().max() < 1e-5
    flat = maps.permute(1, 0, 2, 3).reshape(3, 20, -1)
    assert ((flat * hits.direction[:, None]).sum(0) < 1e-3).all()
    floor = (hits.what == scene.kind.shape[1] + 1).view(20, 32, 32)
    assert floor.flatten(1).any(1).all()
    assert maps.permute(0, 2, 3, 1)[floor].eq(torch.tensor([0.0, 1.0, 0.0])).all()


def test_depth_and_normals_agree():
    """Points of neighbouring pixels of one face lie at right angles to its normal."""
    scene, size = World(cards=0).scenes("train", range(20)), 96
    hits = trace(scene, size)
    points = (hits.direction[:, None] * hits.depth.view(20, -1)).view(3, 20, size, size)
    n, what = hits.normal.view(3, 20, size, size), hits.what.view(20, size, size)
    step = points[..., 1:] - points[..., :-1]
    mean = (n[..., 1:] + n[..., :-1]) / 2
    same = (what[..., 1:] == 0) & (what[..., :-1] == 0) & (mean.norm(dim=0) > 0.95)
    slope = ((mean * step).sum(0).abs() / step.norm(dim=0))[same]
    assert same.sum() > 10000
    assert slope.quantile(0.98) < 0.05


def test_key_points_of_a_solid_that_faces_the_camera():
    scene = World(cards=0, vary=PLAIN).scenes("train", range(10))
    for known, name in zip(labels(scene, 65), CLASSES, strict=True):
        points = dict(zip(POINTS, known["keypoints"][0].tolist(), strict=True))
        left, right = points["left"], points["right"]
        assert left[0] + right[0] == pytest.approx(65, abs=1e-3)
        assert left[0] < 32 < right[0]
        assert points["top"][1] < points["bottom"][1]
        assert points["front"][2] == 2, name
        assert points["back"][2] == 1, name
        if name != "torus":
            assert points["front"][:2] == pytest.approx([32.5, 32.5], abs=1e-3)
            assert points["back"][:2] == pytest.approx([32.5, 32.5], abs=1e-3)


def test_a_key_point_is_visible_where_its_face_is():
    scene = World(cards=0).scenes("train", range(200))
    found = labels(scene, 64)
    for i in range(200):
        if CLASSES[i % 10] not in ("ball", "cube"):  # there, axes are the normals at their ends
            continue
        axes = F.normalize(key_points()[i % 10], dim=1) @ scene.turn[i, 0].T
        at = (
            scene.centre[i, 0] + axes * key_points()[i % 10].norm(dim=1)[:, None] * scene.size[i, 0]
        )
        facing = (axes * F.normalize(at, dim=1)).sum(1)
        clear = facing.abs() > 0.1  # at the rim, rounding decides
        x, y, seen = found[i]["keypoints"][0].T
        inside = (x >= 0) & (x < 64) & (y >= 0) & (y < 64)
        assert inside.all()
        assert seen[clear].tolist() == [2.0 if f < 0 else 1.0 for f in facing[clear].tolist()]


def test_cards_hide_key_points_and_pixels():
    bare, full = (World(cards=n).scenes("train", range(300)) for n in (0, 7))
    before, after = labels(bare, 32), labels(full, 32)
    lost = [(a["masks"] < b["masks"]).sum() for b, a in zip(before, after, strict=True)]
    areas = [(b["masks"].sum(), a["masks"].sum()) for b, a in zip(before, after, strict=True)]
    left = [a / b for b, a in areas]
    hidden = sum(
        len(a["keypoints"]) == 1 and (a["keypoints"][0, :, 2] < b["keypoints"][0, :, 2]).any()
        for b, a in zip(before, after, strict=True)
    )
    assert 30 < sum(x > 0 for x in lost) < 200
    assert sum(x < 0.5 for x in left) < 9  # few solids are hidden for the most part
    assert hidden > 5
    assert all(not (a["masks"] > b["masks"]).any() for b, a in zip(before, after, strict=True))


def test_solids_throw_shadows():
    scene = World(cards=0, vary={"texture": 0.0, "colour": 0.0}).scenes("train", range(20))
    away = dataclasses.replace(scene, there=torch.zeros_like(scene.there))
    with_solid, without = (picture(s, 48).float() for s in (scene, away))
    masks = torch.stack([known["masks"] for known in labels(scene, 48)])
    near = F.max_pool2d(masks[:, None].float(), 5, 1, 2) > 0  # pixels at its rim mix both
    change = (with_solid - without).mean(1, keepdim=True).masked_fill(near, 0)
    assert change.max() < 1  # a solid lights nothing up
    assert (change.flatten(1).amin(1) < -15).float().mean() > 0.5


def test_motion_is_another_pose_of_the_same_scene():
    scene = World(cards=0).scenes("train", range(10))
    later = dataclasses.replace(scene, centre=scene.centre + torch.tensor([0.2, 0.0, 0.0]))
    for before, after in zip(labels(scene, 64), labels(later, 64), strict=True):
        moved = (after["keypoints"] - before["keypoints"])[0, :, 0]
        assert ((moved > 2) & (moved < 5)).all()  # pixels; nearer points move further
        assert after["boxes"][0, 0] > before["boxes"][0, 0]


def module(root, **settings):
    size = settings.setdefault("size", 16)
    made = Scenes(**{"train": 60, "test": 20, "finer": 1, **settings})
    crops = {"decode": Crops(size=size), "eval_decode": Center(size=size)}
    return Images(root=str(root), layout=made, batch_size=8, limit=30, tier="memory", **crops)


def test_the_data_module_gives_images_labels_and_annotations(tmp_path):
    data = module(tmp_path)
    data.setup("fit")
    assert isinstance(data, Annotated)
    assert data.size("train") == 30
    assert data.classes == list(CLASSES)
    assert data.labels("train").bincount().tolist() == [3] * 10
    assert data.kinds("test") == {
        *("boxes", "box_labels", "masks", "segmentation", "normals", "keypoints", "factors"),
        "redrawn",
    }
    again = data.annotation("test", "redrawn").several([3, 1])
    for place, found in zip([3, 1], again, strict=True):
        for name, image in zip(data.names("test", "redrawn"), found, strict=True):
            (wanted,) = Scenes(size=16, finer=1).pictures("test", [place], {name: 1})
            assert torch.equal(image, wanted)
    assert data.names("train", "keypoints") == POINTS
    batch = next(iter(data.scan("train")))
    masks = data.annotation("train", "masks").stacked()
    kinds = data.annotation("train", "box_labels").several(range(30))
    assert [k.tolist() for k in kinds] == [[y] for y in batch["label"].tolist()]
    # of the same images: all were rendered in an order, of which `limit` keeps some
    pixels = Scenes(size=16, finer=1).pictures("train", range(60))
    at = [(pixels == x).flatten(1).all(1).nonzero().item() for x in batch["crops"][0]]
    assert at != list(range(30))
    known = labels(World().scenes("train", at), 16)
    assert masks.equal(torch.stack([x["masks"] for x in known]))
    normals = data.annotation("train", "normals").stacked([4, 2])
    assert normals.equal(torch.stack([known[i]["normals"] for i in (4, 2)]))
    assert data.image("train", 5).equal(batch["crops"][0][5])


def test_several_solids_have_boxes_and_no_label(tmp_path):
    data = module(tmp_path, solids=3)
    assert data.labels("train") is None
    assert len(data.classes) == 10
    counts = [len(x) for x in data.annotation("test", "boxes").several(range(20))]
    assert max(counts) > 1


def test_scenes_are_rendered_once(tmp_path, monkeypatch):
    root = tmp_path / "new" / "scenes"
    made = Scenes(size=16, train=12, test=8)
    first = made(root, 0)
    assert len(list(root.iterdir())) == 2
    assert len(first["train"]) == 12

    def never(*_):
        raise AssertionError("rendered again")

    with monkeypatch.context() as patch:
        patch.setattr(layout, "picture", never)
        again = made(root, 5)
        assert again["train"].pixels.equal(first["train"].pixels)
        assert again["test"].identity() == first["test"].identity()
        for other in ({"seed": 1}, {"train": 13}, {"size": 17}, {"vary": {"light": 0.5}}):
            with pytest.raises(AssertionError, match="again"):
                Scenes(**{"size": 16, "train": 12, "test": 8, **other})(root, 0)
    assert not list(root.glob("*.tmp"))  # what failed leaves nothing behind
    first["train"].pixels[:] = 0  # in memory alone
    assert made(root, 0)["train"].pixels.any()


def test_a_damaged_file_is_made_again(tmp_path):
    made = Scenes(size=16, train=12, test=0)
    wanted = made(tmp_path, 0)["train"].pixels.clone()
    (path,) = tmp_path.iterdir()
    for content in (path.read_bytes()[:-100], b"", b"no array"):
        path.write_bytes(content)
        assert made(tmp_path, 0)["train"].pixels.equal(wanted)
    assert set(made(tmp_path, 0)) == {"train"}


def test_a_root_that_cannot_be_written_costs_time_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    split = Scenes(size=16, train=4, test=0)(tmp_path / "file" / "scenes", 0)["train"]
    assert split.pixels.equal(Scenes(size=16).pictures("train", range(4)))
    assert "not kept" in caplog.text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"size": 4}, "layout.size must be at least 8, got 4"),
        ({"train": 0}, "layout.train must be at least 1, got 0"),
        ({"test": -1}, "layout.test must be at least 0, got -1"),
        ({"finer": 0}, "layout.finer must be at least 1, got 0"),
        ({"solids": 0}, "solids=0"),
        ({"cards": -1}, "cards=-1"),
        ({"vary": {"colour": 2.0}}, r"vary.colour must be in \[0, 1\], got 2"),
        ({"vary": {"color": 1.0}}, "no factor is named 'color'; there are .*'colour'"),
    ],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Scenes(**settings)


def test_an_unknown_factor_cannot_be_drawn_anew():
    with pytest.raises(ValueError, match="no factor is named 'weather'"):
        Scenes(size=16).pictures("train", [0], {"weather": 1})


def test_neighbours_of_raw_pixels_do_not_know_the_class():
    made = Scenes(size=32, finer=1)
    parts = {"train": range(1000), "test": range(500)}
    pixels = {k: Pixels(side=32)(made.pictures(k, at) / 255 * 4 - 2) for k, at in parts.items()}
    y = {k: made.world.classes(at) for k, at in parts.items()}
    for neighbours in (1, 20):
        near = KNeighborsClassifier(neighbours, metric="cosine")
        score = near.fit(pixels["train"], y["train"]).score(pixels["test"], y["test"])
        assert score < 0.1 + 4 * (0.09 / 500) ** 0.5  # chance, and four standard errors


@pytest.mark.slow
def test_a_small_network_learns_the_class_from_labels():
    from unlabeled.backbones.resnet import ResNet

    made = Scenes(size=48)
    parts = {"train": range(5000), "test": range(600)}
    images = {
        k: torch.cat([made.pictures(k, at[i : i + 50]) for i in range(0, len(at), 50)])
        for k, at in parts.items()
    }
    y = {k: made.world.classes(at) for k, at in parts.items()}
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        ResNet(depth=18, width=16, stem="small", stem_stride=2), torch.nn.Linear(128, 10)
    )
    epochs, size = 8, 64
    steps = epochs * (len(y["train"]) // size)
    optim = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optim, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(y["train"]))[: steps // epochs * size].split(size):
            x = images["train"][rows] / 128 - 1
            loss = F.cross_entropy(net(x.flip(3) if torch.rand(()) < 0.5 else x), y["train"][rows])
            optim.zero_grad()
            loss.backward()
            optim.step()
            rate.step()
    net.eval()
    with torch.no_grad():
        right = net(images["test"] / 128 - 1).argmax(1) == y["test"]
    assert right.float().mean() > 0.35  # 0.44 was measured; chance is 0.1
