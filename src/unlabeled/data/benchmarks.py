"""Official layouts of the data sets that features are transferred to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unlabeled.data.files import index
from unlabeled.data.layouts import CIFAR10, Folder
from unlabeled.data.splits import Array, Files, Split, divide

IMAGENET = "https://image-net.org/download-images.php (ImageNet-21k, fall 2011 or winter 2021)"


class CIFAR100(CIFAR10):
    """CIFAR-100 (fine labels) as its official pickles or as {train,test}/<class>/ images."""

    title, archive = "CIFAR-100", "cifar-100-python.tar.gz"

    @property
    def pickles(self) -> Any:
        from torchvision.datasets import CIFAR100 as Pickles

        return Pickles


class STL10:
    """STL-10's binary files: 5 000 labelled training images, 8 000 test images, 100 000 without.

    Coates, Ng and Lee, 2011; https://cs.stanford.edu/~acoates/stl10. The images stay on the
    disk until they are read (memory-mapped).

    Args:
        train: "unlabeled" to pretrain, "train" to evaluate.
        fold: 0 to 9: one of the official folds of 1 000 labelled images; None: all 5 000.
    """

    def __init__(
        self, *, train: Literal["unlabeled", "train"] = "unlabeled", fold: int | None = None
    ) -> None:
        if train not in ("unlabeled", "train"):
            raise ValueError(f"data.layout.train must be unlabeled or train, got {train!r}")
        if fold is not None and (train != "train" or not 0 <= fold < 10):
            raise ValueError(f"data.layout.fold is 0 to 9 of data.layout.train=train, got {fold}")
        self.train, self.fold = train, fold

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        folder = root / "stl10_binary"
        names = [f"{self.train}_X.bin", "test_X.bin", "test_y.bin", "class_names.txt"]
        names += ["train_y.bin"] if self.train == "train" else []
        names += ["fold_indices.txt"] if self.fold is not None else []
        _needed(folder, names, "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz")
        classes = tuple((folder / "class_names.txt").read_text().split())
        train = Array(_binary(folder / f"{self.train}_X.bin"), None, ())
        if self.train == "train":
            train = Array(train.pixels, _labels(folder / "train_y.bin"), classes)
        if self.fold is not None:
            lines = (folder / "fold_indices.txt").read_text().splitlines()
            train = train.take(torch.tensor([int(i) for i in lines[self.fold].split()]))
        test = Array(_binary(folder / "test_X.bin"), _labels(folder / "test_y.bin"), classes)
        return {"train": train, "test": test}


class Places205:
    """Places205: images under a folder, listed with their labels in CSV files.

    Zhou et al., 2014; http://places.csail.mit.edu. Lines are `path label`, as in
    trainvalsplit_places205.tar.gz.

    Args:
        images: the folder that the listed paths start from.
        lists: the folder of train_places205.csv and val_places205.csv.
    """

    def __init__(
        self,
        *,
        images: str = "images256",
        lists: str = "trainvalsplit_places205",
    ) -> None:
        self.images, self.lists = images, lists

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        files = {"train": "train_places205.csv", "test": "val_places205.csv"}
        where = "http://places.csail.mit.edu/downloadData.html"
        _needed(root / self.lists, files.values(), where)
        found = {side: _pairs(root / self.lists / name) for side, name in files.items()}
        classes: dict[int, str] = {}
        for paths, labels in found.values():
            for path, label in zip(paths, labels, strict=True):
                classes.setdefault(label, str(Path(path).parent))
        names = tuple(classes.get(i, f"class {i}") for i in range(max(classes) + 1))
        return {
            side: _files(root / self.images, paths, labels, names, where)
            for side, (paths, labels) in found.items()
        }


class INaturalist:
    """iNaturalist's competition of a year: a JSON file of images and categories for each split.

    Van Horn et al., 2018; https://github.com/visipedia/inat_comp.

    Args:
        year: of train{year}.json and val{year}.json, beside the folder that they name.
    """

    def __init__(self, *, year: int = 2018) -> None:
        self.year = year

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        files = {"train": f"train{self.year}.json", "test": f"val{self.year}.json"}
        where = f"https://github.com/visipedia/inat_comp/tree/master/{self.year}"
        _needed(root, files.values(), where)
        splits: dict[str, Split] = {}
        for side, name in files.items():
            path = root / name
            try:
                data = json.loads(path.read_bytes())
                category = {a["image_id"]: a["category_id"] for a in data["annotations"]}
                kinds = sorted(data["categories"], key=lambda kind: kind["id"])
                order = {kind["id"]: i for i, kind in enumerate(kinds)}
                classes = tuple(str(kind["name"]) for kind in kinds)
                images = sorted(data["images"], key=lambda image: image["file_name"])
                paths = [image["file_name"] for image in images]
                labels = [order[category[image["id"]]] for image in images]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is not the file of the competition (images, annotations and "
                    f"categories): {type(error).__name__} {error}; get it from {where}"
                ) from error
            splits[side] = _files(root, paths, labels, classes, where)
        return splits


class Wnids:
    """One folder of images per ImageNet synset under the root: ImageNet-22k, or a part of it.

    Args:
        wnids: a text file of synsets, one a line, relative to the root: only these are read
            (ImageNet-9k); None: every folder.
        test_share: the share of every class set aside as the test set.
        split_seed: fixes that choice.
    """

    def __init__(
        self, *, wnids: str | None = None, test_share: float = 0.02, split_seed: int = 0
    ) -> None:
        self.wnids = wnids
        self.folder = Folder(test_share=test_share, split_seed=split_seed)

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        if not root.is_dir() or not any(child.is_dir() for child in root.iterdir()):
            raise ValueError(
                f"{root} has no folders of images that synsets name, as n01440764: point data.root "
                f"at the folder that holds them, or get them from {IMAGENET}"
            )
        if self.wnids is None:
            return self.folder(root, seed)
        if not (root / self.wnids).is_file():
            raise ValueError(
                f"{root} has no file {self.wnids}: write one of the synsets that you want, one a "
                f"line; they are listed at {IMAGENET}"
            )
        names = sorted({line.strip() for line in (root / self.wnids).read_text().splitlines()})
        names = [name for name in names if name]
        found = index(root)
        tops = np.array([path.partition(b"/")[0] for path in found.paths.tolist()])
        wanted = np.array(names, dtype=np.bytes_)
        if missing := sorted(set(wanted.tolist()) - set(tops.tolist())):
            first = ", ".join(name.decode() for name in missing[:3])
            raise ValueError(
                f"{len(missing)} of the {len(names)} synsets in {root / self.wnids} have no "
                f"folder of images under {root}: {first}"
            )
        rows = np.flatnonzero(np.isin(tops, wanted))
        labels = torch.from_numpy(np.searchsorted(wanted, tops[rows]))
        split = Files(root, found.paths[rows], found.sizes[rows], labels, tuple(names))
        if not self.folder.test_share:
            return {"train": split}
        rest, test = divide(labels, len(split), self.folder.test_share, self.folder.split_seed)
        return {"train": split.take(rest), "test": split.take(test)}


def _needed(folder: Path, names: Any, where: str) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has no file {missing[0]}: point data.root at the folder that holds it, or "
            f"get it from {where}"
        )


def _binary(path: Path) -> torch.Tensor:
    """Images (N, 3, 96, 96) uint8 of a file that stores their columns first."""
    size = path.stat().st_size
    if size == 0 or size % (3 * 96 * 96):
        raise ValueError(f"{path} has {size} bytes, no multiple of an image's 3 * 96 * 96")
    pixels = np.memmap(path, np.uint8, mode="c").reshape(-1, 3, 96, 96)
    return torch.from_numpy(pixels).transpose(2, 3)


def _labels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, np.uint8).astype(np.int64) - 1)  # from 1 there


def _pairs(path: Path) -> tuple[list[str], list[int]]:
    """The lines `path label` of a file."""
    paths, labels = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, _, label = line.strip().replace(",", " ").rpartition(" ")
        if not line.strip():
            continue
        if not name or not label.isdecimal():
            raise ValueError(f"{path}, line {number}: expected `path label`, got {line[:60]!r}")
        paths.append(name.strip())
        labels.append(int(label))
    if not paths:
        raise ValueError(f"{path} names no image")
    return paths, labels


def _files(
    root: Path, paths: Sequence[str], labels: Sequence[int], classes: tuple[str, ...], where: str
) -> Files:
    if not (root / paths[0]).is_file():
        raise ValueError(
            f"the first image that is listed is not there: {root / paths[0]}; point data.root at "
            f"the folder that holds {root.name}, or get the images from {where}"
        )
    return Files(
        root,
        np.array([path.encode() for path in paths], dtype=np.bytes_),
        np.zeros(len(paths), dtype=np.int64),
        torch.tensor(labels),
        classes,
    )
