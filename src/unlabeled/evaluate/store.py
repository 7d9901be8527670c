"""Features of frozen backbones: one pass for all that is asked for, kept on disk."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled import dist
from unlabeled.batch import normalize
from unlabeled.evaluate.contract import FINAL, Data, Progress, Request, Shapes
from unlabeled.evaluate.frozen import checksum, frozen, same_everywhere


def images(crops: Tensor, device: torch.device | str) -> Tensor:
    """uint8 crops (B, 3, H, W) as a backbone takes them."""
    x = normalize(crops.to(device, non_blocking=True))
    return x.contiguous(memory_format=torch.channels_last)


def _stages(backbone: nn.Module, x: Tensor) -> dict[str, Tensor]:
    stages = getattr(backbone, "stages", None)
    maps = stages(x) if callable(stages) else {}
    return dict(maps) if isinstance(maps, Mapping) else {}


def shapes_of(backbone: nn.Module, data: Data, device: torch.device | str) -> Shapes:
    """What a backbone makes of the first training image."""
    batch = next(iter(data.scan("train", 0, 1)))
    with frozen(backbone.to(device)):
        x = images(batch["crops"][0], device)  # type: ignore[typeddict-item]
        maps, final = _stages(backbone, x), backbone(x)
    pooled = False
    if maps:
        mean = list(maps.values())[-1].mean((2, 3))
        pooled = mean.shape == final.shape and torch.allclose(mean, final, rtol=1e-3, atol=1e-5)
    sizes = {name: (m.shape[1], m.shape[2], m.shape[3]) for name, m in maps.items()}
    return Shapes(maps=sizes, dim=final.shape[1], pooled=pooled)


class FeatureStore:
    """Features of (backbone, data, split) on disk, memory-mapped when read.

    A pass extracts everything that is asked for and missing; every process extracts a
    contiguous share of the images into files that all of them see. A file has its name only
    once it is whole. Names hold a digest of the backbone's weights and buffers, of the data
    and of the evaluation transform, so another checkpoint or another data set never meets it.

    Args:
        folder: where the files lie.
        dtype: of the stored features; float16 halves the space.
        batch_size: images per forward.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Literal["float32", "float16"] = "float32",
        batch_size: int = 256,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise ValueError(f"features are stored as float32 or float16, got {dtype!r}")
        self.folder, self.dtype, self.batch_size = Path(folder), dtype, batch_size

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

        Args:
            backbone: moved to `device`; its training flags are left as they were.
            data: the images.
            split: "train" or "test".
            requests: all wanted features; a single pass makes those that are missing.
            shapes: of this backbone on these data, where the caller knows them.
            device: where the backbone runs.
            progress: called after every batch with a text and images done, of how many.

        Raises:
            FloatingPointError: if features are not finite.
            RuntimeError: if the backbone changed meanwhile.
            ValueError: if a grid is finer than its map.
        """
        same_everywhere(backbone.to(device))
        shapes = shapes or shapes_of(backbone, data, device)
        wanted = {request: shapes.resolve(request) for request in requests}
        paths: dict[Request, Path] = {}
        with frozen(backbone) as weights:
            for request in sorted(set(wanted.values())):
                paths[request] = self._path(weights, data, split, request)
            there = torch.tensor([path.exists() for path in paths.values()], device=device)
            there = dist.broadcast(there.int()).tolist()  # file systems may lag behind
            todo = {r: p for (r, p), known in zip(paths.items(), there, strict=True) if not known}
            partial = {r: p.with_name(p.name + ".partial") for r, p in todo.items()}
            if todo:
                self._fill(backbone, data, split, partial, shapes, device, progress)
        dist.barrier()  # every share is written and every backbone still what it was
        if dist.rank() == 0:
            for request, path in todo.items():
                partial[request].replace(path)
        dist.barrier()
        return {request: _read(paths[wanted[request]]) for request in wanted}

    def find(self, backbone: nn.Module, data: Data, split: str, request: Request) -> Tensor | None:
        """Features that some pass extracted before, else None; a process may ask alone."""
        device = next((p.device for p in backbone.parameters()), "cpu")
        request = shapes_of(backbone, data, device).resolve(request)
        path = self._path(checksum(backbone), data, split, request)
        return _read(path) if path.exists() else None

    def _path(self, weights: str, data: Data, split: str, request: Request) -> Path:
        key = f"{weights} {data.fingerprint(split)}"
        place = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        pooling = "x".join(map(str, (request.grid, *request.window)))
        return self.folder / f"{split}_{place}" / f"{request.stage}_{pooling}_{self.dtype}.npy"

    def _fill(
        self,
        backbone: nn.Module,
        data: Data,
        split: str,
        paths: Mapping[Request, Path],
        shapes: Shapes,
        device: torch.device | str,
        progress: Progress | None,
    ) -> None:
        n = data.size(split)
        start, stop = (n * r // dist.world_size() for r in (dist.rank(), dist.rank() + 1))
        for request, path in paths.items():
            channels, *sides = shapes.maps.get(request.stage, (shapes.dim, 1, 1))
            if request.grid > min(sides):
                raise ValueError(
                    f"{request.stage} has maps of {sides[0]} x {sides[1]}; "
                    f"a grid of {request.grid} is finer than that"
                )
            if dist.rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (n, channels, request.grid, request.grid)
                np.lib.format.open_memmap(path, mode="w+", dtype=self.dtype, shape=shape)
        dist.barrier()
        files = {r: np.lib.format.open_memmap(path, mode="r+") for r, path in paths.items()}
        row = start
        for batch in data.scan(split, start, stop, batch_size=self.batch_size):
            x = images(batch["crops"][0], device)  # type: ignore[typeddict-item]
            for request, features in _features(backbone, x, files).items():
                values = features.to(getattr(torch, self.dtype)).cpu()
                if not values.isfinite().all():
                    raise FloatingPointError(
                        f"the features of {request.stage} are not finite in {self.dtype}: "
                        "did the training diverge?"
                    )
                files[request][row : row + len(x)] = values.numpy()
            row += len(x)
            if progress:
                progress(f"{split} features", row - start, stop - start)
        if row != stop:
            raise RuntimeError(f"images {start} to {stop} of {split} were due, got {row - start}")
        for file in files.values():
            file.flush()


def _read(path: Path) -> Tensor:
    # Copy on write: torch wants writable memory, and the file stays as it is.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _features(backbone: nn.Module, x: Tensor, requests: Iterable[Request]) -> dict[Request, Tensor]:
    """Each request's (B, channels, grid, grid), in one forward unless forward has its own end."""
    requests = list(requests)
    maps = _stages(backbone, x) if any(r != FINAL for r in requests) else {}
    return {
        r: backbone(x)[:, :, None, None] if r == FINAL else _pooled(maps[r.stage].float(), r)
        for r in requests
    }


def _pooled(maps: Tensor, request: Request) -> Tensor:
    if request.window:
        side, stride, padding = request.window
        return F.avg_pool2d(maps, side, stride, padding)
    return F.adaptive_avg_pool2d(maps, request.grid)
