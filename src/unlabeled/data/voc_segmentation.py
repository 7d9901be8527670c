"""The layout of Pascal VOC's segmentation: images with a class for every pixel."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unlabeled.data.rgb import MAX_PIXELS
from unlabeled.data.splits import Files, Split
from unlabeled.data.voc import CLASSES, ID, MOST_LIST, WHERE
from unlabeled.truth import UNKNOWN, Read


class VOCSegmentation:
    """VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation} and other years.

    Everingham et al., 2010; http://host.robots.ox.ac.uk/pascal/VOC. There are no labels but the
    annotation `segmentation`: the values of the PNGs, which are 0 for the background, 1 to 20
    for the classes and 255 for what no class is known of (objects' edges).

    Args:
        train: sets of training images, each year/set.
        test: sets of test images; none: there is no test split.
        masks: the folder of the PNGs; the 10 582 images of `train_aug` (Hariharan et al., 2011)
            have theirs in SegmentationClassAug.
    """

    def __init__(
        self,
        *,
        train: Sequence[str] = ("2012/train",),
        test: Sequence[str] = ("2012/val",),
        masks: str = "SegmentationClass",
    ) -> None:
        for name, sets in (("train", train), ("test", test)):
            for each in sets:
                if not re.fullmatch(r"\d{4}/[a-z_]+", each):
                    raise ValueError(f"data.layout.{name} lists sets like 2012/train, got {each!r}")
        if not train:
            raise ValueError("data.layout.train is empty: name a set like 2012/train")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", masks):
            raise ValueError(f"data.layout.masks is a folder like SegmentationClass, got {masks!r}")
        self.sets = {"train": tuple(train), "test": tuple(test)}
        self.masks = masks

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        return {side: self._split(root, sets) for side, sets in self.sets.items() if sets}

    def _split(self, root: Path, sets: Sequence[str]) -> Files:
        images: list[bytes] = []
        masks: list[Path] = []
        for each in sets:
            year, _, name = each.partition("/")
            folder, where = root / f"VOC{year}", WHERE.format(year=year)
            ids = _ids(folder / f"ImageSets/Segmentation/{name}.txt", where)
            images += [f"VOC{year}/JPEGImages/{i}.jpg".encode() for i in ids]
            masks += [folder / self.masks / f"{i}.png" for i in ids]
            for first in (root / images[-len(ids)].decode(), masks[-len(ids)]):
                if not first.is_file():
                    raise ValueError(
                        f"the first of {each} is not there: {first}; get it from {where}"
                    )
        return Files(
            root,
            np.array(images, dtype=np.bytes_),
            np.zeros(len(images), dtype=np.int64),
            None,
            CLASSES,
            {"segmentation": Read(len(masks), partial(_mask, masks))},
        )


def _ids(path: Path, where: str) -> list[str]:
    if not path.is_file():
        raise ValueError(
            f"{path} is not there: point data.root at the folder VOCdevkit, or get it from {where}"
        )
    if path.stat().st_size > MOST_LIST:
        raise ValueError(f"{path} has more than {MOST_LIST} bytes: it is no list of VOC images")
    ids = path.read_bytes().split()
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{path} names no image, or one twice")
    for i in ids:
        if not ID.fullmatch(i):
            raise ValueError(f"{path} names {i[:60]!r}, which is no name of a VOC image")
    return [i.decode() for i in ids]


def _mask(paths: Sequence[Path], position: int) -> Tensor:
    path = paths[position]
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L") or image.width * image.height > MAX_PIXELS:
                raise ValueError(f"its mode is {image.mode} and its size {image.size}")
            values = np.array(image)
    except Exception as error:  # on damaged files the decoders raise nearly anything
        raise ValueError(f"{path} is no map of VOC's classes: {error}") from error
    odd = (values > len(CLASSES)) & (values != UNKNOWN)
    if odd.any():
        raise ValueError(
            f"{path} has pixels of class {values[odd][0]}; VOC's are 0 to {len(CLASSES)} "
            f"and {UNKNOWN}"
        )
    return torch.from_numpy(values)
