"""Images that are decoded on the device: workers only read files, nvJPEG does the rest."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg_header
from torch import Tensor

from unlabeled.batch import Batch
from unlabeled.data.decode import Decode
from unlabeled.data.reading import GREY, labelled, stacked
from unlabeled.data.rgb import MAX_PIXELS, UnreadableError, orientation, pixels, upright
from unlabeled.data.sampler import Bad, Key
from unlabeled.data.splits import Split
from unlabeled.data.tasks import by_task, filled

log = logging.getLogger(__name__)
END = b"\xff\xd9"  # of every JPEG that is whole


@runtime_checkable
class Encodes(Protocol):
    """A split that can give its images as they are stored."""

    def encoded(self, i: int) -> bytes:
        """The bytes of an image's file. Raises `UnreadableError`."""
        ...


@dataclass(frozen=True)
class _Picture:
    data: bytes  # a JPEG, or pixels (3, h, w)
    shape: tuple[int, ...]  # of pixels; empty for a JPEG
    turned: int  # by EXIF


class Encoded:
    """The images of a batch, not yet decoded, and the key of each one's crops.

    One tensor holds them all: a shared-memory handle for each would soon be too many. No tensor
    itself, so that it stays on the CPU, where nvJPEG wants what it reads, when batches move.
    """

    def __init__(self, pictures: Sequence[_Picture], keys: Sequence[tuple[int, ...]]) -> None:
        joined = np.frombuffer(b"".join(p.data for p in pictures), dtype=np.uint8)
        self.data = torch.from_numpy(joined.copy())
        self.sizes = [len(p.data) for p in pictures]
        self.shapes, self.turned = [p.shape for p in pictures], [p.turned for p in pictures]
        self.keys = list(keys)

    def __len__(self) -> int:
        return len(self.sizes)

    def images(self, device: torch.device, bad: list[tuple[int, str]]) -> list[Tensor]:
        """(3, h, w) uint8 each, upright, on a device; grey where one cannot be decoded after all.

        Args:
            device: where.
            bad: is extended by (place in the batch, reason) of those.
        """
        parts = self.data.split(self.sizes)
        jpegs = [i for i, shape in enumerate(self.shapes) if not shape]
        found: dict[int, Tensor] = {
            i: parts[i].view(shape).to(device) for i, shape in enumerate(self.shapes) if shape
        }
        try:
            found.update(zip(jpegs, _decoded([parts[i] for i in jpegs], device), strict=True))
        except RuntimeError as error:  # of any of them: what the device cannot read, a CPU may
            log.warning("the device could not decode a batch (%s): it is tried one by one", error)
            for i in jpegs:
                found[i] = self._alone(i, parts[i], device, bad)
        return [upright(found[i], self.turned[i]) for i in range(len(self))]

    def _alone(
        self, i: int, data: Tensor, device: torch.device, bad: list[tuple[int, str]]
    ) -> Tensor:
        try:
            return _decoded([data], device)[0]
        except RuntimeError:
            try:
                image = pixels(BytesIO(data.numpy().tobytes()))
            except UnreadableError as error:
                bad.append((i, str(error)))
                image = GREY
            self.turned[i] = 1  # as `pixels` turns it
            return image.to(device)


class EncodedRows:
    """Keys to images as they are stored, to be decoded and cropped on the device.

    What no JPEG decoder of a GPU reads (other formats, four channels, no end) is decoded by the
    worker. An unreadable image is replaced by the next readable one, see `TrainingRows`, and crops
    are those it gives for the same keys, but for a grey level or two that decoders differ by.
    """

    def __init__(self, split: Split, decode: Decode, seed: int, tries: int) -> None:
        if not isinstance(split, Encodes):
            raise ValueError(
                "data.tier=gpu decodes the files of images, and these images are not in files: "
                "choose data.tier=memory"
            )
        self.split, self.files, self.seed, self.tries = split, split, seed, tries

    def __getitem__(self, keys: Sequence[Key]) -> tuple[Batch | None, Bad]:
        bad: Bad = []
        index, pictures = [], []
        for wanted, _, _ in keys:
            found = self._read(wanted, bad)
            if found is None:
                return None, bad
            index.append(found[0])
            pictures.append(found[1])
        batch = labelled([], torch.tensor(index), self.split)
        batch["step"] = keys[0][2]
        crop_keys = [(self.seed, epoch, wanted) for wanted, epoch, _ in keys]
        batch["crops"] = Encoded(pictures, crop_keys)  # type: ignore[typeddict-item]
        return batch, bad

    def _read(self, wanted: int, bad: Bad) -> tuple[int, _Picture] | None:
        i = wanted
        for _ in range(self.tries):
            try:
                return i, _picture(self.files.encoded(i))
            except UnreadableError as error:
                bad.append((i, str(error)))
                i = (i + error.hop) % len(self.split)
        return None


def cropped(batch: Batch, decode: Decode, device: torch.device) -> tuple[Batch, Bad]:
    """A batch of `EncodedRows` with its crops cut on a device, and what could not be decoded."""
    encoded: Encoded = batch["crops"]  # type: ignore
    places: list[tuple[int, str]] = []
    images = encoded.images(device, places)
    cut = {
        task: stacked([each(x, *key) for x, key in zip(images, encoded.keys, strict=True)])
        for task, each in by_task(decode, batch["step"]).items()
    }
    index = batch["index"]  # waits for the device only where something failed
    return filled(batch, cut), [(int(index[i]), reason) for i, reason in places]


def _picture(data: bytes) -> _Picture:
    if data[:2] == b"\xff\xd8" and data.rstrip(b"\0")[-2:] == END:
        try:
            header = decode_jpeg_header(data)
            height, width, space = int(header[0]), int(header[1]), str(header[2])
        except ValueError:
            height, width, space = 0, 0, ""
        if space in ("YCbCr", "Gray") and 0 < height * width <= MAX_PIXELS:
            turned = orientation(Image.open(BytesIO(data))) if b"Exif" in data[:65536] else 1
            return _Picture(data, (), turned)
    image = pixels(BytesIO(data)).contiguous()
    return _Picture(image.numpy().tobytes(), tuple(image.shape), 1)


def _decoded(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    if not jpegs:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchcodec, its successor, is made for one torch each
        return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)  # type: ignore
