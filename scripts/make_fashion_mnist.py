"""Packs the data set of the demo: the first images of each class of Fashion-MNIST.

python scripts/make_fashion_mnist.py [FOLDER WITH THE FOUR IDX FILES]

The same files give the same bytes (with the same zlib), so the result can be checked.
"""

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from unlabeled.data.idx import DEBIAN, read_idx

OUT = Path(__file__).parents[1] / "src/unlabeled/data/embedded/fashion_mnist.npz"
COUNTS = {"train": ("train", 12_000), "test": ("t10k", 2_000)}
LIMIT = 10 * 2**20  # bytes: it lives in the repository


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions, in file order, of the first count / 10 images of each class."""
    classes = np.unique(labels)
    share, rest = divmod(count, len(classes))
    if rest:
        raise ValueError(f"{count} images cannot be divided among {len(classes)} classes")
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:share] for c in classes]))


def pack(folder: Path) -> bytes:
    """The npz as bytes; numpy's own writer would put the time of day into it."""
    arrays = {"classes": np.array(FashionMNIST.classes)}
    for side, (name, count) in COUNTS.items():
        images, labels = read_idx(folder, name)
        chosen = first_of_each(labels, count)
        arrays[f"{side}_images"], arrays[f"{side}_labels"] = images[chosen], labels[chosen]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            file = io.BytesIO()
            np.lib.format.write_array(file, array, allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system = zipfile.ZIP_DEFLATED, 3
            archive.writestr(info, file.getvalue(), compresslevel=9)
    return packed.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DEBIAN)
    data = pack(parser.parse_args().folder)
    if len(data) > LIMIT:
        raise ValueError(f"{len(data)} bytes are more than the {LIMIT} the repository takes")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_bytes(data)
    print(f"{OUT}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
