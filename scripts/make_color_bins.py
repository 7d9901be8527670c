"""Packs the colours that colourisation chooses among: the bins of sRGB's gamut in the ab plane.

    python scripts/make_color_bins.py                        # the bins that the package ships
    python scripts/make_color_bins.py --images FOLDER --bin-size 10 --out prior.npy

A grid of step s has its points at multiples of s: these are the centres of the bins. A bin is kept
if it is a corner of one of the grid's cells that the convex hull of the gamut meets, so that every
colour lies among four bins. With s = 10 these are the 313 bins of Zhang et al., 2016.

With --images it counts how often the pixels of a folder's images fall into each bin: a `prior`
for the method `colorization`, which otherwise counts while it trains.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.spatial import ConvexHull

from unlabeled.lab import rgb_to_lab
from unlabeled.parts.colors import ColorBins

OUT = Path(__file__).parents[1] / "src/unlabeled/parts/color_bins.npz"
SIZES = (5, 10, 15, 20)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def hull() -> np.ndarray:
    """Corners (n, 2), in order, of the convex hull of all 8-bit colours' a and b."""
    # The surface of the RGB cube is enough: along L one leaves the gamut with the same a and b.
    v = torch.arange(256, dtype=torch.float64) / 255
    first, second = (x.flatten() for x in torch.meshgrid(v, v, indexing="ij"))
    faces = []
    for place in range(3):
        for level in (0.0, 1.0):
            channels = [first, second]
            channels.insert(place, torch.full_like(first, level))
            faces.append(torch.stack(channels))
    ab = rgb_to_lab(torch.cat(faces, 1)[:, :, None])[1:, :, 0].T.numpy()
    return ab[ConvexHull(ab).vertices]


def meets(polygon: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    """Whether a convex polygon (n, 2), counter-clockwise, meets the rectangle from low to high."""
    if (polygon.max(0) < low).any() or (polygon.min(0) > high).any():
        return False
    edges = np.roll(polygon, -1, 0) - polygon
    normals = np.stack([edges[:, 1], -edges[:, 0]], 1)  # outward
    nearest = np.where(normals > 0, low, high)  # the corner that lies least far outward
    return not (((nearest - polygon) * normals).sum(1) > 0).any()


def bins(step: int) -> np.ndarray:
    """Centres (Q, 2) int16 of the bins of a grid, sorted."""
    polygon, reach = hull(), 120 // step + 1
    found = set()
    for i in range(-reach, reach):
        for j in range(-reach, reach):
            low = np.array([i, j]) * step
            if meets(polygon, low, low + step):
                found |= {(i + k, j + m) for k in (0, 1) for m in (0, 1)}
    return (np.array(sorted(found)) * step).astype(np.int16)


def pack() -> bytes:
    """The npz as bytes; numpy's own writer would put the time of day into it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for step in SIZES:
            file = io.BytesIO()
            np.lib.format.write_array(file, bins(step), allow_pickle=False)
            info = zipfile.ZipInfo(f"bins{step}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
            archive.writestr(info, file.getvalue(), compresslevel=9)
    return packed.getvalue()


def frequencies(folder: Path, bin_size: int) -> np.ndarray:
    """Counts (Q,) of the pixels of all images below a folder.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    colors = ColorBins(bin_size=bin_size)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        ab = rgb_to_lab(pixels.float() / 255)[None, 1:, ::4, ::4]
        colors.count(colors.encode(ab)[0][..., 0])
    return colors.counts.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="count colours of the images of this folder")
    parser.add_argument("--bin-size", type=int, default=10, choices=SIZES)
    parser.add_argument("--out", type=Path, help="where the counts go: a .npy file")
    args = parser.parse_args()
    if args.images is None:
        OUT.write_bytes(pack())
        with np.load(OUT) as file:
            print(f"{OUT}:", ", ".join(f"{name} {len(file[name])}" for name in file.files))
        return
    if args.out is None or args.out.suffix != ".npy":  # numpy would add it
        parser.error(f"--images needs --out, a .npy file, got {args.out}")
    try:
        counts = frequencies(args.images, args.bin_size)
    except ValueError as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.save(args.out, counts)
    print(f"{args.out}: {counts.sum()} pixels, {(counts > 0).sum()} of {len(counts)} bins occur")


if __name__ == "__main__":
    main()
