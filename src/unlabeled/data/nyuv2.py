"""The layout of NYU Depth V2: images and depth in one Matlab file, and surface normals."""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unlabeled.data.matlab import loaded, member, opened
from unlabeled.data.nyuv2_normals import NORMALS, Aligned, Derived, Packed, Pictures, unpacked
from unlabeled.data.splits import Array, Split, digest
from unlabeled.truth import Annotation

log = logging.getLogger(__name__)
LABELLED, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
PACKED, PICTURES = "all_normals.pklz", "nyu_normals_gt"
WHERE = {
    LABELLED: "http://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat",
    SPLITS: "http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat",
}
FORMAT = 1  # of unpacked files


class NYUv2:
    """The labelled part of NYU Depth V2, Silberman et al., 2012.

    Under the root:

    - nyu_depth_v2_labeled.mat (Matlab 7.3, which is HDF5: needs h5py): `images` (1449, 3, 640,
      480), `depths`, `rawDepths` (1449, 640, 480), as h5py sees them;
    - splits.mat: `trainNdxs` (795) and `testNdxs` (654), from 1;
    - for normals=file, those of Ladicky et al. (2014): all_normals.pklz, here or in
      surfacenormal_metadata/ (a gzipped pickle of `all_normals` (n, h, w, 3),
      `all_valid_depth_masks` (n, h, w) and `all_filenames`, numbers from 1), or
      nyu_normals_gt/{train,test}/00001.png, whose colours are (n + 1) / 2, with pixels unknown
      where the raw depth is.

    A file's axes are exchanged and mirrored so that they agree best with the normals of the
    depth. Images and packed normals are unpacked once, into memory-mapped files beside them.

    Args:
        normals: "file", "depth": planes fitted to the filled depth, unknown where the raw depth
            is; or "none".
        window: odd side in pixels of the square that a plane is fitted to.
        tolerance: share of a pixel's depth by which others of its plane may differ.
    """

    def __init__(
        self,
        *,
        normals: Literal["file", "depth", "none"] = "file",
        window: int = 9,
        tolerance: float = 0.05,
    ) -> None:
        if normals not in ("file", "depth", "none"):
            raise ValueError(f"data.layout.normals must be file, depth or none, got {normals!r}")
        if window < 3 or window % 2 == 0:
            raise ValueError(f"data.layout.window must be odd and at least 3, got {window}")
        if tolerance <= 0:
            raise ValueError(f"data.layout.tolerance must be positive, got {tolerance}")
        self.normals, self.window, self.tolerance = normals, window, tolerance

    def __call__(self, root: Path, seed: int) -> dict[str, Split]:
        for name in (LABELLED, SPLITS):
            if not (root / name).is_file():
                raise ValueError(
                    f"{root / name} is not there: point data.root at the folder that holds it, or "
                    f"get it from {WHERE[name]}"
                )
        packed = [
            p for p in (root / PACKED, root / "surfacenormal_metadata" / PACKED) if p.is_file()
        ]
        if self.normals == "file" and not packed and not (root / PICTURES).is_dir():
            raise ValueError(
                f"{root / PACKED} is not there: get it from {NORMALS}; or say "
                "data.layout.normals=depth"
            )
        with opened(root / LABELLED) as file:
            rows = _splits(root / SPLITS, len(member(file, "images", root / LABELLED)))
        splits: dict[str, Split] = {}
        like: Aligned | None = None
        for side, at in rows.items():
            pixels = _kept(root, f"images-{side}", at, partial(_images, root / LABELLED, at))
            known: dict[str, Annotation] = {}
            if self.normals != "none":
                known["normals"] = made = self._normals(root, side, at, packed, like)
                like = made if isinstance(made, Aligned) else None  # the training images' axes
            splits[side] = Array(torch.from_numpy(pixels), None, (), known)
        return splits

    def _normals(
        self, root: Path, side: str, rows: Sequence[int], packed: Sequence[Path], like: Any
    ) -> Annotation:
        derived = Derived(root / LABELLED, rows, self.window, self.tolerance)
        if self.normals == "depth":
            return derived
        if packed:
            unpack = partial(unpacked, packed[0], rows)
            given: Annotation = Packed(_kept(root, f"normals-{side}", rows, unpack))
        else:
            given = Pictures(root / PICTURES / side, root / LABELLED, rows)
        return Aligned(given, derived, like)


def _splits(path: Path, count: int) -> dict[str, list[int]]:
    """Rows of the training and test images."""
    content = loaded(path)
    rows = {}
    for side, name in (("train", "trainNdxs"), ("test", "testNdxs")):
        if name not in content:
            raise ValueError(f"{path} holds no {name!r}: get it from {WHERE[SPLITS]}")
        rows[side] = [int(i) - 1 for i in np.atleast_1d(content[name]).ravel()]
        if not rows[side] or min(rows[side]) < 0 or max(rows[side]) >= count:
            raise ValueError(f"{name} of {path} must be numbers from 1 to {count}")
    return rows


def _images(path: Path, rows: Sequence[int], into: Callable[..., np.ndarray]) -> np.ndarray:
    with opened(path) as file:
        images = member(file, "images", path)
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"`images` of {path} must be (n, 3, w, h), got {images.shape}")
        made = into((len(rows), 3, images.shape[3], images.shape[2]), np.uint8)
        for i, row in enumerate(rows):
            made[i] = images[row].transpose(0, 2, 1)  # Matlab stores columns first
    return made


def _kept(
    root: Path,
    name: str,
    rows: Sequence[int],
    make: Callable[[Callable[..., np.ndarray]], np.ndarray],
) -> np.ndarray:
    """An array that `make` fills, mapped from a file under the root, which is made only once."""
    sources = [root / LABELLED, root / PACKED, root / "surfacenormal_metadata" / PACKED]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in sources]
    path = (
        root / f"{name}-{digest([repr((FORMAT, sizes, list(rows))).encode()], None, ())[:16]}.npy"
    )
    if path.is_file():
        with suppress(Exception):  # damaged, which numpy says in any way: it is made again
            return np.load(path, mmap_mode="c", allow_pickle=False)
    log.warning("unpacking %s, once", path)
    try:
        with tempfile.NamedTemporaryFile(dir=root, suffix=".tmp", delete=False) as file:
            part = Path(file.name)
    except OSError as error:
        log.warning("%s is not kept for the next run: %s", name, error)
        return make(np.empty)
    try:
        make(partial(_mapped, part)).flush()  # type: ignore[attr-defined]
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return np.load(path, mmap_mode="c", allow_pickle=False)


def _mapped(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.lib.format.open_memmap(path, "w+", dtype, shape)
