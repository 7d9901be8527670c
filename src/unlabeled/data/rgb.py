"""One image file to 8-bit RGB, whatever its mode.

JPEGs go straight to arrays through simplejpeg's libjpeg-turbo, all else through Pillow, and so do
JPEGs that are damaged or have four channels. Both give the same pixels, so a run does not depend on
which of them decoded. A photograph of 500 x 375 takes 0.72 ms so, as through torchcodec (which is
made for one version of torch each) and torchvision.io (which is to be removed), and 1.10 ms through
Pillow. Decoding at a half or a quarter of the size, where crops are large, would save at most a
quarter of the time, of photographs of 1.5 megapixels, and change pixels: `scripts/make_shards.py`
with a largest side saves more. (One core of an AMD EPYC; `scripts/bench.py --only decode`.)
"""

from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from simplejpeg import decode_jpeg
from torch import Tensor

MAX_PIXELS = 1 << 27  # 134 million: more in one file is an attack or a mistake
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
MOST_BYTES = 1 << 28  # of a JPEG that is read as a whole


class UnreadableError(Exception):
    """An image file that cannot be decoded completely.

    Args:
        reason: why.
        hop: how many positions further another image may be readable.
    """

    def __init__(self, reason: str, *, hop: int = 1) -> None:
        super().__init__(reason)
        self.hop = hop


def pixels(path: str | Path | BytesIO) -> Tensor:
    """An image as (3, h, w) uint8, upright (EXIF); of an animation, the first frame.

    Args:
        path: a file, or its bytes.

    Raises:
        UnreadableError: the file is missing, truncated, damaged, no image, or has more than
            `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableError(f"{image.width} x {image.height} pixels")
            found = _jpeg(image)
            return tensor(_read(image)) if found is None else found
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # on damaged files the decoders raise nearly anything
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


def stored(path: Path) -> bytes:
    """The bytes of an image's file. Raises `UnreadableError`."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UnreadableError(f"{type(error).__name__}: {error}") from error
    if len(data) > MOST_BYTES:
        raise UnreadableError(f"a file of more than {MOST_BYTES} bytes")
    return data


def read(path: str | Path | BytesIO) -> Image.Image:
    """The same as an image of Pillow."""
    return pil(pixels(path))


def tensor(image: Image.Image) -> Tensor:
    """(3, h, w) uint8 of an RGB image, with its bytes in their order: a view of (h, w, 3)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pil(image: Tensor) -> Image.Image:
    """An RGB image of (3, h, w) uint8."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _jpeg(image: Image.Image) -> Tensor | None:
    """The pixels of a JPEG of one or three channels; None of anything else, or damaged."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    file = image.fp  # type: ignore[attr-defined]  # of image files
    file.seek(0)
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        return None
    try:
        found = decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None  # Pillow is to say whether it can be read, and why not
    return upright(torch.from_numpy(found).permute(2, 0, 1), orientation(image))


def orientation(image: Image.Image) -> int:
    """How an image is turned, by EXIF: 1 (upright) to 8."""
    with suppress(Exception):  # broken EXIF is common and says nothing about the pixels
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def upright(image: Tensor, turned: int) -> Tensor:
    """An image (3, h, w) upright again that is turned as EXIF says."""
    x = image.transpose(1, 2) if turned in (5, 6, 7, 8) else image
    sides = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(turned)
    return x if sides is None else x.flip(sides)


def _read(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode.

    Transparent pixels show white, as on a page; without that their hidden colours, often noise,
    would come out. 16 bits are scaled to 8 (Pillow alone would clip them).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow widens some of it to 32 bits
        grey = np.asarray(image).clip(0, 65535).astype(np.float32) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # no range is given: values in [0, 1], otherwise in [0, 255]
        grey = np.nan_to_num(np.asarray(image))
        grey = grey * 255 if grey.max() <= 1 else grey
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
