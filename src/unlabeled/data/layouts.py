"""How data sets lie on the disk: each layout reads a root and gives its splits."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.idx import find_idx, read_idx
from unlabeled.data.splits import Array, Files, Split, divide, parted
from unlabeled.data.tree import read_tree


class Layout(Protocol):
    """Reads a root: {"train": split} and, where there is one, {"test": split}."""

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        """Raises ValueError if the root does not hold what it should."""
        ...


class Folder:
    """Any folder of images.

    Sub-folders of the root named train or training, and val, valid, validation or test, are
    splits and never classes (of several, the first of test, val, valid, validation
    that has classes where training has them is the test set). Inside a split (or
    the root), the first folder of a path is its class, if there are at least two such folders
    and no image lies beside them; otherwise there are no labels.

    Args:
        test_share: without a folder for it, the share of every class set aside as the test set.
        split_seed: fixes that choice. It is no function of the run's seed, so that a run with
            another seed never tests on images an earlier run has trained on.
        labels: whether folders may be classes; false for images that are merely stored in many.
    """

    def __init__(
        self, *, test_share: float = 0.1, split_seed: int = 0, labels: bool = True
    ) -> None:
        if not 0 <= test_share < 1:
            raise ValueError(f"test_share must be in [0, 1), got {test_share}")
        self.test_share, self.split_seed, self.labels = test_share, split_seed, labels

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        splits = read_tree(root)
        if not self.labels:
            splits = {side: replace(x, labels=None, classes=()) for side, x in splits.items()}
        if "test" in splits or not self.test_share:
            return {**splits}
        everything = splits["train"]
        rest, test = divide(everything.labels, len(everything), self.test_share, self.split_seed)
        return {"train": everything.take(rest), "test": everything.take(test)}


class List:
    """Images that a text file names, one path a line, relative to the root; no labels.

    Only the first is looked up on the disk; later a file that is not there counts as unreadable.

    Args:
        train: the file for the training images, itself relative to the root.
        test: one for test images, or None.
    """

    def __init__(self, *, train: str, test: str | None = None) -> None:
        self.files = {"train": train} | ({} if test is None else {"test": test})

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        return {side: _listed(root, root / name) for side, name in self.files.items()}


class HeldOut:
    """Training images of a layout alone, some of which stand for its test images.

    Settings are chosen on these, so that test images stay unseen until all is chosen.

    Args:
        layout: reads the root; its test images are left out.
        share: of the training images, of every class, that stand for test images.
        split_seed: fixes which. It is no function of the run's seed: see `Folder`.
    """

    def __init__(self, *, layout: Layout, share: float = 0.2, split_seed: int = 0) -> None:
        if not 0 < share < 1:
            raise ValueError(f"data.layout.share must be in (0, 1), got {share}")
        self.layout, self.share, self.split_seed = layout, share, split_seed

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        train = self.layout(root, seed)["train"]
        rest, held_out = parted(train, self.share, self.split_seed, "held out")
        return {"train": train.take(rest), "test": train.take(held_out)}


class ImageNet:
    """torchvision's layout: train/<wnid>/ and val/<wnid>/.

    Args:
        title: what the data set is called, for messages.
        source: where it can be had.
    """

    def __init__(
        self,
        *,
        title: str = "ImageNet",
        source: str = "https://image-net.org/download.php (ILSVRC2012)",
    ) -> None:
        self.title, self.source = title, source

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        for side in ("train", "val"):
            if not (root / side).is_dir():
                raise ValueError(
                    f"{root} has no folder {side}: {self.title} needs train/<wnid>/ and "
                    "val/<wnid>/; point data.root at the folder that holds both, or get it from "
                    f"{self.source}"
                )
        splits = read_tree(root, tests=["val"])
        if any(split.labels is None for split in splits.values()) or "test" not in splits:
            raise ValueError(
                f"{root}: train and val must hold one folder of images for every wnid "
                "(torchvision.datasets.ImageNet sorts the official archives like this)"
            )
        return {**splits}


class CIFAR10:
    """CIFAR-10 as its official pickles or as {train,test}/<class>/ images.

    Args:
        download: fetch the pickles if the root holds neither.
    """

    title, archive = "CIFAR-10", "cifar-10-python.tar.gz"

    def __init__(self, *, download: bool = True) -> None:
        self.download = download

    @property
    def pickles(self) -> Any:
        """torchvision's class that reads them."""
        from torchvision.datasets import CIFAR10 as Pickles

        return Pickles

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        Pickles = self.pickles
        if (root / "train").is_dir() and (root / "test").is_dir():
            return Folder()(root, seed)
        here = (root / Pickles.base_folder).is_dir()
        try:
            sides = {
                side: Pickles(root, train=side == "train", download=self.download and not here)
                for side in ("train", "test")
            }
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"no {self.title} under {root}: neither {Pickles.base_folder}, complete, nor "
                f"{{train,test}}/<class>/ ({_reason(self.download and not here, error)}); get "
                f"{self.archive} from https://www.cs.toronto.edu/~kriz/cifar.html"
            ) from error
        return {
            side: _array(data.data.transpose(0, 3, 1, 2), data.targets, data.classes)
            for side, data in sides.items()
        }


class FashionMNIST:
    """Fashion-MNIST's idx files: torchvision's folder, the root, or the Debian package's.

    Args:
        download: fetch the files if none of these places holds them.
    """

    def __init__(self, *, download: bool = True) -> None:
        self.download = download

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        from torchvision.datasets import FashionMNIST as Downloads

        folder = find_idx(root)
        if folder is None:
            try:
                if not self.download:
                    raise OSError("nothing found")
                Downloads(str(root), download=True)
                folder = root / "FashionMNIST/raw"
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"no Fashion-MNIST under {root}: no train-images-idx3-ubyte, packed or not "
                    f"({_reason(self.download, error)}); get it from "
                    "https://github.com/zalandoresearch/fashion-mnist; on Debian, "
                    "`apt install dataset-fashion-mnist` provides it"
                ) from error
        return {
            side: _array(*read_idx(folder, name), Downloads.classes)
            for side, name in (("train", "train"), ("test", "t10k"))
        }


class Embedded:
    """The subset of Fashion-MNIST that comes with this package; the root is not read."""

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        packed = resources.files("unlabeled.data") / "embedded" / "fashion_mnist.npz"
        with packed.open("rb") as file, np.load(file, allow_pickle=False) as data:
            classes = data["classes"].tolist()
            return {
                side: _array(data[f"{side}_images"], data[f"{side}_labels"], classes)
                for side in ("train", "test")
            }


def _array(pixels: np.ndarray, labels: Sequence[int] | np.ndarray, classes: Sequence[str]) -> Array:
    """Images (N, H, W) or (N, 3, H, W) with their labels."""
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    images = images.unsqueeze(1).expand(-1, 3, -1, -1) if images.ndim == 3 else images
    y: Tensor = torch.from_numpy(np.asarray(labels).astype(np.int64))
    return Array(images, y, tuple(classes))


def _listed(root: Path, file: Path) -> Files:
    """The images that a text file names."""
    try:
        lines = (line.strip() for line in file.read_bytes().splitlines())
    except OSError as error:
        raise ValueError(f"cannot read the list of images {file}: {error}") from error
    paths = np.array([line for line in lines if line], dtype=np.bytes_)
    if not len(paths):
        raise ValueError(f"{file} names no image: it needs one path a line")
    images = Files(root, paths, np.zeros(len(paths), dtype=np.int64), None, ())
    if twice := len(paths) - len(np.unique(paths)):
        raise ValueError(f"{file} names {twice} of its {len(paths)} images again")
    if not (root / images.name(0)).is_file():
        raise ValueError(
            f"the first image that {file} names is not there: {root / images.name(0)}; "
            "point data.root at the folder that its paths start from"
        )
    return images


def _reason(tried: bool, error: Exception) -> str:
    return f"downloading it failed: {error}" if tried else f"not downloaded: {error}"
