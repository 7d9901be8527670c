"""One image file to 8-bit RGB, whatever its mode."""

from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 1 << 27  # 134 million: more in one file is an attack or a mistake
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class UnreadableError(Exception):
    """An image file that cannot be decoded completely."""


def read(path: str | Path) -> Image.Image:
    """The image of a file as 8-bit RGB, upright (EXIF); of an animation, the first frame.

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
