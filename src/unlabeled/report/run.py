"""What the files of a run say, whichever of them exist."""

import csv
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

log = logging.getLogger(__name__)
Curve = list[tuple[int, float]]  # (step, value), by step


@dataclass(frozen=True)
class Run:
    """One run's files, read. What is missing is empty, or None."""

    folder: Path
    config: dict[str, Any]  # resolved
    text: str  # the config as it was written
    choices: dict[str, str]  # group -> option, where Hydra kept them
    curves: dict[str, Curve]
    scores: dict[str, float]
    details: dict[str, dict[str, Any]]
    status: dict[str, Any]
    neighbours: Mapping[str, np.ndarray] | None
    embedding: Mapping[str, np.ndarray] | None
    samples: Mapping[str, np.ndarray] | None
    figures: Mapping[str, Mapping[str, np.ndarray]]  # of evaluations, by name
    sweep: Path | None = None  # the folder of the sweep that it is a member of

    def get(self, path: str) -> Any:
        """The config's value at a dotted path, or None."""
        node: Any = self.config
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def choice(self, group: str) -> str:
        """How a group was chosen on the command line, or else the name of what it builds."""
        target = self.get(f"{group}._target_")
        return self.choices.get(group) or str(target or "").rsplit(".", 1)[-1]


def read(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        ValueError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no run folder {folder}")
    config, hydra = folder / ".hydra/config.yaml", folder / ".hydra/hydra.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    kept = _yaml(hydra.read_text(encoding="utf-8") if hydra.exists() else "")
    hydra_node = kept.get("hydra", {})
    choices = hydra_node.get("runtime", {}).get("choices", {})
    sweep = Path(hydra_node.get("sweep", {}).get("dir") or "?")
    swept = hydra_node.get("mode") == "MULTIRUN"
    swept |= sweep.resolve() in folder.resolve().parents and (sweep / ".members").is_dir()
    return Run(
        folder=folder,
        config=_yaml(text),
        text=text,
        choices={str(k): str(v) for k, v in choices.items() if v is not None},
        curves=_curves(folder / "metrics.csv"),
        scores=_json(folder / "scores.json"),
        details=_json(folder / "scores_details.json"),
        status=_json(folder / "status.json"),
        neighbours=_arrays(folder / "figures/neighbours.npz"),
        embedding=_arrays(folder / "figures/embedding.npz"),
        samples=_arrays(folder / "figures/samples.npz"),
        figures=_figures(folder / "figures"),
        sweep=sweep if swept else None,
    )


def supervised_scores(path: str | None) -> dict[str, float] | None:
    """The scores of the run that is the supervised baseline, if one is named.

    Raises:
        ValueError: its scores cannot be read.
    """
    if path is None:
        return None
    try:
        return json.loads((Path(path) / "scores.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"baseline.supervised={path}: cannot read its scores.json ({error}); name the folder "
            "of a finished run of method=supervised with the same evaluations"
        ) from error


def _yaml(text: str) -> dict[str, Any]:
    return yaml.safe_load(text) or {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, and what it held is made again"
        ) from error


def _arrays(path: Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # on damaged files zipfile and numpy raise nearly anything
        log.warning("%s is damaged and not shown (%s)", path, error)
        return None


def _figures(folder: Path) -> dict[str, Mapping[str, np.ndarray]]:
    """What evaluations drew: the trained backbone's first, then its baselines'."""
    paths = sorted(folder.glob("*.*.npz"), key=lambda p: (p.name.startswith("baseline."), p.name))
    found = {path.stem: _arrays(path) for path in paths}
    return {name: arrays for name, arrays in found.items() if arrays is not None}


def _curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    if not path.exists():
        return curves
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                step = int(row.pop("step"))
                numbers = {name: float(cell) for name, cell in row.items() if cell}
            except (ValueError, TypeError):
                continue  # a line that a kill cut short
            for name, value in numbers.items():
                if math.isfinite(value):
                    curves.setdefault(name, []).append((step, value))
    return {name: sorted(curve) for name, curve in curves.items()}
