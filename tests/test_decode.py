"""Crops are torchvision's, image by image, on the same boxes."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from unlabeled.data.decode import Center, Crops, RandomCrop, Several
from unlabeled.data.resample import TRIES, box, boxes
from unlabeled.draws import Draws

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def noise(b=8, h=32, w=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, 3, h, w), dtype=torch.uint8, generator=generator)


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [7, 20, 32, 48])
@pytest.mark.parametrize(("h", "w"), [(32, 32), (40, 23)])
def test_batched_crops_equal_torchvision(interpolation, size, h, w):
    images = noise(16, h, w)
    decode = Crops(size=size, scale=(0.05, 1.0), interpolation=interpolation)
    draws = Draws(3, "crop", 5, rows=16)
    (crops,) = decode.batched(images, draws)
    assert crops.dtype == torch.uint8
    for image, crop, place in zip(images, crops, decode.boxes(draws.fork(0), h, w), strict=True):
        expected = F.resized_crop(
            image.float(), *place.tolist(), [size, size], MODES[interpolation], antialias=True
        )
        expected = expected.clamp(0, 255)
        # half a grey level of rounding, and what float32 sums in another order
        assert (crop - expected).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("decode", [Crops, RandomCrop, Center])
def test_pillow_and_tensor_paths_agree(decode, interpolation):
    """Within the extra rounding of Pillow, which keeps 8 bits between its two passes.

    (For the same reason it clips there what bicubic overshoots: hence the middle greys.)
    """
    decode = decode(size=24, interpolation=interpolation)
    image = noise(1, 41, 30, seed=1) // 2 + 64
    (alone,) = decode(image[0], 4, 2, 0)
    (batched,) = decode.batched(image, Draws(4, 2, 0))
    assert (alone.float() - batched[0].float()).abs().max() <= 2
    assert (alone.float() - batched[0].float()).abs().mean() < 0.3


def test_chunks_do_not_show(monkeypatch):
    images, decode = noise(50), Crops(size=32)
    (whole,) = decode.batched(images, Draws(0, rows=50))
    monkeypatch.setattr("unlabeled.data.resample.CACHED", 7 * 3 * 32 * 32)
    assert torch.equal(decode.batched(images, Draws(0, rows=50))[0], whole)


def test_grey_images_expanded_give_what_stored_ones_do():
    grey = noise()[:, :1].expand(-1, 3, -1, -1)
    for decode in (Crops(size=20), Center(size=20), Center(size=32)):
        (a,) = decode.batched(grey, Draws(0, rows=8))
        (b,) = decode.batched(grey.contiguous(), Draws(0, rows=8))
        assert torch.equal(a, b)
        assert a.is_contiguous()  # an expanded view would share memory between channels


def test_boxes_have_torchvisions_distribution():
    torch.manual_seed(0)
    image = torch.zeros(3, 60, 40)
    scale, ratio = [0.2, 0.9], [0.75, 4 / 3]
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)]
    ).double()
    ours = boxes(Draws(0, rows=4000).uniform(TRIES, 4), 60, 40, scale, ratio).double()
    for column in range(4):
        levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        a, b = theirs[:, column].quantile(levels), ours[:, column].quantile(levels)
        assert (a - b).abs().max() <= 2, column
    assert (ours[:, 0] + ours[:, 2] <= 60).all()
    assert (ours[:, 1] + ours[:, 3] <= 40).all()
    assert ours[:, 0].min() == 0
    assert (ours[:, 0] + ours[:, 2]).max() == 60  # the last row is reached


@pytest.mark.parametrize(("h", "w"), [(10, 100), (100, 10), (30, 40)])
def test_boxes_fall_back_to_torchvisions_centre(h, w):
    impossible = [1.0, 1.0], [0.7, 0.9]  # the whole area at a ratio the image does not have
    expected = RandomResizedCrop.get_params(torch.zeros(3, h, w), *impossible)
    drawn = boxes(Draws(0, rows=3).uniform(TRIES, 4), h, w, *impossible)
    assert drawn.tolist() == [list(expected)] * 3


def test_the_first_try_that_fits_is_taken():
    u = torch.full((1, TRIES, 4), 0.5)
    u[0, 0] = torch.tensor([0.999, 0.999, 0, 0])  # whole area at ratio 4/3: too wide
    u[0, 1] = torch.tensor([0.0, 0.5, 0.0, 0.999])
    (box,) = boxes(u, 40, 40, (0.25, 1.0), (3 / 4, 4 / 3)).tolist()
    assert box == [0, 20, 20, 20]


@pytest.mark.parametrize(
    ("h", "w", "size", "resize"), [(50, 37, 24, 30), (20, 31, 24, 25), (32, 32, 32, 32)]
)
def test_center_is_torchvisions_resize_and_center_crop(h, w, size, resize):
    image = noise(1, h, w, seed=2)
    decode = Center(size=size, resize=resize)
    expected = F.resize(image[0].float(), [resize], antialias=True)
    expected = F.center_crop(expected, [size, size])
    assert (decode.batched(image, Draws(0))[0][0] - expected).abs().max() <= 0.5 + 1e-3
    expected = F.center_crop(F.resize(pil(image[0]), [resize]), [size, size])
    assert np.array_equal(decode(image[0])[0].permute(1, 2, 0), np.array(expected))


def test_random_crop_reaches_every_corner_and_keeps_pixels():
    image = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).expand(200, 3, 6, 6)
    (crops,) = RandomCrop(size=4, resize=6).batched(image, Draws(0, rows=200))
    assert set(crops[:, 0, 0, 0].tolist()) == {6 * i + j for i in range(3) for j in range(3)}
    for crop in crops:
        assert torch.equal(crop[0] - crop[0, 0, 0], image[0, 0, :4, :4])


@pytest.mark.parametrize("decode", [Crops(size=16, count=2), RandomCrop(size=16, count=2)])
def test_the_key_decides_the_crops(decode):
    image = noise(1, 48, 40)[0]
    a, b = decode(image, 0, 1, 7)
    again, _ = decode(image, 0, 1, 7)
    assert torch.equal(a, again)
    if isinstance(decode, Crops):  # of 40 x 40 whole squares RandomCrop may repeat one
        assert not torch.equal(a, b)
    assert any(not torch.equal(a, decode(image, 0, 2, i)[0]) for i in range(4))


def test_two_processes_draw_the_global_batchs_crops():
    images, decode = noise(8), Crops(size=20, count=2)
    whole = decode.batched(images, Draws(0, "crop", 3, rows=8))
    parts = [
        decode.batched(images[4 * r : 4 * r + 4], Draws(0, "crop", 3, rows=4, rank=r, world=2))
        for r in range(2)
    ]
    for crop, halves in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(crop, torch.cat(halves))


def test_several_joins_and_draws_independently():
    decode = Several(parts={"global": Crops(size=24, count=2), "local": Crops(size=24, count=3)})
    image = noise(1, 40, 40)
    for crops in (decode(image[0], 1, 2), [x[0] for x in decode.batched(image, Draws(1, 2))]):
        assert [tuple(x.shape) for x in crops] == [(3, 24, 24)] * 5
        assert len({x.numpy().tobytes() for x in crops}) == 5


def test_repr_tells_transforms_apart():
    decodes = [
        *(Crops(size=8), Crops(size=9), Crops(size=8, count=2), Crops(size=8, scale=[0.1, 1])),
        *(Crops(size=8, ratio=[1, 1]), Crops(size=8, interpolation="bicubic"), Center(size=8)),
        *(RandomCrop(size=8), Center(size=8, resize=9), Center(size=8, interpolation="bicubic")),
        Several(parts={"a": Center(size=8)}),
    ]
    assert len({repr(decode) for decode in decodes}) == len(decodes)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Crops(size=0), "size"),
        (lambda: Crops(size=8, count=0), "count"),
        (lambda: Crops(size=8, scale=(0.5, 0.1)), "scale"),
        (lambda: Crops(size=8, scale=(0.5, 1.5)), "scale"),
        (lambda: Crops(size=8, ratio=(0.5,)), "ratio"),
        (lambda: Crops(size=8, interpolation="nearest"), "nearest"),  # type: ignore[arg-type]
        (lambda: Center(size=8, resize=7), "resize=7"),
        (lambda: Several(parts={}), "parts"),
    ],
)
def test_wrong_settings_are_named(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_ratio_is_drawn_log_uniformly():
    u = Draws(0, rows=4000).uniform(TRIES, 4)
    box = boxes(u, 1000, 1000, (0.1, 0.3), (0.5, 2.0)).double()
    log = (box[:, 3] / box[:, 2]).log() / math.log(2)
    assert abs(float(log.mean())) < 0.03
    assert abs(float((log < -0.5).double().mean()) - 0.25) < 0.03


def test_crops_are_the_same_on_every_cpu(tmp_path):
    """Resizing counts in whole numbers: with the instructions of any CPU it gives the same."""
    code = (
        "import hashlib, torch; from unlabeled.data.decode import Crops\n"
        "image = torch.randint(0, 256, (3, 90, 110), dtype=torch.uint8,"
        " generator=torch.Generator().manual_seed(0))\n"
        "for way in ('bilinear', 'bicubic'):\n"
        "  for view in (image, image.permute(1, 2, 0).contiguous().permute(2, 0, 1)):\n"
        "    crops = Crops(size=48, count=4, interpolation=way)(view, 0, 1)\n"
        "    print(hashlib.sha256(torch.stack(crops).numpy().tobytes()).hexdigest())\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for capability in ("default", "avx2")
    ]
    assert said[0] == said[1]
    first, *others = said[0].split()
    assert others[0] == first  # nor does it matter how the pixels lie in memory
    assert others[1] == others[2] != first


def test_one_box_is_that_of_a_batch():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 700, (300, 2), generator=generator).tolist()
    for i, (h, w) in enumerate(sizes):
        for scale, ratio in (((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.2, 0.3))):
            u = Draws(i, rows=4).uniform(TRIES, 4)
            many = boxes(u, h, w, scale, ratio).expand(4, 4).tolist()
            assert [list(box(row, h, w, scale, ratio)) for row in u.tolist()] == many
