"""NYUv2: the official files, written small, and normals from depth against closed forms."""

import gzip
import math
import pickle

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from unlabeled.data.decode import Center
from unlabeled.data.depth import Camera, axes_between, normals_of
from unlabeled.data.images import Images
from unlabeled.data.matlab import unpickled
from unlabeled.data.nyuv2 import NYUv2
from unlabeled.data.nyuv2_normals import CAMERA

H, W = 36, 48


def wall(normal, distance=2.0, camera=CAMERA, h=H, w=W):
    """Depths of the plane with a normal (x right, y up, z to the viewer) in front of a camera."""
    x = (torch.arange(w).double() + 0.5 - camera.cx) / camera.fx
    y = (torch.arange(h).double()[:, None] + 0.5 - camera.cy) / camera.fy
    n = torch.tensor([normal[0], -normal[1], -normal[2]]).double()  # x right, y down, z forward
    return -distance / (n[0] * x + n[1] * y + n[2])


def tilt(k):
    n = np.array([math.sin(0.5 * k + 1), math.cos(k), 2.0])
    return n / np.linalg.norm(n)


def write_nyuv2(root, counts, normals=None, encode=lambda n: n, seed=0):
    """The labelled file with one plane in each image, split in two, and normals of a kind."""
    root.mkdir(parents=True)
    n = sum(counts)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 3, W, H), dtype=np.uint8)
    depths = np.stack([wall(tilt(k)).float().numpy().T for k in range(n)])
    raw = depths.copy()
    raw[:, :3] = 0  # the first three columns of every image are unknown
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"], file["rawDepths"] = pixels, depths, raw
    order = np.random.default_rng(1).permutation(n) + 1
    names = {"trainNdxs": order[: counts[0], None], "testNdxs": order[counts[0] :, None]}
    savemat(root / "splits.mat", {k: x.astype(np.uint16) for k, x in names.items()})
    maps = np.stack([np.tile(encode(tilt(k)), (H, W, 1)) for k in range(n)]).astype(np.float32)
    if normals == "packed":
        masks = np.ones((n, H, W), np.uint8)
        masks[:, 0] = 0
        content = {"all_normals": maps, "all_valid_depth_masks": masks}
        content["all_filenames"] = [f"{k + 1:04}" for k in range(n)]
        with gzip.open(root / "all_normals.pklz", "wb") as file:
            pickle.dump(content, file, protocol=2)
    if normals == "pictures":
        for side, rows in (("train", names["trainNdxs"]), ("test", names["testNdxs"])):
            folder = root / "nyu_normals_gt" / side
            folder.mkdir(parents=True)
            for i in rows[:, 0]:
                colours = np.round((maps[i - 1] + 1) * 127.5).astype(np.uint8)
                Image.fromarray(colours).save(folder / f"{i:05}.png")
    return pixels, {"train": order[: counts[0]], "test": order[counts[0] :]}


def data(root, **layout):
    settings = {"decode": Center(size=16), "eval_decode": Center(size=16), "workers": 0}
    return Images(root=str(root), layout=NYUv2(**layout), tier="folder", **settings)


def test_images_are_those_of_the_file_in_the_order_of_the_split(tmp_path):
    pixels, order = write_nyuv2(tmp_path / "nyu", (4, 2))
    images = data(tmp_path / "nyu", normals="none")
    for side, count in (("train", 4), ("test", 2)):
        assert images.size(side) == count
        for i in range(count):
            true = pixels[order[side][i] - 1].transpose(0, 2, 1)
            np.testing.assert_array_equal(images.image(side, i).numpy(), true)
    assert images.labels("train") is None
    again = data(tmp_path / "nyu", normals="none")
    assert again.fingerprint("test") == images.fingerprint("test")
    assert not list((tmp_path / "nyu").glob("*.tmp"))


def angle(a, b):
    return torch.rad2deg(2 * torch.arcsin((a - b).norm(dim=0) / 2))  # exact for small ones


def test_normals_of_depth_are_those_of_the_planes(tmp_path):
    _, order = write_nyuv2(tmp_path / "nyu", (4, 2))
    images = data(tmp_path / "nyu", normals="depth")
    assert images.kinds("test") == {"normals"}
    for side in ("train", "test"):
        for i, found in enumerate(images.annotation(side, "normals").several(range(2))):
            true = torch.tensor(tilt(order[side][i] - 1)).float()[:, None, None]
            assert found[:, :, :3].abs().max() == 0  # no raw depth there
            assert angle(found[:, :, 3:].double(), true.double()).max() < 0.02


def turned(n):
    return np.array([-n[2], n[0], n[1]])  # as a file with other axes might say it


@pytest.mark.parametrize("kind", ["packed", "pictures"])
@pytest.mark.parametrize("encode", [lambda n: n, turned])
def test_normals_of_files_have_the_axes_of_this_package(tmp_path, kind, encode):
    _, order = write_nyuv2(tmp_path / "nyu", (6, 3), kind, encode)
    images = data(tmp_path / "nyu")
    for side in ("test", "train"):
        for i, found in enumerate(images.annotation(side, "normals").several(range(3))):
            true = torch.tensor(tilt(order[side][i] - 1)).double()[:, None, None]
            if kind == "packed":
                assert found[:, 0].abs().max() == 0  # masked
                assert angle(found[:, 1:].double(), true).max() < 0.005
            else:
                assert found[:, :, :3].abs().max() == 0  # no raw depth
                assert angle(found[:, :, 3:].double(), true).max() < 0.5  # 8 bits a colour


def sphere(fine):
    """Depth of a sphere before a wall, its true normals, and how far inside its outline it is."""
    camera = Camera(200.0 * fine, 220.0 * fine, 40.3 * fine, 29.6 * fine)
    h, w = 60 * fine, 80 * fine
    x = (torch.arange(w).double() + 0.5 - camera.cx) / camera.fx
    y = (torch.arange(h).double()[:, None] + 0.5 - camera.cy) / camera.fy
    ray = torch.stack([x.expand(h, w), y.expand(h, w), torch.ones(h, w).double()])
    centre, radius = torch.tensor([0.1, -0.05, 3.0]).double(), 0.4
    b = (ray * centre[:, None, None]).sum(0)
    square = (ray * ray).sum(0)
    root = b * b - square * (centre.dot(centre) - radius**2)
    depth = torch.where(root > 0, (b - root.clamp(min=0).sqrt()) / square, 6.0)
    true = (ray * depth - centre[:, None, None]) / radius
    return camera, depth, torch.stack([true[0], -true[1], -true[2]]), root / root.max()


def test_a_sphere_and_depth_that_jumps():
    errors = []
    for fine in (1, 4):
        camera, depth, true, within = sphere(fine)
        found = normals_of(depth, camera, window=5, tolerance=0.02).double()
        error = angle(found, true)[within > 0.25]
        errors.append((error.mean(), error.max()))
        beside = within <= 0  # next to the sphere, the wall is as flat as anywhere
        wall = torch.tensor([0, 0, 1.0]).double()[:, None, None]
        assert angle(found, wall)[beside].max() < 1e-4
    assert errors[1][0] < 0.3 * errors[0][0]  # a finer sphere is flatter within the square
    assert errors[1][0] < 0.1
    assert errors[1][1] < 1


def test_what_is_unknown_has_no_normal():
    depth = torch.zeros(8, 8)
    depth[3, 3] = 1.0
    assert normals_of(depth, CAMERA).abs().max() == 0  # one point makes no plane
    depth[3] = 1.0
    assert normals_of(depth, CAMERA).abs().max() == 0  # nor do points in a line
    depth[3:6] = 1.0
    found = normals_of(depth, CAMERA)
    assert found[:, :3].abs().max() == 0
    assert found[2, 3:6].min() > 0.999


def test_axes_are_any_signed_permutation():
    torch.manual_seed(0)
    for axes in (torch.eye(3), torch.tensor([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]])):
        given = torch.nn.functional.normalize(torch.randn(50, 3), dim=1)
        wanted = given @ axes.T + 0.2 * torch.randn(50, 3)
        assert torch.equal(axes_between(given, wanted), axes)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_pickle_that_runs_something_is_refused(tmp_path, capsys):
    with gzip.open(tmp_path / "evil.pklz", "wb") as file:
        pickle.dump({"all_normals": Evil()}, file)
    with pytest.raises(ValueError, match=r"evil.pklz is no gzipped pickle of arrays.*print"):
        unpickled(tmp_path / "evil.pklz")
    assert capsys.readouterr().out == ""


def test_messages_name_the_file_and_where_to_get_it(tmp_path):
    root = tmp_path / "nyu"
    with pytest.raises(ValueError, match=r"nyu_depth_v2_labeled.mat is not there.*http"):
        NYUv2()(root, 0)
    write_nyuv2(root, (4, 2))
    with pytest.raises(ValueError, match=r"all_normals.pklz is not there: get it from https"):
        NYUv2()(root, 0)
    (root / "splits.mat").unlink()
    with pytest.raises(ValueError, match=r"splits.mat is not there.*http"):
        NYUv2(normals="depth")(root, 0)
    savemat(root / "splits.mat", {"trainNdxs": [[1, 2]], "testNdxs": [[7]]})
    with pytest.raises(ValueError, match=r"testNdxs of .* numbers from 1 to 6"):
        NYUv2(normals="depth")(root, 0)
    (root / "nyu_depth_v2_labeled.mat").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="no Matlab 7"):
        NYUv2(normals="depth")(root, 0)
    for settings in ({"normals": "guess"}, {"window": 4}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match=f"data.layout.{next(iter(settings))}"):
            NYUv2(**settings)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_damaged_unpacked_images_are_unpacked_again(tmp_path, keep):
    root = tmp_path / "nyu"
    write_nyuv2(root, (3, 2))
    first = NYUv2(normals="none")(root, 0)["train"]
    before = torch.stack([first.image(i) for i in range(3)])
    (file,) = root.glob("images-train-*.npy")
    content = file.read_bytes()
    file.write_bytes(content[:keep] if keep else bytes(len(content)))
    split = NYUv2(normals="none")(root, 0)["train"]
    assert torch.equal(torch.stack([split.image(i) for i in range(3)]), before)
    assert file.read_bytes() == content
