"""FLIC and MPII: the official Matlab files, written small."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from unlabeled.data.poses import FLIC, FLIC_POINTS, MPII, MPII_POINTS


def picture(path, seed, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_flic(root, counts):
    """examples.mat and images; one example more is of neither split."""
    root.mkdir(parents=True)
    draws = np.random.default_rng(0)
    kinds = [
        ("filepath", "O"),
        ("coords", "O"),
        ("torsobox", "O"),
        ("istrain", "O"),
        ("istest", "O"),
    ]
    examples = np.zeros((1, sum(counts) + 1), dtype=kinds)
    for i in range(sum(counts) + 1):
        coords = np.full((2, 29), np.nan)
        columns = list(FLIC_POINTS.values())
        coords[:, columns] = draws.uniform(5, 35, (2, len(columns)))
        if i == 1:
            coords[:, FLIC_POINTS["reye"]] = np.nan
        train, test = i < counts[0], counts[0] <= i < sum(counts)
        name = f"film-{i:03}.jpg"
        examples[0, i] = (name, coords, np.array([10.0, 8, 30, 33]), train, test)
        picture(root / "images" / name, i)
    savemat(root / "examples.mat", {"examples": examples})
    return examples


def struct(**fields):
    """A structure as Matlab has it."""
    made = np.zeros((1, 1), dtype=[(name, "O") for name in fields])
    for name, value in fields.items():
        made[name][0, 0] = value
    return made


def structs(items):
    made = np.zeros((1, len(items)), dtype=items[0].dtype)
    for i, item in enumerate(items):
        made[0, i] = item[0, 0]
    return made


def person(i, *, joints=16, bare=False):
    points = []
    for k in range(joints):
        seen = [np.zeros((0, 0)), np.array([[0]]), np.array([[1]]), "0"][(i + k) % 4]
        points.append(struct(x=10.0 + k, y=5.0 + k + i, id=k, is_visible=seen))
    head = {"x1": 10.0, "y1": 4.0, "x2": 13.0, "y2": 8.0}
    nothing = np.zeros((0, 0))
    return struct(
        **head,
        annopoints=nothing if bare else struct(point=structs(points)),
        scale=nothing if bare else 0.1,
        objpos=nothing if bare else struct(x=20.0, y=18.0),
    )


def write_mpii(root, count):
    """Training images of one person each, from videos of two; the last is a test image.

    The first has two people of whom `single_person` names the second, the second has one about
    whom little is said and one more, and the third one of six joints.
    """
    root.mkdir(parents=True)
    images, alone = [], np.zeros((count, 1), dtype=object)
    for i in range(count):
        people = [person(i)]
        alone[i, 0] = np.array([[1]])
        if i == 0:
            people, alone[i, 0] = [person(90), person(0)], np.array([[2]])
        if i == 1:
            people, alone[i, 0] = [person(1, bare=True), person(1)], np.array([[1], [2]])
        if i == 2:
            people = [person(2, joints=6)]
        name = f"{i:09}.jpg"
        last = i == count - 1
        rectangles = np.zeros((0, 0)) if last else structs(people)
        images.append(struct(image=struct(name=name), annorect=rectangles, vididx=i // 2 + 1))
        picture(root / "images" / name, i)
    trained = np.ones((1, count), np.uint8)
    trained[0, -1] = 0
    release = struct(annolist=structs(images), img_train=trained, single_person=alone)
    savemat(root / "mpii_human_pose_v1_u12_1.mat", {"RELEASE": release})


def test_flic_is_read_as_it_was_written(tmp_path):
    examples = write_flic(tmp_path / "flic", (5, 3))
    splits = FLIC()(tmp_path / "flic", 0)
    assert {side: len(x) for side, x in splits.items()} == {"train": 5, "test": 3}
    train = splits["train"]
    assert train.names["keypoints"] == tuple(FLIC_POINTS)
    points = train.annotations["keypoints"][1]
    assert points.shape == (1, 11, 3)
    coords = examples[0, 1]["coords"]
    for k, (name, column) in enumerate(FLIC_POINTS.items()):
        if name == "reye":
            assert points[0, k].tolist() == [0, 0, 0]
        else:
            expected = [*(coords[:, column] - 0.5), 2]
            np.testing.assert_allclose(points[0, k].numpy(), expected, rtol=1e-6)
    assert train.annotations["boxes"][0].tolist() == [[9.5, 7.5, 29.5, 32.5]]
    assert splits["test"].name(0) == "images/film-005.jpg"
    assert splits["test"].image(0).shape == (3, 40, 48)


def test_mpii_is_read_as_it_was_written(tmp_path):
    write_mpii(tmp_path / "mpii", 9)
    splits = MPII(test_share=0.25)(tmp_path / "mpii", 0)
    assert {side: len(x) for side, x in splits.items()} == {"train": 6, "test": 2}
    place = {x.name(i): (x, i) for x in splits.values() for i in range(len(x))}
    assert len(place) == 8  # the test image is not among them
    split, i = place["images/000000000.jpg"]
    points = split.annotations["keypoints"][i]
    assert points.shape == (1, 16, 3)  # the one of two that stands alone
    for k in range(16):
        hidden = k % 4 in (1, 3)  # 0, as a number or as text; nothing said is visible
        assert points[0, k].tolist() == [9.5 + k, 4.5 + k, 1 if hidden else 2]
    assert split.annotations["lengths"][i].tolist() == pytest.approx([0.6 * 5])
    torch.testing.assert_close(
        split.annotations["boxes"][i], torch.tensor([[9.5, 7.5, 29.5, 27.5]])
    )
    split, i = place["images/000000001.jpg"]
    assert len(split.annotations["keypoints"][i]) == 1  # nothing is said about the other
    split, i = place["images/000000002.jpg"]
    assert split.annotations["keypoints"][i][0, :, 2].gt(0).tolist() == [True] * 6 + [False] * 10
    assert split.names["keypoints"] == MPII_POINTS
    everybody = MPII(test_share=0.25, single=False)(tmp_path / "mpii", 0)
    place = {x.name(i): (x, i) for x in everybody.values() for i in range(len(x))}
    split, i = place["images/000000000.jpg"]
    assert len(split.annotations["keypoints"][i]) == 2


def test_videos_of_mpii_are_on_one_side_whatever_the_seed_of_a_run(tmp_path):
    write_mpii(tmp_path / "mpii", 21)
    for seed in range(4):
        splits = MPII(split_seed=seed)(tmp_path / "mpii", seed)
        videos = {s: {int(x.name(i)[7:16]) // 2 for i in range(len(x))} for s, x in splits.items()}
        assert all(videos.values())
        assert not videos["train"] & videos["test"]
    first, second = (MPII()(tmp_path / "mpii", seed)["test"].identity() for seed in (0, 1))
    assert first == second


def test_messages_name_the_file_and_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"examples.mat is not there.*https://bensapp"):
        FLIC()(tmp_path, 0)
    with pytest.raises(ValueError, match=r"mpii_human_pose_v1_u12_1.mat is not there.*http"):
        MPII()(tmp_path, 0)
    savemat(tmp_path / "examples.mat", {"something": 1})
    with pytest.raises(ValueError, match="holds no 'examples'"):
        FLIC()(tmp_path, 0)
    savemat(tmp_path / "examples.mat", {"examples": struct(istrain=1, istest=0)})
    with pytest.raises(ValueError, match=r"example 1 is none of FLIC.*coords"):
        FLIC()(tmp_path, 0)
    (tmp_path / "examples.mat").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"examples.mat is no Matlab file"):
        FLIC()(tmp_path, 0)
    write_flic(tmp_path / "flic", (2, 1))
    (tmp_path / "flic/images/film-000.jpg").unlink()
    with pytest.raises(ValueError, match=r"first image .* is not there: .*film-000.jpg"):
        FLIC()(tmp_path / "flic", 0)
    with pytest.raises(ValueError, match=r"data.layout.test_share must be in \(0, 1\), got 0"):
        MPII(test_share=0)
