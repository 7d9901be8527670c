"""What dashboards show of a run when it has ended: the pictures and charts of its report."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from unlabeled.report import drawings
from unlabeled.report.html import PROTOCOLS
from unlabeled.report.run import Run
from unlabeled.report.scores import KINDS, TITLES, Row, main, rows
from unlabeled.shown import Images, Table, montage

Arrays = Mapping[str, np.ndarray]


def shown(run: Run) -> Iterator[Images | Table]:
    """Everything that a run's folder has to show, in the order of its report.

    Names begin with `stages/`, `neighbours/`, `embedding/`, `pretext/` or `figures/`.
    """
    yield from _stages(main(rows(run.scores, run.details)))
    if run.neighbours is not None:
        yield _neighbours("neighbours/test", "Nearest test images", run.neighbours)
    if run.embedding is not None and len(run.embedding["xy"]):
        yield _embedding(run.embedding)
    if run.samples is not None:
        yield _sheet("pretext/test", "Pretext task on test images", run.samples)
    for name, arrays in run.figures.items():
        yield _figure(name, arrays)


def scores(run: Run) -> dict[str, float]:
    """Scores under the names that curves have: eval/knn/k20_t0.07/top1."""
    return {f"eval/{name}": value for name, value in run.scores.items()}


def last_step(run: Run) -> int:
    """The last update that `metrics.csv` knows, counted from 0; 0 where nothing was trained."""
    return max((curve[-1][0] for curve in run.curves.values() if curve), default=0)


def _stages(table: list[Row]) -> Iterator[Table]:
    """A chart for every protocol that scores several stages."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in table:
        if row.share and "trained" in row.scores and "stage" in row.details:
            groups.setdefault((row.protocol, row.metric), []).append(row)
    for (protocol, metric), group in groups.items():
        if len({row.details["stage"] for row in group}) < 2:
            continue
        title = f"{PROTOCOLS.get(protocol, protocol)}, {metric} by stage"
        kinds = [kind for kind in reversed(KINDS) if any(kind in row.scores for row in group)]
        yield Table(
            f"stages/{protocol}_{metric}",
            title,
            ["stage", *(TITLES[kind] for kind in kinds)],
            [[str(row.details["stage"]), *(_value(row, k) for k in kinds)] for row in group],
            chart="bars",
            drawing=drawings.bars(title, group),
        )


def _value(row: Row, kind: str) -> float | None:
    return row.scores[kind].value if kind in row.scores else None


def _neighbours(name: str, title: str, arrays: Arrays) -> Table:
    """A row per query: its picture and class, then those of its neighbours, nearest first."""
    names = [str(c) for c in arrays["classes"]] if "classes" in arrays else []
    count = arrays["neighbours"].shape[1]

    def word(labels: str, *place: int) -> str:
        label = int(arrays[labels][place]) if labels in arrays else -1
        return names[label] if 0 <= label < len(names) else "" if label < 0 else f"class {label}"

    made = []
    for q, image in enumerate(arrays["queries"]):
        row: list[Any] = [image, word("query_labels", q)]
        for k in range(count):
            near = word("neighbour_labels", q, k)
            if "similarity" in arrays:
                near = f"{near} {arrays['similarity'][q, k]:.2f}".strip()
            row += [arrays["neighbours"][q, k], near]
        made.append(row)
    columns = [f"{what}{k}" for k in range(1, count + 1) for what in ("neighbour ", "class ")]
    return Table(name, title, ["query", "class", *columns], made)


def _embedding(arrays: Arrays) -> Table:
    names = [str(c) for c in arrays["classes"]]
    words = [names[y] if 0 <= y < len(names) else str(y) for y in arrays["label"].tolist()]
    how = str(arrays["method"]) if "method" in arrays else "a map"
    title = f"Test images by {how}"
    made = [[x, y, word] for (x, y), word in zip(arrays["xy"].tolist(), words, strict=True)]
    drawing = drawings.embedding(title, arrays)
    return Table("embedding/test", title, ["x", "y", "class"], made, "points", drawing)


def _sheet(name: str, title: str, arrays: Arrays) -> Images:
    columns = [arrays[f"column{i}"] for i in range(len(arrays["titles"]))]
    sheet = montage(list(zip(*columns, strict=True)))
    words = " | ".join(str(t) for t in arrays["titles"])
    return Images(name, [sheet], [f"{title}: {words}"])


def _figure(name: str, arrays: Arrays) -> Images | Table:
    """What an evaluation drew."""
    kind, title = str(arrays["kind"]), str(arrays.get("title", name))
    name = f"figures/{name}"
    if kind == "neighbours":
        return _neighbours(name, title, arrays)
    if kind == "sheet":
        return _sheet(name, title, arrays)
    if kind == "points":
        made = [
            [float(x), float(y), str(word)]
            for x, y, word in zip(arrays["x"], arrays["y"], arrays["names"], strict=True)
        ]
        columns = [_axis(arrays, "xlabel", "x"), _axis(arrays, "ylabel", "y"), "name"]
        return Table(name, title, columns, made, "points", drawings.points(title, arrays))
    if kind == "curves":
        ys = np.atleast_2d(arrays["y"]).astype(float)
        made = [
            [float(x), float(y), str(series)]
            for series, line in zip(arrays["names"], ys, strict=True)
            for x, y in zip(arrays["x"], line, strict=True)
            if np.isfinite(y)
        ]
        columns = [_axis(arrays, "xlabel", "x"), _axis(arrays, "ylabel", "y"), "series"]
        return Table(name, title, columns, made, "lines", drawings.curves(title, arrays))
    raise ValueError(f"the figure {name} is of an unknown kind {kind!r}")


def _axis(arrays: Arrays, key: str, default: str) -> str:
    return str(arrays.get(key, "")) or default
