"""A codebook of directions, and normals as its words and as colours."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.draws import seed_of, subset
from unlabeled.evaluate.contract import Progress
from unlabeled.parts.clustering import kmeans
from unlabeled.truth import UNKNOWN, Annotation

IMAGES = 500  # that the codebook is made of
SAMPLES = 200  # pixels of each of them
TOGETHER = 32  # images read at once
KNOWN = 0.5  # length from which a normal is one: where it is unknown it is 0


class Words(NamedTuple):
    """Directions, and the training images in their terms."""

    centres: Tensor  # (W, 3) float32 of length 1
    mean: Tensor  # (3,) the mean direction: what says nothing about an image
    maps: list[Tensor]  # (h, w) uint8 of every image


def codebook(
    normals: Annotation,
    rows: Tensor,
    words: int,
    seed: int,
    progress: Progress,
    device: torch.device,
) -> Words:
    """Spherical k-means over pixels of up to 500 images, and the word of every known pixel.

    Args:
        normals: of the training images.
        rows: positions of the images that are used.
        words: W.
        seed: of pixels and k-means.
        progress: told images done.
        device: that processes talk over.

    Raises:
        ValueError: fewer known pixels than words.
    """
    picked = subset(None, len(rows), min(IMAGES, len(rows)), seed, "images")
    samples = []
    for place, normal in _read(normals, rows[picked]):
        known = normal.flatten(1).T
        known = known[known.norm(dim=1) > KNOWN]
        generator = torch.Generator().manual_seed(seed_of(seed, "pixels", place))
        samples.append(known[torch.randperm(len(known), generator=generator)[:SAMPLES]])
    pixels = F.normalize(torch.cat(samples), dim=1)
    if len(pixels) < words:
        raise ValueError(
            f"{len(pixels)} pixels of the training images have a known normal, too few for "
            f"words={words}"
        )
    centres = kmeans(pixels.to(device), words, seed=seed, spherical=True).centroids.cpu()
    centres = F.normalize(centres, dim=1)
    maps = []
    for place, normal in _read(normals, rows):
        maps.append(quantised(normal, centres))
        if (place + 1) % 100 == 0 or place + 1 == len(rows):
            progress("words", place + 1, len(rows))
    return Words(centres, F.normalize(pixels.mean(0), dim=0), maps)


def quantised(normal: Tensor, centres: Tensor) -> Tensor:
    """The nearest word (h, w) uint8 of every pixel of normals (3, h, w); 255 where unknown."""
    product = torch.einsum("dhw,kd->khw", normal.float(), centres)
    word = product.argmax(0).to(torch.uint8)
    return word.masked_fill(normal.norm(dim=0) <= KNOWN, UNKNOWN)


def coloured(normal: Tensor) -> np.ndarray:
    """Normals (3, h, w) as a picture (h, w, 3) uint8: (n + 1) / 2, grey where unknown."""
    picture = (normal.double().clamp(-1, 1) + 1) * 127.5
    return picture.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def _read(normals: Annotation, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(place, normals) of every image, read some at a time."""
    at = 0
    for part in rows.split(TOGETHER):
        for normal in normals.several(part.tolist()):
            yield at, normal
            at += 1
