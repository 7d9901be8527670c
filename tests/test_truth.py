"""Annotations of images: how data modules give them, and what becomes of them in a crop."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from unlabeled.data.decode import Center
from unlabeled.data.images import Images
from unlabeled.data.rgb import pil, tensor
from unlabeled.data.splits import Array, Files
from unlabeled.truth import KINDS, Annotated, Kept, Read, Window, moved


class Fixed:
    """A layout that gives one split."""

    def __init__(self, split):
        self.split = split

    def __call__(self, root, seed):
        return {"train": self.split}


def module(split, root=".", **settings):
    crop = {"decode": Center(size=8), "eval_decode": Center(size=8)}
    return Images(root=str(root), layout=Fixed(split), batch_size=2, **crop, **settings)


def annotated(n=6):
    normals = torch.randn(n, 3, 8, 10)
    boxes = [torch.full((i, 4), float(i)) for i in range(n)]
    return {
        "normals": Kept(normals),
        "boxes": Kept(boxes),
        "factors": Read(n, lambda i: torch.tensor([i, 2.0 * i])),
    }


def test_a_data_module_gives_annotations_of_its_images():
    known = annotated()
    images = torch.randint(0, 256, (6, 3, 8, 10), dtype=torch.uint8)
    names = {"factors": ("a", "b")}
    data = module(Array(images, None, (), annotations=known, names=names))
    assert isinstance(data, Annotated)
    assert data.kinds("train") == {"normals", "boxes", "factors"}
    assert data.names("train", "factors") == ("a", "b")
    assert data.names("train", "keypoints") == ()
    assert data.annotation("train", "factors").stacked([4, 1]).tolist() == [[4, 8], [1, 2]]
    assert data.annotation("train", "normals")[2].equal(known["normals"].values[2])
    assert [len(x) for x in data.annotation("train", "boxes").several([5, 0])] == [5, 0]
    assert data.image("train", 3).equal(images[3])


def test_an_annotation_that_is_missing_is_named_with_those_there_are():
    images = torch.zeros(6, 3, 8, 10, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"no annotation 'masks' .*normals, boxes, factors"):
        module(Array(images, None, (), annotations=annotated())).annotation("train", "masks")
    with pytest.raises(ValueError, match="there are: none"):
        module(Array(images, None, ())).annotation("train", "masks")


@pytest.mark.parametrize("kind", ["array", "files"])
def test_a_limit_keeps_annotations_beside_their_images(tmp_path, kind):
    n = 12
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 8, 8).contiguous()
    labels = torch.arange(n) % 3
    known = {"factors": Kept(torch.arange(n).float()[:, None])}
    if kind == "array":
        split = Array(images, labels, ("x", "y", "z"), annotations=known)
    else:
        for i in range(n):
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02}.png")
        import numpy as np

        paths = np.array([f"{i:02}.png".encode() for i in range(n)])
        sizes = np.zeros(n, dtype=np.int64)
        split = Files(Path(tmp_path), paths, sizes, labels, ("x", "y", "z"), annotations=known)
    data = module(split, tmp_path, limit=5, tier="folder", workers=0)
    factors = data.annotation("train", "factors")
    assert len(factors) == data.size("train") == 5
    shown = [data.image("train", i)[0, 0, 0].item() for i in range(5)]
    assert factors.stacked().flatten().tolist() == shown != [0, 1, 2, 3, 4]


def test_the_window_of_a_crop_is_where_its_pixels_come_from():
    rows, columns = torch.arange(40).view(-1, 1), torch.arange(60).view(1, -1)
    image = torch.stack([rows.expand(40, 60), columns.expand(40, 60), rows * 0 + columns * 0])
    image = image.to(torch.uint8)
    crop = Center(size=10, resize=20)
    window = crop.window(40, 60)
    assert window == Window(10, 20, 20, 20, 10, 10)
    (cut,) = crop(image)
    assert cut[0, :, 0].tolist() == pytest.approx([10.5 + 2 * i for i in range(10)], abs=1)
    assert cut[1, 0].tolist() == pytest.approx([20.5 + 2 * i for i in range(10)], abs=1)
    assert tensor(pil(image)).equal(image)


def test_annotations_move_into_a_crop():
    window = Window(2, 4, 4, 8, 8, 16)  # twice as large
    boxes = torch.tensor([[5.0, 3.0, 7.0, 5.0], [0.0, 0.0, 6.0, 20.0], [0.0, 0.0, 3.0, 1.0]])
    assert moved("boxes", boxes, window).tolist() == [[2, 2, 6, 6], [0, 0, 4, 8], [0, 0, 0, 0]]
    assert moved("boxes", torch.zeros(0, 4), window).shape == (0, 4)
    points = torch.tensor([[[5.0, 3.0, 2.0], [3.9, 3.0, 2.0], [12.0, 3.0, 1.0], [11.9, 5.9, 1.0]]])
    placed = moved("keypoints", points, window)
    assert placed[0, 0].tolist() == [2, 2, 2]
    assert placed[0, :, 2].tolist() == [2, 0, 0, 1]
    masks = torch.arange(48, dtype=torch.uint8).view(6, 8)
    grown = moved("masks", masks, Window(2, 4, 4, 8, 8, 16))
    assert grown.shape == (8, 16)
    assert grown[:2, :2].eq(20).all()
    assert grown[0].tolist() == [20, 20, 21, 21, 22, 22, 23, 23] + [255] * 8  # beyond the image
    halved = moved("normals", torch.arange(96.0).view(3, 4, 8), Window(0, 0, 4, 8, 2, 4))
    assert halved[0].tolist() == [[9, 11, 13, 15], [25, 27, 29, 31]]
    outside = moved("normals", torch.ones(3, 4, 8), Window(-2, 0, 4, 8, 4, 8))
    assert outside[:, :2].eq(0).all()
    assert outside[:, 2:].eq(1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_of_the_whole_image_changes_nothing(kind):
    shapes = {"boxes": (2, 4), "keypoints": (2, 5, 3), "normals": (3, 6, 8)}
    shape = shapes.get(kind, (6, 8) if kind in ("masks", "segmentation") else (2,))
    value = torch.rand(shape) * 5 + 0.5
    assert moved(kind, value, Window(0, 0, 6, 8, 6, 8)).equal(value)


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match=r"must be one of .*normals.*got 'depths'"):
        moved("depths", torch.zeros(1), Window(0, 0, 1, 1, 1, 1))
