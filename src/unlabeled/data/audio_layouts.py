"""How sets of sounds lie on the disk: folders, ESC-50."""

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from unlabeled.data.media_files import Media, media
from unlabeled.data.sound_files import SOUNDS
from unlabeled.data.splits import Split
from unlabeled.data.tree import read_tree
from unlabeled.data.video_layouts import divided, listed, long_enough, said

TABLE = "meta/esc50.csv"
COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file")


class AudioFolder:
    """Any folder of sound files; folders are splits and classes as in `Folder`.

    Args:
        test_share: without a folder for it, the share of every class set aside as the test set.
        split_seed: fixes that choice; no function of the run's seed: see `Folder`.
        labels: whether folders may be classes.
        shortest: leave out sounds shorter than so many seconds.
    """

    def __init__(
        self,
        *,
        test_share: float = 0.1,
        split_seed: int = 0,
        labels: bool = True,
        shortest: float = 0.0,
    ) -> None:
        if not 0 <= test_share < 1:
            raise ValueError(f"data.layout.test_share must be in [0, 1), got {test_share}")
        self.test_share, self.split_seed, self.labels = test_share, split_seed, labels
        self.shortest = long_enough(shortest)

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        files = read_tree(root, kind=SOUNDS)
        if not self.labels:
            files = {side: replace(x, labels=None, classes=()) for side, x in files.items()}
        splits = media(files, pictured=False, shortest=self.shortest)
        return divided(splits, self.test_share, self.split_seed)


class ESC50:
    """ESC-50 with its official folds. Piczak, ACM Multimedia 2015, https://github.com/karolpiczak/ESC-50.

    2000 sounds of five seconds, `audio/*.wav`, and `meta/esc50.csv` (filename, fold, target,
    category, esc10, src_file, take), below the root or a folder ESC-50-master. Sounds that were cut
    from one source (`src_file`) are in one fold, and stay together when settings are chosen.

    Args:
        fold: 1 to 5, to test on; the others train. Published numbers are means over the five.
        esc10: only the ten classes of ESC-10.
        shortest: leave out sounds shorter than so many seconds.
    """

    def __init__(self, *, fold: int = 1, esc10: bool = False, shortest: float = 0.0) -> None:
        if fold not in range(1, 6):
            raise ValueError(f"data.layout.fold must be 1, 2, 3, 4 or 5, got {fold}")
        self.fold, self.esc10, self.shortest = fold, esc10, long_enough(shortest)

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        inside = root / "ESC-50-master"
        root = inside if (inside / TABLE).is_file() else root
        rows = _table(root)
        if self.esc10:
            rows = [row for row in rows if row["esc10"].lower() == "true"]
        kinds = _classes(rows, root)
        source = {f"audio/{row['filename']}": row["src_file"] for row in rows}
        each: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        for row in rows:
            side = "test" if int(row["fold"]) == self.fold else "train"
            each[side].append((f"audio/{row['filename']}", row["category"]))
        if not all(each.values()):
            raise ValueError(
                f"{root / TABLE}: fold {self.fold} leaves nothing to train or to test on"
            )
        first = each["train"][0][0]
        if not (root / first).is_file():
            raise ValueError(f"the first sound of {root / TABLE} is not there: {root / first}")
        files = {side: listed(root, paths, kinds, SOUNDS) for side, paths in each.items()}
        options = {"pictured": False, "shortest": self.shortest}
        found = media(files, group=source.__getitem__, **options)
        _apart(found, source)
        return {**found}


def _table(root: Path) -> list[dict[str, str]]:
    """The rows of meta/esc50.csv. Raises ValueError if they are not as they should be."""
    reader = csv.DictReader(said(root, TABLE, "https://github.com/karolpiczak/ESC-50").splitlines())
    if missing := set(COLUMNS) - set(reader.fieldnames or ()):
        raise ValueError(f"{root / TABLE} has no column {sorted(missing)}: see data=esc50")
    rows = []
    for number, row in enumerate(reader, 2):
        known = {column: row[column] or "" for column in COLUMNS}
        if not (known["fold"].isdigit() and known["target"].isdigit() and all(known.values())):
            raise ValueError(
                f"{root / TABLE}, line {number}: every column needs a value, and fold and target "
                f"whole numbers, got {known}"
            )
        rows.append(known)
    return rows


def _classes(rows: list[dict[str, str]], root: Path) -> list[str]:
    """Names of the classes in the order of their numbers."""
    pairs = sorted({(int(row["target"]), row["category"]) for row in rows})
    names = [name for _, name in pairs]
    if len({number for number, _ in pairs}) < len(pairs) or len(set(names)) < len(pairs):
        raise ValueError(f"{root / TABLE}: a target has two categories, or a category two targets")
    return names


def _apart(splits: Mapping[str, Media], source: Mapping[str, str]) -> None:
    """Raises ValueError if a source has sounds on both sides."""
    a, b = ({source[split.name(i)] for i in range(len(split))} for split in splits.values())
    if both := sorted(a & b):
        raise ValueError(f"{len(both)} src_file are in two folds, the first {both[0]}")
