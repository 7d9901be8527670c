"""Layouts of people with key-points: FLIC and MPII Human Pose, from their Matlab files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.matlab import loaded
from unlabeled.data.splits import Files, Split
from unlabeled.draws import shuffled
from unlabeled.truth import Annotation, Kept

FLIC_POINTS = {  # name -> column of `coords`
    **{"lsho": 0, "lelb": 1, "lwri": 2, "rsho": 3, "relb": 4, "rwri": 5, "lhip": 6, "rhip": 9},
    **{"leye": 12, "reye": 13, "nose": 16},
}
MPII_POINTS = (  # by their `id`
    *("rank", "rkne", "rhip", "lhip", "lkne", "lank", "pelvis", "thorax", "neck", "head"),
    *("rwri", "relb", "rsho", "lsho", "lelb", "lwri"),
)
HEAD = 0.6  # of the diagonal of its rectangle: the official code's length of a head
HEIGHT = 200.0  # pixels of a person of scale 1
CORNER = 0.5  # Matlab's first pixel has its centre at 1; here it is at a half


class FLIC:
    """Frames Labeled in Cinema, Sapp and Taskar, 2013.

    Under the root, or in FLIC/: examples.mat, a structure array `examples` with `filepath`,
    `coords` (2, 29; not a number where not given), `torsobox`, `istrain` and `istest`; and
    images/. One person in each image: `boxes` is the torso's, `keypoints` are 11 joints, all
    of them visible where given.
    """

    where = "https://bensapp.github.io/flic-dataset.html"

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        folder = _folder(root, "examples.mat", ("", "FLIC"), self.where)
        path = folder / "examples.mat"
        examples = _list(_field(loaded(path), "examples", path))
        columns = list(FLIC_POINTS.values())
        people: dict[str, list[tuple[str, dict[str, Tensor]]]] = {"train": [], "test": []}
        for number, example in enumerate(examples, 1):
            try:
                side = "train" if example["istrain"] else "test" if example["istest"] else None
                if side is None:
                    continue
                coords = np.asarray(example["coords"], dtype=np.float64)[:2, columns].T - CORNER
                given = np.isfinite(coords).all(1)
                points = np.column_stack([np.nan_to_num(coords), 2.0 * given])
                box = np.asarray(example["torsobox"], dtype=np.float64).ravel()[:4] - CORNER
                name = str(example["filepath"])
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise ValueError(
                    f"{path}: example {number} is none of FLIC ({type(error).__name__} {error}); "
                    f"get the file from {self.where}"
                ) from error
            known = {"keypoints": points[None], "boxes": box[None]}
            people[side].append((f"images/{name}", _tensors(known)))
        return {
            side: _split(folder, some, tuple(FLIC_POINTS), path, self.where)
            for side, some in people.items()
        }


class MPII:
    """MPII Human Pose, Andriluka et al., 2014.

    Under the root: mpii_human_pose_v1_u12_1.mat, here or in mpii_human_pose_v1_u12_2/, whose
    `RELEASE` has `annolist` (image.name, annorect, vididx), `img_train` and `single_person`;
    and images/. Only training images have public annotations: of their videos, a part is held
    out to test on. Of each person there are `keypoints`, `boxes` (200 pixels times their scale,
    about their position) and `lengths` (of the head: 0.6 times its rectangle's diagonal).

    Args:
        test_share: of the training videos.
        split_seed: fixes that choice; no function of the run's seed.
        single: only people who stand apart from others, as `single_person` says.
    """

    where = "http://human-pose.mpi-inf.mpg.de/#download"
    file = "mpii_human_pose_v1_u12_1.mat"

    def __init__(
        self, *, test_share: float = 0.15, split_seed: int = 0, single: bool = True
    ) -> None:
        if not 0 < test_share < 1:
            raise ValueError(f"data.layout.test_share must be in (0, 1), got {test_share}")
        self.test_share, self.split_seed, self.single = test_share, split_seed, single

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        folder = _folder(root, self.file, ("", "mpii_human_pose_v1_u12_2"), self.where)
        path = folder / self.file
        release = _field(loaded(path), "RELEASE", path)
        images = _list(_field(release, "annolist", path))
        trained = np.atleast_1d(_field(release, "img_train", path)).ravel()
        alone = _list(_field(release, "single_person", path))
        if not len(images) == len(trained) == len(alone):
            raise ValueError(
                f"{path}: annolist, img_train and single_person have {len(images)}, "
                f"{len(trained)} and {len(alone)} entries"
            )
        found: list[tuple[str, dict[str, Tensor]]] = []
        videos: list[int] = []
        for i, image in enumerate(images):
            if not trained[i]:
                continue
            try:
                rectangles = _list(image["annorect"])
                chosen = [int(k) - 1 for k in np.atleast_1d(alone[i]).ravel()]
                chosen = chosen if self.single else [*range(len(rectangles))]
                people = [p for k in chosen if (p := _person(rectangles[k])) is not None]
                if people:
                    known = {kind: np.stack([p[kind] for p in people]) for kind in people[0]}
                    found.append((f"images/{image['image']['name']}", _tensors(known)))
                    video = np.atleast_1d(image.get("vididx", [])).ravel()
                    videos.append(int(video[0]) if len(video) else -1 - i)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise ValueError(
                    f"{path}: image {i + 1} is none of MPII ({type(error).__name__} {error}); "
                    f"get the file from {self.where}"
                ) from error
        kinds = sorted(set(videos))
        if len(kinds) < 2:
            raise ValueError(f"{path} has people in {len(kinds)} training videos: 2 are needed")
        count = min(len(kinds) - 1, max(1, round(self.test_share * len(kinds))))
        held = {kinds[k] for k in shuffled(len(kinds), self.split_seed, "videos")[:count].tolist()}
        sides = {"train": [], "test": []}
        for person, video in zip(found, videos, strict=True):
            sides["test" if video in held else "train"].append(person)
        where = folder if (folder / "images").is_dir() else root
        return {
            side: _split(where, some, MPII_POINTS, path, self.where) for side, some in sides.items()
        }


def _person(rectangle: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """What is known about a person, or None where that is too little."""
    scale, place = rectangle.get("scale"), rectangle.get("objpos")
    points = rectangle.get("annopoints")
    joints = _list(points.get("point")) if isinstance(points, Mapping) else []
    size = np.asarray([] if scale is None else scale, dtype=np.float64).ravel()
    if not joints or not isinstance(place, Mapping) or len(size) != 1:
        return None
    made = np.zeros((len(MPII_POINTS), 3))
    for joint in joints:
        said = joint.get("is_visible", 1)
        hidden = np.size(said) == 1 and str(np.ravel(said)[0]) == "0"
        made[int(joint["id"])] = (
            float(joint["x"]) - CORNER,
            float(joint["y"]) - CORNER,
            1.0 if hidden else 2.0,
        )
    x, y = float(place["x"]) - CORNER, float(place["y"]) - CORNER
    half = HEIGHT * float(size[0]) / 2
    head = [float(rectangle[name]) for name in ("x1", "y1", "x2", "y2")]
    return {
        "keypoints": made,
        "boxes": np.array([x - half, y - half, x + half, y + half]),
        "lengths": np.array(HEAD * np.hypot(head[2] - head[0], head[3] - head[1])),
    }


def _folder(root: Path, name: str, places: Sequence[str], where: str) -> Path:
    for place in places:
        if (root / place / name).is_file():
            return root / place
    raise ValueError(
        f"{root / name} is not there: point data.root at the folder that holds it, or get it "
        f"from {where}"
    )


def _field(content: Any, name: str, path: Path) -> Any:
    if not isinstance(content, Mapping) or name not in content:
        raise ValueError(f"{path} holds no {name!r}")
    return content[name]


def _list(values: Any) -> list[Any]:
    """Entries of a structure array, of which scipy simplifies those of one entry or none."""
    if isinstance(values, Mapping):
        return [values]
    if isinstance(values, np.ndarray):
        return list(values)
    return list(values) if isinstance(values, list) else [values]


def _tensors(known: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {kind: torch.from_numpy(np.asarray(x, dtype=np.float32)) for kind, x in known.items()}


def _split(
    folder: Path,
    people: Sequence[tuple[str, dict[str, Tensor]]],
    names: tuple[str, ...],
    path: Path,
    where: str,
) -> Files:
    if not people:
        raise ValueError(f"{path} has no image with key-points for one of its splits")
    first = folder / people[0][0]
    if not first.is_file():
        raise ValueError(
            f"the first image that {path} names is not there: {first}; get the images from {where}"
        )
    known: dict[str, Annotation] = {
        kind: Kept([annotations[kind] for _, annotations in people]) for kind in people[0][1]
    }
    return Files(
        folder,
        np.array([name.encode() for name, _ in people], dtype=np.bytes_),
        np.zeros(len(people), dtype=np.int64),
        None,
        (),
        known,
        {"keypoints": names},
    )
