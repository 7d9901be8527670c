"""The data module of recordings: clips, pictures and sound, by the layout that lists them."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unlabeled.batch import Batch
from unlabeled.data.clip_decode import ClipDecode, Picture
from unlabeled.data.decode import Decode
from unlabeled.data.images import Images, Side
from unlabeled.data.lasting import Lasting
from unlabeled.data.layouts import Layout
from unlabeled.data.rgb import UnreadableError
from unlabeled.data.store import Store
from unlabeled.data.tracks import WithTracks
from unlabeled.spectrogram import LogSpectrogram


class Recordings(Images):
    """Recordings and, where the layout knows them, labels.

    What a batch has besides `index`, `label` and, where it is known from which video each recording
    was cut, `group` is what the decode gives: `crops`, one (B, T, 3,
    S, S) for each clip or (B, 3, S, S) for each picture; `frames` (B, T); `audio` (B, samples).
    Recordings of sound alone give no `crops`.

    Args:
        root: the folder of the data set.
        layout: reads the root, into splits of recordings.
        decode: random clips for training; one of images takes a random picture of each recording.
        eval_decode: fixed clips for evaluations; one of images takes the picture in the middle.
        batch_size: recordings of one forward over all processes.
        limit: use only so many training recordings, balanced over classes, fixed by the seed.
        workers: processes that decode; None: one per core, at most 8.
        val_share: share of the training recordings set aside for choosing hyper-parameters.
        max_unreadable: share of a split's recordings that may be unreadable before a run stops.
        seed: of order, clips, limit and val_share.
        tracks: the folder of an index of tracks, which scripts/mine_tracks.py writes, for decodes
            that cut patches from them.
    """

    def __init__(
        self,
        *,
        root: str,
        layout: Layout,
        decode: ClipDecode | Decode,
        eval_decode: ClipDecode | Decode,
        batch_size: int = 256,
        limit: int | None = None,
        workers: int | None = None,
        val_share: float = 0.1,
        max_unreadable: float = 0.01,
        seed: int = 0,
        tracks: str | None = None,
    ) -> None:
        if tracks is None and getattr(decode, "tracked", False):
            raise ValueError(
                "this decode cuts patches that were tracked: set data.tracks to the folder that "
                "scripts/mine_tracks.py wrote for these recordings"
            )
        given: tuple[Any, Any] = decode, eval_decode
        cut = [
            _of_recordings(each, random=random)
            for each, random in zip(given, (True, False), strict=True)
        ]
        whole = layout if tracks is None else WithTracks(layout, tracks)
        super().__init__(
            root=root,
            layout=Lasting(whole, getattr(cut[0], "least", 1)),
            decode=cut[0],
            eval_decode=cut[1],
            batch_size=batch_size,
            limit=limit,
            workers=workers,
            tier="folder",
            val_share=val_share,
            max_unreadable=max_unreadable,
            seed=seed,
        )
        self.gives, self.layout = frozenset({"index"}) | cut[0].gives, layout

    def cut(
        self, split: Side, parts: Sequence[Sequence[int]], decode: Any, *key: int | str
    ) -> Iterator[Batch]:
        """As of `Images`; a decode of images takes a picture at a random time of each recording."""
        return super().cut(split, parts, _of_recordings(decode, random=True), *key)

    def fold(self, number: int) -> "Recordings":
        """The same data module over another of its data set's official splits.

        Raises:
            ValueError: the layout has none.
        """
        if not hasattr(self.layout, "fold"):
            raise ValueError(f"{type(self.layout).__name__} has no official splits to choose from")
        other, layout = copy.copy(self), copy.copy(self.layout)
        layout.fold = number  # type: ignore[attr-defined]
        other.layout, other._store, other._passes = layout, None, 0
        other._open = partial(self._open.func, self.root, layout, **self._open.keywords)
        return other

    def sources(self, split: Side) -> int:
        """How many videos a split's recordings were cut from, as far as that is known."""
        groups = getattr(self._read().split(split), "groups", None)
        return self.size(split) if groups is None else len(groups.unique())

    def sounding(self, split: Side) -> bool:
        """Whether any of a split's recordings has sound."""
        here: Any = self._read().split(split)
        for i in range(len(here)):
            with suppress(UnreadableError):
                if here.recording(i).sounding:
                    return True
        return False

    def thumbnail(self, split: Side, position: int) -> Tensor:
        """A picture (3, h, w) uint8 of what evaluations see, the middle one of a clip.

        Of sound alone, its log-spectrogram, low tones at the bottom, 100 dB from black to white.
        """
        if not _pictured(self._read().split(split)):
            (batch,) = self.scan(split, position, position + 1)
            return _drawn(batch["audio"])  # type: ignore[typeddict-item]
        crop = super().thumbnail(split, position)
        return crop[len(crop) // 2] if crop.ndim == 4 else crop

    def _read(self) -> Store:
        if self._store is None and not _pictured(super()._read().split("train")):
            self.gives -= {"crops", "frames"}
        return super()._read()


def _pictured(split: Any) -> bool:
    return getattr(split, "pictured", True)


def _drawn(audio: Tensor) -> Tensor:
    """(3, h, w) uint8 of one sound (1, samples)."""
    window = min(512, audio.shape[1])
    spectrogram = LogSpectrogram(window=window, hop=max(1, window // 2), scale=1.0, range=23.03)
    (s,) = spectrogram(audio)
    grey = (s - s.amax() + 23.03) / 23.03 * 255
    return grey.flip(1).round().to(torch.uint8).expand(3, -1, -1)


def _of_recordings(decode: Any, *, random: bool) -> Any:
    return decode if hasattr(decode, "gives") else Picture(decode=decode, random=random)
