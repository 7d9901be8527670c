"""The layout of Pascal VOC: which classes are in an image, and its objects' boxes."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
import torch
from torch import Tensor

from unlabeled.data.splits import Files, Split
from unlabeled.truth import Annotation, Kept, Read

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
WHERE = "http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/ (VOCtrainval and VOCtest archives)"
ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")  # an image's name: it becomes part of a path
MOST_XML, MOST_LIST = 1 << 20, 1 << 24  # bytes; the largest of the official files have 3e4 and 2e5
DEEPEST = 8  # elements inside one another; the official files have 5


class Objects(NamedTuple):
    """The objects of one image."""

    boxes: Tensor  # (M, 4) float32: left, top, right, bottom
    labels: Tensor  # (M,) int64 into CLASSES
    difficult: Tensor  # (M,) bool

    def presence(self) -> list[int]:
        """For each class 1, 0 (it has difficult objects only) or -1 (none)."""
        found = [-1] * len(CLASSES)
        for label, difficult in zip(self.labels.tolist(), self.difficult.tolist(), strict=True):
            found[label] = max(found[label], 0 if difficult else 1)
        return found


class VOC:
    """Pascal VOC under VOCdevkit: VOC2007/{JPEGImages,Annotations,ImageSets/Main} and so on.

    Everingham et al., 2010; http://host.robots.ox.ac.uk/pascal/VOC. Images have several classes,
    so there are no labels but the annotation `presence`, from ImageSets/Main/<class>_<set>.txt
    or, if any of these is missing, from the objects in Annotations; there are also `boxes`,
    `box_labels` and `difficult`, read when they are asked for. Boxes are those of the files, 1
    less at the left and at the top: there the first pixel is (1, 1) and the last belongs to the
    box.

    Args:
        train: sets of training images, each year/set.
        test: sets of test images; none: there is no test split.
    """

    def __init__(
        self, *, train: Sequence[str] = ("2007/trainval",), test: Sequence[str] = ("2007/test",)
    ) -> None:
        for name, sets in (("train", train), ("test", test)):
            for each in sets:
                if not re.fullmatch(r"\d{4}/[a-z]+", each):
                    raise ValueError(
                        f"data.layout.{name} lists sets like 2007/trainval, got {each!r}"
                    )
        if not train:
            raise ValueError("data.layout.train is empty: name a set like 2007/trainval")
        self.sets: dict[str, Sequence[str]] = {"train": tuple(train), "test": tuple(test)}

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        return {side: _split(root, sets) for side, sets in self.sets.items() if sets}


def _split(root: Path, sets: Sequence[str]) -> Files:
    images: list[bytes] = []
    xml: list[Path] = []
    known: list[np.ndarray] = []
    for each in sets:
        year, _, name = each.partition("/")
        folder, where = root / f"VOC{year}", WHERE.format(year=year)
        main = folder / "ImageSets/Main"
        ids = _ids(main / f"{name}.txt", where)
        first = folder / f"JPEGImages/{ids[0].decode()}.jpg"
        if not first.is_file():
            raise ValueError(
                f"the first image of {main / f'{name}.txt'} is not there: {first}; get it from "
                + where
            )
        images += [b"VOC%s/JPEGImages/%s.jpg" % (year.encode(), i) for i in ids]
        files = [folder / f"Annotations/{i.decode()}.xml" for i in ids]
        xml += files
        lists = [main / f"{kind}_{name}.txt" for kind in CLASSES]
        if all(path.is_file() for path in lists):
            known.append(np.stack([_marks(path, ids) for path in lists], axis=1))
        else:
            missing = next(path for path in lists if not path.is_file())
            if not files[0].is_file():
                raise ValueError(
                    f"there is neither {missing} nor {files[0]}; get them from {where}"
                )
            known.append(np.array([read_objects(path).presence() for path in files]))
    return Files(
        root,
        np.array(images, dtype=np.bytes_),
        np.zeros(len(images), dtype=np.int64),
        None,
        CLASSES,
        _annotations(xml, torch.from_numpy(np.concatenate(known))),
    )


def _annotations(xml: list[Path], presence: Tensor) -> Mapping[str, Annotation]:
    kinds: dict[str, Annotation] = {"presence": Kept(presence)}
    for kind, field in {"boxes": "boxes", "box_labels": "labels", "difficult": "difficult"}.items():
        kinds[kind] = Read(len(xml), partial(_field, xml, field))
    return kinds


def _field(xml: Sequence[Path], field: str, position: int) -> Tensor:
    return getattr(_kept(xml[position]), field).clone()  # whoever gets it may change it


@lru_cache(maxsize=1024)  # boxes, their labels and difficult are asked for in turn
def _kept(path: Path) -> Objects:
    return read_objects(path)


def _lines(path: Path, where: str) -> list[list[bytes]]:
    """The words of every line that has some."""
    if not path.is_file():
        raise ValueError(
            f"{path} is not there: point data.root at the folder VOCdevkit, or get it from {where}"
        )
    if path.stat().st_size > MOST_LIST:
        raise ValueError(f"{path} has more than {MOST_LIST} bytes: it is no list of VOC images")
    return [words for line in path.read_bytes().splitlines() if (words := line.split())]


def _ids(path: Path, where: str) -> list[bytes]:
    """The images of a set."""
    ids = [words[0] for words in _lines(path, where)]
    for i in ids:
        if not ID.fullmatch(i):
            raise ValueError(f"{path} names {i[:60]!r}, which is no name of a VOC image")
    if not ids:
        raise ValueError(f"{path} names no image")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path} names {len(ids) - len(set(ids))} of its images again")
    return ids


def _marks(path: Path, ids: Sequence[bytes]) -> np.ndarray:
    """1, 0 or -1 for each of the images, from lines `image mark`."""
    marks: dict[bytes, int] = {}
    for number, words in enumerate(_lines(path, ""), 1):
        if len(words) != 2 or words[1] not in (b"1", b"0", b"-1"):
            raise ValueError(
                f"{path}, line {number}: expected an image and 1, 0 or -1, "
                f"got {b' '.join(words)[:60]!r}"
            )
        marks[words[0]] = int(words[1])
    if missing := [i for i in ids if i not in marks]:
        raise ValueError(f"{path} does not say whether {missing[0].decode()} shows the class")
    return np.array([marks[i] for i in ids], dtype=np.int64)


def read_objects(path: Path) -> Objects:
    """The objects in an annotation file. Raises ValueError, naming it, for any other content."""
    try:
        root = parse(path)
        found = [_object(item) for item in root.iterfind("object")]
    except OSError as error:
        raise ValueError(f"cannot read the annotation {path}: {error}") from error
    except (ValueError, expat.ExpatError) as error:
        raise ValueError(f"{path} is no annotation of VOC: {error}") from error
    boxes = torch.tensor([box for box, _, _ in found], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, label, _ in found], dtype=torch.int64)
    return Objects(boxes, labels, torch.tensor([d for _, _, d in found], dtype=torch.bool))


def _object(item: Element) -> tuple[list[float], int, bool]:
    name = (item.findtext("name") or "").strip()
    if name not in CLASSES:
        raise ValueError(f"an object is called {name[:60]!r}")
    sides = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = (float(side or "nan") for side in sides)
    left, top = left - 1, top - 1
    if not (-1 <= left < right < 1e6 and -1 <= top < bottom < 1e6):
        raise ValueError(f"the bndbox of a {name} is {[str(side)[:20] for side in sides]}")
    difficult = (item.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"`difficult` of a {name} is {difficult[:60]!r}")
    return [max(left, 0.0), max(top, 0.0), right, bottom], CLASSES.index(name), difficult == "1"


def parse(path: Path) -> Element:
    """The root of an XML file from anywhere: no document type, no entities, bounded in size.

    Raises:
        ValueError: it has one, or is too large or too deep.
        expat.ExpatError: it is no XML.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MOST_XML + 1)
    if len(content) > MOST_XML:
        raise ValueError(f"it has more than {MOST_XML} bytes")
    tree, parser, depth = TreeBuilder(), expat.ParserCreate(), 0

    def refuse(*_: object) -> None:  # before any entity can grow or reach out for a file
        raise ValueError("it declares a document type")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"its elements are nested more than {DEEPEST} deep")
        tree.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        tree.end(name)

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = tree.data
    parser.Parse(content, True)
    return tree.close()
