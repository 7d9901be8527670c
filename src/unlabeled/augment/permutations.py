"""Sets of permutations that differ in many places (Noroozi & Favaro, 2016, algorithm 1)."""

import functools
import itertools
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unlabeled.draws import Draws

Criterion = Literal["max_min", "max_mean"]
ENUMERATED = 9  # tiles: 9! = 362880 orders are all compared, of more tiles as many random ones


@functools.lru_cache(maxsize=8)
def permutations(
    count: int, grid: int = 3, criterion: Criterion = "max_min", seed: int = 0
) -> Tensor:
    """A set of orders of grid * grid tiles, far from one another in Hamming distance.

    The first is random; every next one is the farthest from those chosen, the first of several
    that are equally far.

    Args:
        count: how many.
        grid: tiles per side.
        criterion: "max_min" makes the distance to the nearest of the chosen as large as can be;
            "max_mean" the mean distance to them, as the released files do. The mean over all
            permutations is already tiles - 1, so for large sets it says little.
        seed: draws the first.

    Returns:
        (count, tiles) int64, all different.
    """
    if criterion not in ("max_min", "max_mean"):
        raise ValueError(f"criterion must be max_min or max_mean, got {criterion!r}")
    tiles = grid * grid
    if not 1 <= count <= math.factorial(tiles):
        raise ValueError(f"{tiles} tiles have 1 to {math.factorial(tiles)} orders, not {count}")
    draws = Draws(seed, "permutations", rows=1)
    every = _candidates(tiles, draws)
    columns = np.ascontiguousarray(every.T)  # compared one tile at a time, in the cache
    far = criterion == "max_min"
    score = np.full(len(every), tiles, np.int8) if far else np.zeros(len(every), np.int32)
    chosen = [int(draws.integers(len(every)))]
    while len(chosen) < count:
        distance = np.zeros(len(every), np.int8)
        for column in columns:
            distance += column != column[chosen[-1]]
        if far:
            np.minimum(score, distance, out=score)
        else:
            score += distance
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return torch.from_numpy(every[chosen].astype(np.int64))


def _candidates(tiles: int, draws: Draws) -> np.ndarray:
    if tiles > ENUMERATED:
        rows = Draws(*draws.key, "candidates", rows=math.factorial(ENUMERATED))
        return np.unique(rows.permutations(tiles).numpy().astype(np.uint8), axis=0)
    numbers = itertools.chain.from_iterable(itertools.permutations(range(tiles)))
    return np.fromiter(numbers, np.uint8).reshape(-1, tiles)


def load_permutations(path: str | Path, tiles: int) -> Tensor:
    """Permutations (count, tiles) from a `.npy` file, with tiles numbered from 0 or from 1.

    Tiles are numbered row by row here; files made for VISSL number them column by column.
    """
    if not Path(path).is_file():
        raise ValueError(f"no file of permutations at {path}: give a `.npy` file or a number")
    rows = np.asarray(np.load(path)).astype(np.int64)
    if rows.ndim != 2 or rows.shape[1] != tiles:
        raise ValueError(f"{path} holds an array {rows.shape}, not rows of {tiles} tiles")
    rows = rows - rows.min()
    if (np.sort(rows, 1) != np.arange(tiles)).any() or len(np.unique(rows, axis=0)) < len(rows):
        raise ValueError(f"{path}: its rows are not different permutations of {tiles} tiles")
    return torch.from_numpy(rows)
