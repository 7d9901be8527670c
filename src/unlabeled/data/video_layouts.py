"""How sets of recordings lie on the disk: folders, UCF101, HMDB51."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from unlabeled.data.files import Kind, index
from unlabeled.data.media_files import RECORDINGS, Media, media
from unlabeled.data.splits import Files, Split, parted
from unlabeled.data.tree import read_tree

# v_<class>_g<group>_c<clip>, and <source>_<class>_<body>_<camera>_<people>_<view>_<quality>_<clip>
UCF101_NAME = re.compile(r"^(v_.+_g\d+)_c\d+$")
HMDB51_NAME = re.compile(r"^(.+)_[a-z]_[a-z]{2}_np\d+_[a-z]{2}_[a-z]{3,4}_\d+$")

UCF101_AT = "https://www.crcv.ucf.edu/data/UCF101.php"
HMDB51_AT = "https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database"


class VideoFolder:
    """Any folder of recordings; folders are splits and classes as in `Folder`.

    Args:
        test_share: without a folder for it, the share of every class set aside as the test set.
        split_seed: fixes that choice; no function of the run's seed: see `Folder`.
        labels: whether folders may be classes.
        sound: leave out recordings without a track of sound.
        shortest: leave out recordings shorter than so many seconds.
        group: a regular expression for what recordings of one video share of their path below the
            root, without its ending: what its first bracket matches, or the whole of it. They stay
            together when data are divided, and none is a negative of another. Others stand alone.
    """

    def __init__(
        self,
        *,
        test_share: float = 0.1,
        split_seed: int = 0,
        labels: bool = True,
        sound: bool = False,
        shortest: float = 0.0,
        group: str | None = None,
    ) -> None:
        if not 0 <= test_share < 1:
            raise ValueError(f"data.layout.test_share must be in [0, 1), got {test_share}")
        self.test_share, self.split_seed, self.labels = test_share, split_seed, labels
        self.sound, self.shortest = sound, long_enough(shortest)
        self.group = None if group is None else named(group)

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        files = read_tree(root, kind=RECORDINGS)
        if not self.labels:
            files = {side: replace(x, labels=None, classes=()) for side, x in files.items()}
        options = {"sound": self.sound, "shortest": self.shortest}
        splits = media(files, group=self.group, **options)
        return divided(splits, self.test_share, self.split_seed)


def divided(splits: Mapping[str, Media], test_share: float, split_seed: int) -> dict[str, Split]:
    """The splits there are; without one to test on, a share of every class for that."""
    if "test" in splits or not test_share:
        return {**splits}
    everything = splits["train"]
    rest, test = parted(everything, test_share, split_seed)
    return {"train": everything.take(rest), "test": everything.take(test)}


class UCF101:
    """UCF101 with its official lists. Soomro et al., 2012, https://arxiv.org/abs/1212.0402.

    `UCF-101/<class>/v_<class>_g<group>_c<clip>.avi`, and `ucfTrainTestlist/trainlist01.txt` and so
    on. Clips of a group are cut from one video: no list has one group on both sides, and no group
    is divided when settings are chosen.

    Args:
        fold: 1, 2 or 3; published numbers are means over the three.
        shortest: leave out clips shorter than so many seconds, which published numbers have.
    """

    def __init__(self, *, fold: int = 1, shortest: float = 0.0) -> None:
        self.fold, self.shortest = one_of_three(fold), long_enough(shortest)

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        rows = {}
        for side in ("train", "test"):
            text = said(root, f"ucfTrainTestlist/{side}list{self.fold:02d}.txt", UCF101_AT)
            names = [line.split()[0] for line in text.splitlines() if line.strip()]
            rows[side] = [(name, name.partition("/")[0]) for name in names]
        found = official(root, rows, ("UCF-101", "."), grouped(UCF101_NAME), self.shortest)
        apart(found["train"], found["test"])
        return {**found}


class HMDB51:
    """HMDB51 with its official lists. Kuehne et al., ICCV 2011.

    `<class>/<name>.avi`, below the root or a folder hmdb51_org or videos, and
    `testTrainMulti_7030_splits/<class>_test_split<fold>.txt`, whose lines say 1 (training), 2
    (test) or 0 (neither). Clips of one source stay together when settings are chosen.

    Args:
        fold: 1, 2 or 3; published numbers are means over the three.
        shortest: leave out clips shorter than so many seconds, which published numbers have.
    """

    def __init__(self, *, fold: int = 1, shortest: float = 0.0) -> None:
        self.fold, self.shortest = one_of_three(fold), long_enough(shortest)

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        ending = f"_test_split{self.fold}.txt"
        lists = sorted((root / "testTrainMulti_7030_splits").glob(f"*{ending}"))
        if not lists:
            raise ValueError(
                f"{root} has no testTrainMulti_7030_splits/*{ending}: point data.root at the "
                f"folder that holds HMDB51's classes and its lists, or get them from {HMDB51_AT}"
            )
        rows: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        for path in lists:
            kind = path.name.removesuffix(ending)
            for number, line in enumerate(path.read_text().splitlines(), 1):
                name, _, which = line.strip().rpartition(" ")
                if which not in ("0", "1", "2"):
                    raise ValueError(f"{path}, line {number}: not a name and 0, 1 or 2: {line!r}")
                if which != "0":
                    rows["train" if which == "1" else "test"].append((f"{kind}/{name}", kind))
        return {
            **official(
                root, rows, (".", "hmdb51_org", "videos"), grouped(HMDB51_NAME), self.shortest
            )
        }


def official(
    root: Path,
    rows: Mapping[str, Sequence[tuple[str, str]]],
    folders: Sequence[str],
    group: Callable[[str], str],
    shortest: float,
) -> dict[str, Media]:
    """Splits of recordings that lists name.

    A recording that is not there counts as unreadable.

    Args:
        root: of the data set.
        rows: by split, path and class of each.
        folders: below the root, one of which paths start from.
        group: from a path to the name of its group.
        shortest: see `UCF101`.

    Raises:
        ValueError: a list is empty, or the first recording is in none of the folders.
    """
    if not all(rows.values()):
        raise ValueError(f"{root}: a list of recordings is empty")
    first = rows["train"][0][0]
    folder = next((f for f in folders if (root / f / first).is_file()), None)
    if folder is None:
        places = " or ".join(str(root / f / first) for f in folders)
        raise ValueError(f"the first recording of the list is not there: {places}")
    start = "" if folder == "." else f"{folder}/"
    classes = sorted({kind for side in rows.values() for _, kind in side})
    files = {
        side: listed(root, [(start + path, kind) for path, kind in each], classes)
        for side, each in rows.items()
    }
    return media(files, group=group, shortest=shortest)


def listed(
    root: Path, rows: Sequence[tuple[str, str]], classes: Sequence[str], kind: Kind = RECORDINGS
) -> Files:
    """Files with the names of their classes; those that are not there have the size 0."""
    listing = index(root, kind)
    sizes = dict(zip(listing.paths.tolist(), listing.sizes.tolist(), strict=True))
    paths = [path.encode("utf-8", "surrogateescape") for path, _ in rows]
    number = {name: i for i, name in enumerate(classes)}
    return Files(
        root,
        np.array(paths, dtype=np.bytes_),
        np.array([sizes.get(path, 0) for path in paths], dtype=np.int64),
        torch.tensor([number[name] for _, name in rows]),
        tuple(classes),
    )


def grouped(pattern: re.Pattern[str]) -> Callable[[str], str]:
    """From a path to the name of its group; a path of another form is a group of its own."""

    def group(path: str) -> str:
        found = pattern.match(Path(path).stem)
        return found.group(1) if found else path

    return group


def named(pattern: str) -> Callable[[str], str]:
    """As `grouped`, of a pattern that is looked for in whole paths without their ending."""
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(
            f"data.layout.group is no regular expression ({error}): {pattern!r}"
        ) from error

    def group(path: str) -> str:
        found = search(str(Path(path).with_suffix("")))
        if not found:
            return path
        return next((x for x in found.groups() if x is not None), found.group())

    return group


def apart(train: Media, test: Media) -> None:
    """Raises ValueError if a group has recordings in both."""
    group = grouped(UCF101_NAME)
    a, b = ({group(split.name(i)) for i in range(len(split))} for split in (train, test))
    if both := sorted(a & b):
        raise ValueError(f"{len(both)} groups are in both lists, the first {both[0]}")


def said(root: Path, name: str, source: str) -> str:
    """The text of a list. Raises ValueError, with where it can be had, if it cannot be read."""
    try:
        return (root / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot read the list of recordings {root / name} ({reason}): point data.root at the "
            f"folder that holds it, or get it from {source}"
        ) from error


def one_of_three(fold: int) -> int:
    """The number of an official split."""
    if fold not in (1, 2, 3):
        raise ValueError(f"data.layout.fold must be 1, 2 or 3, got {fold}")
    return fold


def long_enough(shortest: float) -> float:
    """A least length in seconds."""
    if shortest < 0:
        raise ValueError(f"data.layout.shortest must not be negative, got {shortest}")
    return shortest
