"""Curves of baselines in the picture of the trained backbone's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unlabeled.report.scores import Row

Arrays = Mapping[str, np.ndarray]
WORDS = {"random": "random init", "pixels": "raw pixels"}


def together(figures: Mapping[str, Arrays], table: Sequence[Row]) -> dict[str, Arrays]:
    """Figures by name, where curves of scores have those of all baselines among them.

    A figure of curves that has `scores`, the name (series, n) of the score at every point within
    its evaluation, is drawn once, with what baselines drew under that name and with the scores of
    the supervised run where one was given. Others stay as they are.
    """
    rows, found = {row.name: row for row in table}, {}
    for name, arrays in figures.items():
        if "scores" not in arrays:
            found[name] = arrays
        elif not name.startswith("baseline."):
            drawn = [(str(n), arrays, i) for i, n in enumerate(arrays["names"])]
            for kind, words in WORDS.items():
                other = figures.get(f"baseline.{kind}.{name}")
                if other is not None and np.array_equal(other["x"], arrays["x"]):
                    for i, n in enumerate(other["names"]):
                        drawn.append((words if n == kind else f"{n}, {words}", other, i))
            merged = {key: _rows(drawn, key) for key in ("y", "low", "high")}
            names = [title for title, _, _ in drawn]
            for series, points in zip(arrays["names"], arrays["scores"], strict=True):
                line = np.array([_supervised(rows, name, str(point)) for point in points])
                if np.isfinite(line).any():
                    merged = {key: np.vstack([lines, line]) for key, lines in merged.items()}
                    names.append(f"{series}, supervised")
            found[name] = {**arrays, **merged, "names": np.array(names)}
    return found


def _rows(drawn: Sequence[tuple[str, Arrays, int]], key: str) -> np.ndarray:
    """The values of every series; an edge of a band is the line where there is no band."""
    return np.stack([np.atleast_2d(arrays.get(key, arrays["y"]))[i] for _, arrays, i in drawn])


def _supervised(rows: Mapping[str, Row], figure: str, score: str) -> float:
    """A supervised run's score at a point of a figure; NaN if it has none."""
    row: Any = rows.get(f"{figure.rpartition('.')[0]}/{score}")
    known = None if row is None else row.scores.get("supervised")
    return float("nan") if known is None else known.value
