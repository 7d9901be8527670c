"""What is drawn of many runs together: by stage, low-shot, performance against invariance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unlabeled.report import plots
from unlabeled.report.run import Run, read
from unlabeled.report.scores import Row, headline


def stages(names: Sequence[str], tables: Sequence[list[Row]]) -> list[plots.Figure]:
    """For every protocol and metric with several stages: a line per run, and random's dashed.

    Where all runs have the same random network, its line is drawn once.
    """
    random: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    order: dict[tuple[str, str], dict[str, None]] = {}
    for name, table in zip(names, tables, strict=True):
        for row in table:
            if not row.share or "stage" not in row.details or "trained" not in row.scores:
                continue
            metric = row.name.replace(str(row.details["stage"]), "", 1)
            if metric == row.name:
                continue  # a score that no stage names
            key, stage = (row.protocol, metric.partition("/")[2].strip("/")), row.details["stage"]
            order.setdefault(key, {})[stage] = None
            found.setdefault(key, {}).setdefault(name, {})[stage] = row.scores["trained"].value
            if "random" in row.scores:
                value = row.scores["random"].value
                random.setdefault(key, {}).setdefault(name, {})[stage] = value
    figures = []
    for (protocol, metric), trained in found.items():
        stages = list(order[protocol, metric])
        if len(stages) < 2 or metric.endswith("top5"):
            continue
        blind = random.get((protocol, metric), {})
        if len(blind) == len(trained) and all(
            x == next(iter(blind.values())) for x in blind.values()
        ):
            blind = {"random init": next(iter(blind.values()))}
        else:
            blind = {f"{name}, random init": x for name, x in blind.items()}
        lines = {**trained, **blind}
        arrays: dict[str, Any] = {
            "x": np.arange(len(stages)),
            "y": np.array([[lines[n].get(s, np.nan) for s in stages] for n in lines]),
            "names": np.array(list(lines)),
            "ticks": np.array(stages),
            "percent": True,
            "dashed": np.array([name in blind for name in lines]),
        }
        figures.append(
            plots.Figure(f"{protocol}, {metric}, by stage", "", plots.curves(arrays), list(lines))
        )
    return figures


def merged(names: Sequence[str], runs: Sequence[Run], start: str) -> list[plots.Figure]:
    """Curves that several runs drew under one name, as one figure: a line per run and series.

    Supervised runs that are their baselines have dashed lines.
    """
    titles = {t for run in runs for t in run.figures if t.startswith(start)}
    baselines = _supervised(runs)
    names, runs = [*names, *baselines], [*runs, *baselines.values()]
    figures = []
    for title in sorted(titles):
        drawn = [
            (n, run.figures[title])
            for n, run in zip(names, runs, strict=True)
            if title in run.figures
        ]
        drawn = [(n, a) for n, a in drawn if str(a.get("kind", "")) == "curves"]
        alike = [(n, a) for n, a in drawn if np.array_equal(a["x"], drawn[0][1]["x"])]
        if len(alike) < 2:
            continue
        series = [f"{n}: {s}" for n, a in alike for s in a["names"]]
        merged: dict[str, Any] = dict(alike[0][1])
        dashed = [n in baselines for n, a in alike for _ in a["names"]]
        merged |= {"names": np.array(series), "dashed": np.array(dashed)}
        for key in ("y", "low", "high"):
            if all(key in a for _, a in alike):
                merged[key] = np.concatenate([np.atleast_2d(a[key]) for _, a in alike])
            else:
                merged.pop(key, None)
        figures.append(
            plots.Figure(str(merged.get("title", title)), "", plots.curves(merged), series)
        )
    return figures


def _supervised(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs that `baseline.supervised` names and that are not compared themselves, by name."""
    shown = {run.folder.resolve() for run in runs}
    named = [Path(path).resolve() for run in runs if (path := run.get("baseline.supervised"))]
    folders = [path for path in dict.fromkeys(named) if path not in shown and path.is_dir()]
    if len(folders) == 1:
        return {"supervised": read(folders[0])}
    return {f"supervised, {path}": read(path) for path in folders}


def invariance(names: Sequence[str], tables: Sequence[list[Row]]) -> list[plots.Figure]:
    """Performance against invariance, a point per run, where both were measured."""
    x, y, shown = [], [], []
    metric = ""
    for name, table in zip(names, tables, strict=True):
        last: dict[str, float] = {}  # transform -> of the deepest stage, which comes last
        for row in table:
            if row.protocol == "invariance" and row.metric == "relative":
                *_, above, transform = row.name.split("/")[:-1]
                # Neither the evaluation's own mean nor factors of a scene, whose names may be
                # those of transforms.
                if transform != "mean" and above != "redrawn":
                    last[transform] = row.scores["trained"].value
        best = [r for r in headline(table) if r.share and r.protocol in ("linear", "knn")]
        if last and best:
            metric = best[-1].name
            x.append(float(np.mean(list(last.values()))))
            y.append(best[-1].scores["trained"].value)
            shown.append(name)
    if len(shown) < 2:
        return []
    arrays: Mapping[str, Any] = {
        "x": np.array(x),
        "y": np.array(y),
        "names": np.array(shown),
        "xlabel": "mean relative distance under transforms (left: invariant)",
        "ylabel": metric,
        "percent": True,
    }
    return [plots.Figure("Performance against invariance", "", plots.points(arrays))]
