"""Views per second per core of SimCLR's augmentation at 32x32: ours and three others.

Each way makes views of the same uint8 images, from the random resized crop to the normalised
float batch, by the numbers of `conf/augment/simclr.yaml` (jitter of strength 1, blur) or
`simclr_small.yaml` (its CIFAR-10 recipe: strength 0.5, no blur). One thread; the ways take turns,
so that a busy machine slows all of them alike; time is the processor's, spent in this process.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_rows import Row, per_round
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from unlabeled.batch import normalize
from unlabeled.data.decode import Crops
from unlabeled.draws import Draws

CONF = Path(__file__).parents[1] / "conf/augment"
SIDE, SCALE, BATCH = 32, (0.08, 1.0), 256
RECIPES = {"simclr": "SimCLR with blur", "simclr_small": "SimCLR for CIFAR-10"}
COLOURS = ("brightness", "contrast", "saturation", "hue")
Way = Callable[[Tensor], list[Tensor]]


def ours(recipe: Any) -> Way:
    """This package: whole batches."""
    views = instantiate(recipe)
    decode = Crops(size=SIDE, count=recipe.repeat[0], scale=SCALE)
    step = iter(range(1 << 40))

    def way(images: Tensor) -> list[Tensor]:
        draws = Draws(0, "bench", next(step), rows=len(images))
        crops = decode.batched(images, draws.fork("crop"))
        return views({"crops": crops}, draws)["views"]

    return way


def torchvision_v2(recipe: Any) -> Way:
    """Torchvision's transforms v2 on tensors, image by image."""
    ops = recipe.chains.view
    blur = [v2.GaussianBlur(_kernel(SIDE), list(ops.blur.sigma))] if "blur" in ops else []
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=SCALE),
            v2.RandomHorizontalFlip(ops.flip.p),
            v2.RandomApply([v2.ColorJitter(**_strength(ops))], ops.jitter.p),
            v2.RandomGrayscale(ops.grey.p),
            *(v2.RandomApply([op], ops.blur.p) for op in blur),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return lambda images: [_finished(torch.stack([chain(image) for image in images]))]


def pil(recipe: Any) -> Way:
    """Torchvision's transforms on PIL images, with PIL's own blur, image by image."""
    ops = recipe.chains.view

    def blurred(image: Image.Image) -> Image.Image:
        sigma = torch.empty(()).uniform_(*ops.blur.sigma).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))

    blur = [transforms.Lambda(blurred)] if "blur" in ops else []
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=SCALE),
            transforms.RandomHorizontalFlip(ops.flip.p),
            transforms.RandomApply([transforms.ColorJitter(**_strength(ops))], ops.jitter.p),
            transforms.RandomGrayscale(ops.grey.p),
            *(transforms.RandomApply([op], ops.blur.p) for op in blur),
            transforms.ToTensor(),
        ]
    )

    def way(images: Tensor) -> list[Tensor]:
        arrays = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        return [_finished(torch.stack([chain(Image.fromarray(array)) for array in arrays]))]

    return way


def kornia(recipe: Any) -> Way:
    """Kornia: whole batches.

    Raises:
        ImportError: without the package `kornia`.
    """
    import kornia.augmentation as K

    crop = K.RandomResizedCrop((SIDE, SIDE), scale=SCALE)
    chain = nn.Sequential(crop, *kornia_ops(recipe, SIDE))
    return lambda images: [_finished(chain(images.float() / 255))]


def kornia_ops(recipe: Any, side: int) -> list[nn.Module]:
    """Kornia's modules for a recipe's ops on images of `side` pixels, in their order.

    Raises:
        ImportError: without the package `kornia`.
    """
    import kornia.augmentation as K

    ops = recipe.chains.view
    square, sigma = (_kernel(side),) * 2, tuple(ops.blur.sigma) if "blur" in ops else ()
    return [
        K.RandomHorizontalFlip(p=ops.flip.p),
        K.ColorJitter(**_strength(ops), p=ops.jitter.p),
        K.RandomGrayscale(p=ops.grey.p),
        *([K.RandomGaussianBlur(square, sigma, p=ops.blur.p)] if "blur" in ops else []),
    ]


def _strength(ops: Any) -> dict[str, float]:
    return {name: ops.jitter[name] for name in COLOURS}


def _kernel(side: int) -> int:
    return side // 10 | 1  # a tenth of the height, made odd


def _finished(x: Tensor) -> Tensor:
    return normalize(x).contiguous(memory_format=torch.channels_last)


BARS = {"torchvision v2": 12.0, "PIL": 10.0, "kornia": 3.0}
OTHERS = {"torchvision v2": torchvision_v2, "PIL": pil, "kornia": kornia}


def rows(rounds: int = 9) -> list[Row]:
    """Ours against each of the others, for both recipes.

    Args:
        rounds: how often every way has its turn, after one that is not counted.
    """
    found = []
    for file, title in RECIPES.items():
        recipe = OmegaConf.load(CONF / f"{file}.yaml")
        ways, absent = {"ours": ours(recipe)}, {}
        for name, build in OTHERS.items():
            try:
                ways[name] = build(recipe)
            except ImportError as error:
                absent[name] = str(error)
        rates = _rates(ways, rounds)
        note = f"{SIDE}x{SIDE}, batch {BATCH}, one thread; median of {rounds} rounds of CPU time"
        for name in OTHERS:
            title_of_row = f"views/s per core, {title}: batched / {name}"
            if name in absent:
                found.append(Row(title_of_row, note=f"skipped: {absent[name]}"))
                continue
            found.append(
                Row(
                    title_of_row,
                    per_round(rates["ours"], rates[name]),
                    bar=BARS[name],
                    ours=_rate(rates["ours"]),
                    other=_rate(rates[name]),
                    note=note,
                )
            )
    return found


def _rate(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:,.0f}/s"


def _rates(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            times = 4 if name == "ours" else 1  # about as long as the others' one
            start = time.process_time()
            made = sum(len(view) for _ in range(times) for view in way(images))
            if turn:
                rates[name].append(made / (time.process_time() - start))
    return rates
