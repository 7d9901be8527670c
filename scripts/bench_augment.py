"""Views per second per core of SimCLR's augmentation at 32x32: ours and three others.

    python scripts/bench_augment.py

Each way makes views of the same uint8 images, from the random resized crop to the normalised
float batch: crop (area 0.08 to 1), flip 0.5, colour jitter of strength 1 with probability 0.8,
grey 0.2, Gaussian blur 0.5. One thread; the ways take turns, so that a busy machine slows all of
them alike; time is the processor's, spent in this process.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from unlabeled.augment.blur import GaussianBlur
from unlabeled.augment.color import ColorJitter, Grayscale
from unlabeled.augment.geometry import Flip
from unlabeled.augment.views import Views
from unlabeled.batch import normalize
from unlabeled.data.decode import Crops
from unlabeled.draws import Draws

SIDE, SCALE, SIGMA = 32, (0.08, 1.0), (0.1, 2.0)
STRENGTH = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
Way = Callable[[Tensor], Tensor]


def ours() -> Way:
    """This package: whole batches."""
    jitter = ColorJitter(**STRENGTH, p=0.8)
    views = Views([[Flip(p=0.5), jitter, Grayscale(p=0.2), GaussianBlur(p=0.5, sigma=SIGMA)]])
    decode = Crops(size=SIDE, scale=SCALE)
    step = iter(range(1 << 40))

    def way(images: Tensor) -> Tensor:
        draws = Draws(0, "bench", next(step), rows=len(images))
        crops = decode.batched(images, draws.fork("crop"))
        return views({"crops": crops}, draws)["views"][0]

    return way


def torchvision_v2() -> Way:
    """Torchvision's transforms v2 on tensors, image by image."""
    recipe = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=SCALE),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(**STRENGTH)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(3, SIGMA)], 0.5),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return lambda images: _finished(torch.stack([recipe(image) for image in images]))


def pil() -> Way:
    """Torchvision's transforms on PIL images, with PIL's own blur, image by image."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(*SIGMA).item()))

    recipe = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=SCALE),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomApply([transforms.ColorJitter(**STRENGTH)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.Lambda(blur)], 0.5),
            transforms.ToTensor(),
        ]
    )

    def way(images: Tensor) -> Tensor:
        arrays = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        return _finished(torch.stack([recipe(Image.fromarray(array)) for array in arrays]))

    return way


def kornia() -> Way:
    """Kornia: whole batches.

    Raises:
        ImportError: without the package `kornia`.
    """
    import kornia.augmentation as K

    recipe = nn.Sequential(
        K.RandomResizedCrop((SIDE, SIDE), scale=SCALE),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(**STRENGTH, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((3, 3), SIGMA, p=0.5),
    )
    return lambda images: _finished(recipe(images.float() / 255))


def _finished(x: Tensor) -> Tensor:
    return normalize(x).contiguous(memory_format=torch.channels_last)


WAYS = {"ours": ours, "torchvision v2": torchvision_v2, "PIL": pil, "kornia": kornia}


def views_per_second(rounds: int = 7, batch: int = 256) -> list[dict[str, Any]]:
    """One row per way: `views_per_second` (median), `lowest`, `highest`, `ours_is` times faster.

    Args:
        rounds: how often every way has its turn, after one that is not counted.
        batch: images at a time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = _rates(_available(), rounds, batch)
    finally:
        torch.set_num_threads(threads)
    return [
        {
            "way": name,
            "views_per_second": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "ours_is": statistics.median(a / b for a, b in zip(rates["ours"], values, strict=True)),
        }
        for name, values in rates.items()
    ]


def _available() -> dict[str, Way]:
    ways = {}
    for name, build in WAYS.items():
        try:
            ways[name] = build()
        except ImportError as error:
            print(f"without {name}: {error}")
    return ways


def _rates(ways: Mapping[str, Way], rounds: int, batch: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            times = 8 if name == "ours" else 1  # about as long as the others' one
            start = time.process_time()
            for _ in range(times):
                way(images)
            if turn:
                rates[name].append(times * batch / (time.process_time() - start))
    return rates


def main() -> None:
    print(f"{'':16}{'views/s per core':>18}{'spread':>16}{'ours is':>10}")
    for row in views_per_second():
        spread = f"{row['lowest']:.0f}-{row['highest']:.0f}"
        print(f"{row['way']:16}{row['views_per_second']:18.0f}{spread:>16}{row['ours_is']:9.1f}x")


if __name__ == "__main__":
    main()
