"""Chooses a jigsaw's permutations once and keeps them in a file.

python scripts/make_permutations.py 10000 --out permutations_10000.npy
unlabeled method=jigsaw method.augment.permutations=permutations_10000.npy

The same arguments give the same file. What they mean: `unlabeled.augment.permutations`.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from unlabeled.augment.permutations import permutations


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="how many, up to 362880 of 9 tiles")
    parser.add_argument("--grid", type=int, default=3, help="tiles per side")
    parser.add_argument("--criterion", choices=["max_min", "max_mean"], default="max_min")
    parser.add_argument("--seed", type=int, default=0, help="draws the first")
    parser.add_argument("--out", type=Path, required=True, help="a .npy file")
    given = parser.parse_args(arguments)
    if given.out.suffix != ".npy":  # numpy would add it, and the file would have another name
        parser.error(f"--out must end in .npy, got {given.out}")
    start = time.perf_counter()
    try:
        rows = permutations(given.count, given.grid, given.criterion, given.seed).numpy()
    except ValueError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - start
    given.out.parent.mkdir(parents=True, exist_ok=True)
    np.save(given.out, rows.astype(np.uint8))
    print(f"{given.out}: {len(rows)} orders of {rows.shape[1]} tiles, chosen in {seconds:.1f} s")


if __name__ == "__main__":
    main()
