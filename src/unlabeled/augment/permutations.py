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
FEW = 2000  # orders that are sooner searched for than all of them are compared


@functools.lru_cache(maxsize=8)
def permutations(
    count: int, grid: int = 3, criterion: Criterion = "max_min", seed: int = 0
) -> Tensor:
    """A set of orders of grid * grid tiles, far from one another in Hamming distance.

    The first is random; every next one is the farthest from those chosen, the first of several
    that are equally far. All 9! by "max_min" take seconds, by "max_mean" minutes:
    `scripts/make_permutations.py` keeps a set in a file.

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
    if count > len(every):
        raise ValueError(f"orders of {tiles} tiles are chosen out of {len(every)}, not {count}")
    first = int(draws.integers(len(every)))
    if criterion == "max_mean":
        chosen = _max_mean(every, first, count)
    elif tiles > ENUMERATED:
        chosen = _max_min(every, first, count)
    else:
        chosen = _max_min_of_all(every, first, count)
    return torch.from_numpy(every[chosen].astype(np.int64))


def _candidates(tiles: int, draws: Draws) -> np.ndarray:
    """(n, tiles) different orders, sorted: all of them, or as many random ones as 9 tiles have."""
    if tiles > ENUMERATED:
        rows = Draws(*draws.key, "candidates", rows=math.factorial(ENUMERATED))
        return np.unique(rows.permutations(tiles).numpy().astype(np.uint8), axis=0)
    numbers = itertools.chain.from_iterable(itertools.permutations(range(tiles)))
    return np.fromiter(numbers, np.uint8).reshape(-1, tiles)


def _distances(columns: np.ndarray, i: int) -> np.ndarray:
    """Hamming distances (n,) of all orders to the i-th; columns (tiles, n) stay in the cache."""
    distance = np.zeros(columns.shape[1], np.int8)
    for column in columns:
        distance += column != column[i]
    return distance


def _max_mean(every: np.ndarray, first: int, count: int) -> list[int]:
    columns, chosen = np.ascontiguousarray(every.T), [first]
    score = np.zeros(len(every), np.int32)  # the sum of distances to those chosen
    while len(chosen) < count:
        score += _distances(columns, chosen[-1])
        score[chosen[-1]] = np.iinfo(np.int32).min // 2  # no sum of distances brings it back
        chosen.append(int(score.argmax()))
    return chosen


def _max_min(every: np.ndarray, first: int, count: int) -> list[int]:
    columns, chosen = np.ascontiguousarray(every.T), [first]
    score = np.full(len(every), every.shape[1], np.int8)  # the distance to the nearest chosen
    while len(chosen) < count:
        np.minimum(score, _distances(columns, chosen[-1]), out=score)
        chosen.append(int(score.argmax()))
    return chosen


def _max_min_of_all(every: np.ndarray, first: int, count: int) -> list[int]:
    """`_max_min` where every order is a candidate: only near ones are looked at.

    Scores only fall. So while the largest is d, its holders come in order of their number, and
    one that is chosen lowers the scores of orders nearer than d alone: itself with fewer than d
    of its entries exchanged among themselves, 1339 orders where d = 5 and 37 where d = 3.
    """
    tiles = every.shape[1]
    weights = (tiles ** np.arange(tiles)[::-1]).astype(np.int64)
    codes = every @ weights  # ascending: a search finds an order's number
    columns = np.ascontiguousarray(every.T)
    moves = np.argsort(moved := (every != np.arange(tiles)).sum(1), kind="stable")
    within = np.searchsorted(moved[moves], np.arange(tiles + 1))  # moves of fewer entries than d
    score, chosen = np.full(len(every), tiles, np.int8), []

    def choose(i: int, d: int) -> None:
        chosen.append(i)
        exchanges = moves[: within[d]]
        if len(exchanges) > FEW:
            np.minimum(score, _distances(columns, i), out=score)
            return
        near = np.searchsorted(codes, every[i][every[exchanges]] @ weights)
        score[near] = np.minimum(score[near], moved[exchanges])

    choose(first, tiles)
    for d in range(tiles, 1, -1):
        if len(chosen) >= count:
            break
        holders = np.flatnonzero(score == d)
        if d == 2:  # every two orders are at least that far apart
            chosen += holders[: count - len(chosen)].tolist()
            break
        for i in holders.tolist():
            if len(chosen) < count and score[i] == d:
                choose(i, d)
    return chosen


def load_permutations(path: str | Path, tiles: int) -> Tensor:
    """Permutations (count, tiles) from a `.npy` file, with tiles numbered from 0 or from 1.

    Tiles are numbered row by row here; files made for VISSL number them column by column.
    """
    if not Path(path).is_file():
        raise ValueError(f"no file of permutations at {path}: give a `.npy` file or a number")
    try:
        rows = np.asarray(np.load(path)).astype(np.int64)
    except Exception as error:  # on what is no such file numpy raises nearly anything
        raise ValueError(
            f"{path} cannot be read as a `.npy` file of permutations: {error}"
        ) from error
    if rows.ndim != 2 or rows.shape[1] != tiles:
        raise ValueError(f"{path} holds an array {rows.shape}, not rows of {tiles} tiles")
    rows = rows - rows.min()
    if (np.sort(rows, 1) != np.arange(tiles)).any() or len(np.unique(rows, axis=0)) < len(rows):
        raise ValueError(f"{path}: its rows are not different permutations of {tiles} tiles")
    return torch.from_numpy(rows)
