"""Pictures of what was found in images: boxes with names and scores, maps of classes."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 320  # pixels of a picture
GREY = 235  # beyond an image that is no square


def palette(count: int) -> np.ndarray:
    """Colours (count, 3) uint8 of Pascal VOC's maps: bits of the class, spread over R, G and B."""
    c = np.arange(count)
    colours = np.zeros((count, 3), dtype=np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((c >> (3 * bit + channel)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def hues(count: int) -> np.ndarray:
    """Bright colours (count, 3) uint8, neighbours far apart: lines on a photograph."""
    turn = [colorsys.hsv_to_rgb(0.618034 * i % 1, 0.75, 1.0) for i in range(count)]
    return (255 * np.array(turn).reshape(-1, 3)).astype(np.uint8)


def on_square(image: np.ndarray, *, nearest: bool = False) -> tuple[Image.Image, float, int, int]:
    """An image (h, w, 3) uint8 in the middle of a square; its scale and where it begins."""
    h, w = image.shape[:2]
    scale = SIDE / max(h, w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC
    square = Image.new("RGB", (SIDE, SIDE), (GREY,) * 3)
    left, top = (SIDE - size[0]) // 2, (SIDE - size[1]) // 2
    square.paste(Image.fromarray(image).resize(size, how), (left, top))
    return square, scale, left, top


def with_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], said: Sequence[str]
) -> np.ndarray:
    """A square picture (SIDE, SIDE, 3) uint8 of an image with boxes and what is said of each.

    Args:
        image: (h, w, 3) uint8.
        boxes: (M, 4) in its pixels; the first is drawn last, on top.
        labels: (M,) classes, which colour.
        said: (M,) texts.
    """
    square, scale, left, top = on_square(image)
    colours = hues(max([0, *labels]) + 1)
    draw, font = ImageDraw.Draw(square), ImageFont.load_default(13)
    for box, label, text in reversed([*zip(boxes.tolist(), labels, said, strict=True)]):
        x0, y0, x1, y1 = (v * scale + o for v, o in zip(box, (left, top) * 2, strict=True))
        r, g, b = (int(v) for v in colours[label])
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=(r, g, b), width=2)
        bounds = draw.textbbox((0, 0), text, font=font)
        wide, high = bounds[2] + 4, bounds[3] + 3
        x, y = min(max(0, x0), SIDE - wide), min(max(0, y0), SIDE - high)
        draw.rectangle((x, y, x + wide, y + high), fill=(r, g, b))
        light = 0.3 * r + 0.6 * g + 0.1 * b > 120
        draw.text((x + 2, y), text, fill=(0, 0, 0) if light else (255, 255, 255), font=font)
    return np.asarray(square)


def coloured(classes: np.ndarray, count: int) -> np.ndarray:
    """A square picture of a map (h, w) of classes in VOC's colours; beyond `count`, cream."""
    colours = np.concatenate([palette(count), [[224, 224, 192]]]).astype(np.uint8)
    return np.asarray(on_square(colours[np.minimum(classes, count)], nearest=True)[0])


def picture(image: np.ndarray) -> np.ndarray:
    """A square picture of an image (h, w, 3) uint8."""
    return np.asarray(on_square(image)[0])
