"""What a worker does to a JPEG, decoding and two crops of 224, against other ways.

Photographs are those of `UNLABELED_DATA` (Imagenette, Pascal VOC), where they lie, else noise with
the spectrum of photographs, 500 x 375. One thread; the ways take turns; time is the processor's.
"""

import io
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from bench_rows import Row, per_round
from PIL import Image
from torch import Tensor
from torchvision import transforms

from unlabeled.data.decode import Crops
from unlabeled.data.rgb import pixels

SIDE, IMAGES, BAR = 224, 40, 5.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPS = Crops(size=SIDE, count=2)
Way = Callable[[bytes, int], object]


def photographs(name: str) -> list[bytes]:
    """JPEGs of a data set, or empty."""
    root = Path(os.environ.get("UNLABELED_DATA", "data")) / name
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    return [path.read_bytes() for path in found[:: max(1, len(found) // IMAGES)][:IMAGES]]


def noise(height: int = 375, width: int = 500) -> list[bytes]:
    """Made-up photographs: spectrum, colours and quality give a JPEG the size of Pascal VOC's.

    0.34 bytes for a pixel (VOC 0.31), 5.3 ns to decode one (VOC 5.7) where they were chosen.
    """
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    made = []
    for _ in range(IMAGES):
        phase = np.exp(2j * np.pi * generator.random((4, *frequency.shape)))
        x = np.fft.irfft2(phase / np.maximum(frequency, 1 / width) ** 1.4, (height, width))
        x /= x.std((1, 2), keepdims=True)
        x = x[:1] + 0.3 * x[1:]  # light and a little colour
        x = 128 + 50 * x / x.std()
        file = io.BytesIO()
        array = x.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(array)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def ours(data: bytes, i: int) -> list[Tensor]:
    """Two crops as workers of this package cut them."""
    return CROPS(pixels(io.BytesIO(data)), i)


def pillow(data: bytes, i: int) -> list[Tensor]:
    """Two crops by Pillow and torchvision, as tensors."""
    image, crop = _pil(data), transforms.RandomResizedCrop(SIDE)
    arrays = [np.array(crop(image)) for _ in range(2)]
    return [torch.from_numpy(array).permute(2, 0, 1).contiguous() for array in arrays]


def pipeline() -> Way:
    """Two views of SimCLR's recipe from PIL images, as most implementations make them."""
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([transforms.GaussianBlur(SIDE // 10 | 1, (0.1, 2.0))], 0.5),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def way(data: bytes, i: int) -> list[Tensor]:
        image = _pil(data)
        return [chain(image) for _ in range(2)]

    return way


def decoders() -> tuple[dict[str, Callable[[bytes], object]], dict[str, str]]:
    """Ways to the pixels of a JPEG as an array, and why others are missing."""
    ways: dict[str, Callable[[bytes], object]] = {
        "ours": lambda data: pixels(io.BytesIO(data)),
        "Pillow": lambda data: np.array(_pil(data)),
        "Pillow at half the size": lambda data: np.array(_pil(data, 2)),
        "Pillow at a quarter": lambda data: np.array(_pil(data, 4)),
    }
    absent = {}
    try:
        import simplejpeg

        def scaled(data: bytes, factor: int) -> object:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return simplejpeg.decode_jpeg(
                data, min_height=height // factor, min_width=width // factor, min_factor=factor
            )

        ways["simplejpeg at half the size"] = lambda data: scaled(data, 2)
        ways["simplejpeg at a quarter"] = lambda data: scaled(data, 4)
    except ImportError as error:
        absent["simplejpeg"] = str(error)
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        ways["torchvision.io"] = lambda data: decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
        )
    except ImportError as error:
        absent["torchvision.io"] = str(error)
    try:
        from torchcodec.decoders import decode_jpeg as of_torchcodec

        ways["torchcodec"] = of_torchcodec
    except (ImportError, RuntimeError, OSError) as error:  # as it fails with another torch
        absent["torchcodec"] = str(error).partition("\n")[0]
    return ways, absent


def rows(rounds: int = 7) -> list[Row]:
    """Decoders alone, and with two crops.

    Args:
        rounds: how often every way has its turn, after one that is not counted.
    """
    sets = {name: photographs(name) for name in ("imagenette", "VOCdevkit")}
    sets = {name: found for name, found in sets.items() if found} or {"noise": noise()}
    found = []
    for name, data in sets.items():
        pixel = statistics.mean(np.prod(Image.open(io.BytesIO(each)).size) for each in data)
        note = f"{len(data)} JPEGs of {name}, {pixel / 1e3:.0f} k pixels; median of {rounds} rounds"
        ways, absent = decoders()
        times = _times({k: lambda x, i, d=d: d(x) for k, d in ways.items()}, data, rounds)
        title = f"JPEG to an array, {name}"
        for other in (*ways, *absent):
            if other in absent:
                found.append(Row(f"{title}: {other} / ours", note=f"skipped: {absent[other]}"))
            elif other != "ours":
                found.append(_row(f"{title}: {other} / ours", times, other, note))
        times = _times({"ours": ours, "PIL": pillow, "full": pipeline()}, data, rounds)
        title = f"decoding and two crops of {SIDE}, {name}"
        found.append(_row(f"{title}: by Pillow / ours", times, "PIL", note))
        found.append(_row(f"{title}: the whole recipe by PIL / ours", times, "full", note, BAR))
    return found


def _pil(data: bytes, smaller: int = 1) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    if smaller > 1:
        image.draft("RGB", (image.width // smaller, image.height // smaller))
    return image.convert("RGB")


def _row(
    name: str, times: Mapping[str, list[float]], other: str, note: str, bar: float | None = None
) -> Row:
    ms = {k: f"{statistics.median(v):.2f} ms" for k, v in times.items()}
    ratios = per_round(times[other], times["ours"])
    return Row(name, ratios, bar=bar, ours=ms["ours"], other=ms[other], note=note)


def _times(ways: Mapping[str, Way], data: list[bytes], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of an image in each round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            for i, each in enumerate(data):
                way(each, i)
            if turn:
                times[name].append((time.process_time() - start) / len(data) * 1e3)
    return times
