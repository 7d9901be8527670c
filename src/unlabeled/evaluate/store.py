"""Features of frozen backbones: one pass for all that is asked for, kept on disk."""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from unlabeled import dist
from unlabeled.evaluate import feature_file
from unlabeled.evaluate.contract import Data, Progress, Request, Shapes
from unlabeled.evaluate.feature_file import held, together
from unlabeled.evaluate.forward import features_of, shapes_of
from unlabeled.evaluate.forward import images as images
from unlabeled.evaluate.frozen import checksum, frozen, same_everywhere

Dtype = Literal["float32", "float16", "bfloat16"]
Key = tuple[Request, Dtype]
SPLITS = ("train", "test")


class FeatureStore:
    """Features of (backbone, data, split) on disk, memory-mapped when read.

    A pass extracts everything that is asked for and missing; every process extracts a
    contiguous share of the images into files that all of them see. A file has its name only
    once it is whole. Names hold a digest of the backbone's weights and buffers, of the data
    and of the evaluation transform, so another checkpoint or another data set never meets it,
    and several runs may share a folder: what one of them extracts another waits for and takes.
    The memory of a pass does not grow with the number of images.

    Args:
        folder: where the files lie.
        dtype: of the stored features; float16 and bfloat16 take half the space of float32.
        batch_size: images per forward.
    """

    def __init__(self, folder: Path, *, dtype: Dtype = "float32", batch_size: int = 256) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"features are stored as {get_args(Dtype)}, got {dtype!r}")
        self.folder, self.batch_size = Path(folder).expanduser(), batch_size
        self.dtype: Dtype = dtype

    def extract(
        self,
        backbone: nn.Module,
        data: Data,
        split: str,
        requests: Iterable[Request],
        *,
        shapes: Shapes | None = None,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> dict[Request, Tensor]:
        """Features (n, channels, grid, grid) of every request, in the order of `data.scan`.

        Args and errors: see `extract_with`.
        """
        return self.extract_with(
            backbone, data, split, requests, (), shapes=shapes, device=device, progress=progress
        )[0]

    def extract_with(
        self,
        backbone: nn.Module,
        data: Data,
        split: str,
        requests: Iterable[Request],
        exact: Iterable[Request],
        *,
        shapes: Shapes | None = None,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> tuple[dict[Request, Tensor], dict[Request, Tensor]]:
        """Features (n, channels, grid, grid) of `requests`, and those of `exact` in float32.

        Args:
            backbone: moved to `device`; its training flags are left as they were.
            data: the images.
            split: "train" or "test".
            requests: all wanted features; a single pass makes those that are missing.
            exact: those that half the digits would not do for; the same pass makes them.
            shapes: of this backbone on these data, where the caller knows them.
            device: where the backbone runs.
            progress: called after every batch with a text and images done, of how many.

        Raises:
            FloatingPointError: if features are not finite.
            OSError: if the disk has no room for them.
            RuntimeError: if the backbone changed meanwhile.
            ValueError: if a grid is finer than its map, or a file is damaged.
        """
        same_everywhere(backbone.to(device))
        shapes = shapes or shapes_of(backbone, data, device)
        short: dict[Request, Key] = {r: (shapes.resolve(r), self.dtype) for r in requests}
        long: dict[Request, Key] = {r: (shapes.resolve(r), "float32") for r in exact}
        place = self._place(checksum(backbone), data, split)
        keys = sorted({*short.values(), *long.values()})
        paths = {key: place / self._name(*key) for key in keys}
        if _missing(paths, device):
            n, tell = data.size(split), progress or (lambda *_: None)
            with held(place, device, lambda: tell(f"{split} features of another run", 0, n)):
                todo = _missing(paths, device)
                if todo:
                    self._fill(backbone, data, split, todo, shapes, device, tell)
        found = {key: self._read(path, key[1], data, split) for key, path in paths.items()}
        return {r: found[key] for r, key in short.items()}, {r: found[k] for r, k in long.items()}

    def find(self, backbone: nn.Module, data: Data, split: str, request: Request) -> Tensor | None:
        """Features that some pass extracted before, else None; a process may ask alone."""
        device = next((p.device for p in backbone.parameters()), "cpu")
        request = shapes_of(backbone, data, device).resolve(request)
        path = self._place(checksum(backbone), data, split) / self._name(request, self.dtype)
        return self._read(path, self.dtype, data, split) if path.exists() else None

    def kept(self, backbone: nn.Module, sources: Iterable[Data]) -> list[Path]:
        """The folders with features of a backbone on these data, those that are there."""
        weights = checksum(backbone)
        places = [
            self._place(weights, d, split) for d in sources for split in SPLITS if d.has(split)
        ]
        return [place for place in dict.fromkeys(places) if place.exists()]

    def size(self, n: int, requests: Iterable[Request], shapes: Shapes) -> int:
        """Bytes on disk of the features of n images."""
        kept = {shapes.resolve(request) for request in requests}
        return _bytes(n, [(request, self.dtype) for request in kept], shapes)

    def _place(self, weights: str, data: Data, split: str) -> Path:
        key = f"{weights} {data.fingerprint(split)}"
        return self.folder / f"{split}_{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"

    def _name(self, request: Request, dtype: Dtype) -> str:
        pooling = "x".join(map(str, (request.grid, *request.window)))
        return f"{request.stage}_{pooling}_{dtype}.npy"

    def _read(self, path: Path, dtype: Dtype, data: Data, split: str) -> Tensor:
        return feature_file.read(path, dtype, data.size(split))

    def _fill(
        self,
        backbone: nn.Module,
        data: Data,
        split: str,
        todo: Mapping[Key, Path],
        shapes: Shapes,
        device: torch.device | str,
        progress: Progress,
    ) -> None:
        """Makes the files of every request, and gives them their names once all are whole."""
        partial = {key: path.with_name(path.name + ".partial") for key, path in todo.items()}
        first = dist.rank() == 0
        try:
            with together(device), self._room(data.size(split), split, todo, shapes):
                for (request, dtype), path in partial.items() if first else ():
                    shape = (data.size(split), *shapes.of(request))
                    feature_file.reserve(path, dtype, shape)
            with together(device), frozen(backbone):  # all shares written, no backbone changed
                self._write(backbone, data, split, partial, shapes, device, progress)
            if first:
                for key, path in todo.items():
                    partial[key].replace(path)
            dist.barrier()
        except BaseException:  # the room for somebody else; what is killed leaves it to the next
            for path in partial.values() if first else ():
                path.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def _room(self, n: int, split: str, todo: Iterable[Key], shapes: Shapes) -> Iterator[None]:
        """Says what there should have been room for."""
        try:
            yield
        except OSError as error:
            need, free = _bytes(n, todo, shapes), shutil.disk_usage(self.folder).free
            raise OSError(
                f"cannot keep the features of {n} {split} images in {self.folder}: "
                f"{error.strerror or error}. They take {need / 2**30:.3g} GiB as {self.dtype}, "
                f"{free / 2**30:.3g} GiB are free: name another folder with features=DIR, halve "
                "them with feature_dtype=bfloat16, or ask for fewer stages"
            ) from error

    def _write(
        self,
        backbone: nn.Module,
        data: Data,
        split: str,
        paths: Mapping[Key, Path],
        shapes: Shapes,
        device: torch.device | str,
        progress: Progress,
    ) -> None:
        """This process's share of the rows."""
        n = data.size(split)
        start, stop = (n * r // dist.world_size() for r in (dist.rank(), dist.rank() + 1))
        files = {key: feature_file.Writer(path, key[1], start) for key, path in paths.items()}
        asked = {request for request, _ in files}
        row = start
        for batch in data.scan(split, start, stop, batch_size=self.batch_size):
            found = features_of(backbone, batch, asked, device)
            try:
                with self._room(n, split, paths, shapes):
                    for (request, _), file in files.items():
                        file.write(found[request])
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}: did the training diverge?") from error
            row += len(next(iter(found.values())))
            progress(f"{split} features", row - start, stop - start)
        if row != stop:
            raise RuntimeError(f"images {start} to {stop} of {split} were due, got {row - start}")
        with self._room(n, split, paths, shapes):
            for file in files.values():
                file.close()


def opened(shared: str | None, own: Path, dtype: Dtype) -> FeatureStore:
    """The store in a folder that runs share, or else in the run's own.

    Raises:
        ValueError: nothing can be written to the shared one: now, not after the training.
    """
    store = FeatureStore(own if shared is None else Path(shared), dtype=dtype)
    if shared is not None:
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=store.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"features={shared}: nothing can be written there ({error.strerror})"
            ) from error
    return store


def _missing(paths: Mapping[Key, Path], device: torch.device | str) -> dict[Key, Path]:
    """Those without a file, as the first process sees it: file systems may lag behind."""
    there = torch.tensor([path.exists() for path in paths.values()], device=device)
    known = dist.broadcast(there.int()).tolist()
    return {key: path for (key, path), yes in zip(paths.items(), known, strict=True) if not yes}


def _bytes(n: int, keys: Iterable[Key], shapes: Shapes) -> int:
    """Of features of n images on disk."""
    return sum(feature_file.size(dtype, (n, *shapes.of(r))) for r, dtype in keys)
