"""One image file to 8-bit RGB, whatever its mode."""

from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 1 << 27  # 134 million: more in one file is an attack or a mistake
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class UnreadableError(Exception):
    """An image file that cannot be decoded completely.

    Args:
        reason: why.
        hop: how many positions further another image may be readable.
    """

    def __init__(self, reason: str, *, hop: int = 1) -> None:
        super().__init__(reason)
        self.hop = hop


def read(path: str | Path | BytesIO) -> Image.Image:
    """An image as 8-bit RGB, upright (EXIF); of an animation, the first frame.

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
            image.load()
            with suppress(Exception):  # broken EXIF is common and says nothing about the pixels
                ImageOps.exif_transpose(image, in_place=True)
            return rgb(image)
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # on damaged files the decoders raise nearly anything
        raise UnreadableError(f"{type(error).__name__}: {error}") from error


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
