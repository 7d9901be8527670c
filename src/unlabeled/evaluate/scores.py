"""The scores of a run: numbers that cannot be without what they mean."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlabeled.disk import replace, replace_arrays

BESIDE = (  # what every score carries
    "protocol",
    "stage",
    "hyperparameters",
    "selection",
    "better",  # "higher", "lower", or "neither" where it tells a property, not a quality
    "split_hash",
    "seed",
    "epoch",
    "n",
    "ci95",
    "baselines",
)
SAID = ("protocol", "stage", "selection", "split_hash", "seed", "n")  # never None, nor empty


class Scores:
    """Scores by name, the details of each, and the evaluations that could not run.

    Accuracies are shares in [0, 1].
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._details: dict[str, dict[str, Any]] = {}
        self.figures: dict[str, Mapping[str, Any]] = {}  # by name, as scores
        self.skipped: dict[str, str] = {}  # evaluation -> reason
        self.finished: list[str] = []  # evaluations whose scores are here

    @property
    def values(self) -> dict[str, float]:
        """A copy: scores come in through `add` only."""
        return dict(self._values)

    @property
    def details(self) -> dict[str, dict[str, Any]]:
        return {name: dict(details) for name, details in self._details.items()}

    def add(self, name: str, value: float, details: dict[str, Any]) -> None:
        """One score and what must stand beside it."""
        if missing := [key for key in BESIDE if key not in details]:
            raise ValueError(f"the score {name} needs {missing} in its details")
        if not math.isfinite(value):
            raise ValueError(f"the score {name} is {value}, which is no number to report")
        if empty := [key for key in SAID if details[key] is None or details[key] == ""]:
            raise ValueError(f"the score {name} says nothing under {empty} in its details")
        if not _interval(details["ci95"]):
            raise ValueError(
                f"the score {name} has ci95 {details['ci95']!r}: give two numbers, the lower first"
            )
        json.dumps(details, allow_nan=False)  # else the file would fail, after all the work
        self._values[name], self._details[name] = float(value), dict(details)

    def add_supervised(self, prefix: str, known: Mapping[str, float] | None) -> None:
        """A supervised run's scores of the same names into the baselines of those here."""
        for name, details in self._details.items():
            if name.startswith(prefix):
                value = "not given" if known is None else known.get(name, "not measured")
                details["baselines"]["supervised"] = value

    def write(self, folder: Path) -> None:
        """`scores.json`, `scores_details.json` and figures/*.npz, each whole or not at all.

        Scores of evaluations that are not among these stay in the files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, arrays in self.figures.items():
            replace_arrays(folder / "figures" / (name.replace("/", ".") + ".npz"), arrays)
        for file, new in (
            ("scores_details.json", self._details),
            ("scores.json", self._values),  # last: whoever finds it finds the details
        ):
            path = folder / file
            old = json.loads(path.read_text()) if path.exists() else {}
            kept = {name: x for name, x in old.items() if evaluation_of(name) not in self.finished}
            replace(path, json.dumps({**kept, **new}, indent=2, allow_nan=False) + "\n")


def _interval(bounds: Any) -> bool:
    """Whether these are two finite numbers in order."""
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return False
    numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in bounds)
    return numbers and bounds[0] <= bounds[1]


def forget(folder: Path, evaluations: Sequence[str]) -> None:
    """Takes scores of other weights out of a folder's files, which shall get new ones."""
    if (folder / "scores.json").exists():
        none = Scores()
        none.finished = [*evaluations]
        none.write(folder)


def evaluation_of(name: str) -> str:
    """The evaluation that a score belongs to: `knn` of `baseline/random/knn/k20_t0.07/top1`."""
    parts = name.split("/")
    return parts[2] if parts[0] == "baseline" else parts[0]
