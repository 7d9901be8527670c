"""The layout of Pascal VOC, on a tiny tree written in it, and the square that it is cut to."""

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.data.images import Images
from unlabeled.data.squash import Squash
from unlabeled.data.voc import CLASSES, VOC, parse, read_objects
from unlabeled.draws import Draws
from unlabeled.truth import Annotated, moved

CAT, DOG, PERSON = (CLASSES.index(name) for name in ("cat", "dog", "person"))
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def thing(name, box=(1, 1, 8, 6), difficult=0, more=""):
    hard = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{hard}{more}{BOX.format(*box)}</object>"


def write(root, year="2007", lists=True, **sets):
    """A set's images with their objects: name -> {image: [objects]}."""
    folder = root / f"VOC{year}"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, images in sets.items():
        (folder / f"ImageSets/Main/{name}.txt").write_text("".join(f"{i}\n" for i in images))
        for i, things in images.items():
            Image.new("RGB", (10, 6), (int(i), 0, 0)).save(folder / f"JPEGImages/{i}.jpg")
            text = f"<annotation><filename>{i}.jpg</filename>{''.join(things)}</annotation>"
            (folder / f"Annotations/{i}.xml").write_text(text)
        if lists:
            for c, kind in enumerate(CLASSES):
                lines = [
                    f"{i} {read_objects(folder / f'Annotations/{i}.xml').presence()[c]:2d}\n"
                    for i in images
                ]
                (folder / f"ImageSets/Main/{kind}_{name}.txt").write_text("".join(lines))
    return root


TRAIN = {
    "000005": [thing("cat", (3, 2, 10, 6)), thing("dog", difficult=1), thing("dog", (2, 2, 2, 2))],
    "000007": [thing("dog", difficult=1), thing("person", difficult=None)],
    "000009": [],
}
TEST = {"000001": [thing("cat")], "000002": [thing("person")]}


@pytest.fixture
def root(tmp_path):
    return write(tmp_path, trainval=TRAIN, test=TEST)


def module(root, **kwargs):
    layout = VOC(**kwargs)
    square = Squash(size=8)
    return Images(root=str(root), layout=layout, decode=square, eval_decode=square, tier="folder")


@pytest.mark.parametrize("lists", [True, False])
def test_reads_what_images_show(tmp_path, lists):
    data = module(write(tmp_path, lists=lists, trainval=TRAIN, test=TEST))
    data.setup("test")
    assert (data.size("train"), data.size("test")) == (3, 2)
    assert data.labels("train") is None
    assert data.classes == list(CLASSES)
    assert isinstance(data, Annotated)
    assert data.kinds("train") == {"presence", "boxes", "box_labels", "difficult"}
    presence = data.annotation("train", "presence").stacked()
    expected = torch.full((3, 20), -1)
    expected[0, [CAT, DOG]] = 1  # a difficult dog and one that is not
    expected[1, DOG], expected[1, PERSON] = 0, 1
    assert presence.equal(expected)


def test_boxes_are_where_the_first_pixel_begins_and_the_last_ends(root):
    data = module(root)
    assert data.annotation("train", "boxes")[0].tolist() == [
        [2, 1, 10, 6],
        [0, 0, 8, 6],
        [1, 1, 2, 2],  # one pixel
    ]
    assert data.annotation("train", "box_labels")[0].tolist() == [CAT, DOG, DOG]
    assert data.annotation("train", "difficult")[0].tolist() == [False, True, False]
    assert data.annotation("train", "boxes")[2].shape == (0, 4)
    assert data.annotation("train", "difficult")[2].dtype == torch.bool
    data.annotation("train", "boxes")[0][:] = 0  # a copy: the next one is whole again
    assert data.annotation("train", "boxes")[0].sum() > 0
    image = data.image("train", 0)
    assert image.shape == (3, 6, 10)
    box = moved("boxes", data.annotation("train", "boxes")[0], Squash(size=8).window(6, 10))
    torch.testing.assert_close(box[0], torch.tensor([2 * 0.8, 1 * 8 / 6, 8, 8]))


def test_presence_is_what_the_lists_say(root):
    """They win over the objects: the official ones were checked by hand."""
    path = root / "VOC2007/ImageSets/Main/cat_trainval.txt"
    path.write_text("000009  0\n000007  1\n000005 -1\n000011  1\n")
    data = module(root)
    assert data.annotation("train", "presence").stacked()[:, CAT].tolist() == [-1, 1, 0]


def test_years_are_put_together(root):
    write(root, "2012", trainval={"2008_000002": [thing("dog")]})
    data = module(root, train=["2007/trainval", "2012/trainval"])
    data.setup("test")
    assert data.size("train") == 4
    assert data.annotation("train", "presence")[3][DOG] == 1
    assert data.annotation("train", "boxes")[3].tolist() == [[0, 0, 8, 6]]
    batch = next(iter(data.scan("train")))
    assert batch["crops"][0].shape == (4, 3, 8, 8)


def refused(path, content, says):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as error:
        read_objects(path)
    assert str(path) in str(error.value)


BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'
REACH = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (BOMB, "document type"),
        (BOMB.encode("utf-16"), "document type"),
        (REACH, "document type"),
        ('<!DOCTYPE a SYSTEM "http://x/y.dtd"><annotation/>', "document type"),
        ("<annotation>" + " " * (1 << 20) + "</annotation>", "1048576 bytes"),
        ("<a>" * 9 + "</a>" * 9, "deep"),
        ("<annotation>", "no element found"),
        ("", "no element found"),
        (f"<annotation>{thing('cats')}</annotation>", "'cats'"),
        (f"<annotation>{thing('cat', (5, 1, 4, 6))}</annotation>", "bndbox of a cat"),
        (f"<annotation>{thing('cat', ('nan', 1, 4, 6))}</annotation>", "bndbox of a cat"),
        (f"<annotation>{thing('cat', ('x', 1, 4, 6))}</annotation>", "could not convert"),
        ("<annotation><object><name>cat</name></object></annotation>", "bndbox of a cat"),
        (f"<annotation>{thing('cat', difficult=2)}</annotation>", "`difficult` of a cat is '2'"),
    ],
)
def test_other_annotations_are_refused(tmp_path, content, says):
    refused(tmp_path / "x.xml", content, says)


def test_parts_of_an_object_are_no_objects(tmp_path):
    """VOC 2012 gives people's heads, with boxes and names of their own."""
    part = f"<part><name>head</name>{BOX.format(1, 1, 2, 2)}</part>"
    path = tmp_path / "x.xml"
    path.write_text(f"<annotation>{thing('person', ('1.5', 2, 5, 6), more=part)}</annotation>")
    found = read_objects(path)
    assert found.boxes.tolist() == [[0.5, 1, 5, 6]]
    assert found.labels.tolist() == [PERSON]
    assert parse(path).tag == "annotation"


def test_what_is_missing_is_named(root, tmp_path):
    def says(text, **kwargs):
        with pytest.raises(ValueError, match=text):
            module(root, **kwargs).setup("test")

    missing = r"VOC2012/ImageSets/Main/trainval.txt is not there: .*VOCdevkit.*voc2012/"
    says(missing, train=["2012/trainval"])
    main = root / "VOC2007/ImageSets/Main"
    cat = main / "cat_trainval.txt"
    cat.write_text("000005 2\n")
    says(r"cat_trainval.txt, line 1: expected .*'000005 2'")
    cat.write_text("000005 1\n")
    says(r"cat_trainval.txt does not say whether 000007")
    cat.unlink()
    (root / "VOC2007/Annotations/000007.xml").unlink()
    says("000007.xml")
    (root / "VOC2007/Annotations/000005.xml").unlink()
    says(r"neither .*cat_trainval.txt nor .*000005.xml")
    (root / "VOC2007/JPEGImages/000005.jpg").unlink()
    says(r"not there: .*000005.jpg; get it from http")
    for content, text in (
        ("../../x\n", "'../../x'"),
        ("", "no image"),
        ("000005\n000005\n", "1 of its images again"),
    ):
        (main / "trainval.txt").write_text(content)
        says(text)


@pytest.mark.parametrize("sets", [{"train": ["trainval"]}, {"train": []}, {"test": ["../x"]}])
def test_wrong_sets_are_refused(sets):
    with pytest.raises(ValueError, match=r"2007/trainval"):
        VOC(**sets)


def test_squash_keeps_everything():
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[:, 40:] = 200  # the right half
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    (crop,) = Squash(size=16)(image)
    assert crop.shape == (3, 16, 16)
    assert crop[:, :, :7].max() == 0
    assert crop[:, :, 9:].min() == 200
    for resize in (None, 24):
        square = Squash(size=16, resize=resize)
        (one,), (many,) = square(image), square.batched(image[None], Draws("x"))
        assert (one.int() - many[0].int()).abs().max() <= 2  # rounding
    (same,) = Squash(size=40)(image[:, :, :40])
    assert same.equal(torch.zeros(3, 40, 40, dtype=torch.uint8))
    assert (
        repr(Squash(size=16, resize=24)) == "Squash(size=16, resize=24, interpolation='bilinear')"
    )
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Squash(size=0)
    with pytest.raises(ValueError, match="'cubic'"):
        Squash(size=4, interpolation="cubic")
