"""What evaluations draw: curves with bands, points with names, sheets of images, neighbours."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from unlabeled.report import pictures
from unlabeled.report.charts import axis, grid, number, path, svg, text

Arrays = Mapping[str, np.ndarray]
LARGE = 256  # pixels of a picture


@dataclass(frozen=True)
class Figure:
    """One figure of an evaluation, ready for the page."""

    title: str
    note: str
    drawing: Markup | None = None
    names: list[str] = field(default_factory=list)  # of the curves, in the order of colours
    columns: list[tuple[str, list[str]]] = field(default_factory=list)  # of a sheet
    large: bool = False  # whether its pictures show too much to be made small
    queries: list[pictures.Query] = field(default_factory=list)
    parts: list[tuple[str, Markup]] = field(default_factory=list)  # small drawings of one panel


def figures(named: Mapping[str, Arrays]) -> list[Figure]:
    """Every figure by its `kind`; curves of one `panel` are small and share it, in `order`."""
    made: list[Figure] = []
    panels: dict[tuple[str, str], Figure] = {}
    for name, arrays in sorted(named.items(), key=lambda item: int(item[1].get("order", 0))):
        one = figure(name, arrays)
        if not (panel := _word(arrays, "panel")):
            made.append(one)
            continue
        owner = name.removesuffix(_word(arrays, "part"))
        title = one.title.replace(_word(arrays, "title"), panel)
        key = (title, owner)
        if key not in panels:
            panels[key] = Figure(title, one.note, names=one.names)
            made.append(panels[key])
        small = curves(arrays, width=340, height=200)
        panels[key].parts.append((_word(arrays, "part"), small))
    return made


def figure(name: str, arrays: Arrays) -> Figure:
    """A figure by its `kind`: see `unlabeled.evaluate.contract.Result`.

    Raises:
        ValueError: for another kind.
    """
    kind, title, note = (_word(arrays, key) for key in ("kind", "title", "note"))
    title = title or name
    for baseline, words in (("random", "random initialisation"), ("pixels", "raw pixels")):
        if name.startswith(f"baseline.{baseline}."):
            title = f"{title}: {words}"
    if kind == "neighbours":
        return Figure(title, note, queries=pictures.queries(arrays))
    if kind == "sheet":
        large = arrays["column0"].shape[2] >= LARGE
        return Figure(title, note, columns=pictures.samples(arrays), large=large)
    if kind == "curves":
        return Figure(title, note, curves(arrays), [str(n) for n in arrays["names"]])
    if kind == "points":
        return Figure(title, note, points(arrays))
    raise ValueError(f"the figure {name} is of an unknown kind {kind!r}")


def curves(arrays: Arrays, *, width: int = 1040, height: int = 300) -> Markup:
    """Lines through the points of every series, over a shared axis.

    Args:
        arrays: `x` (n,), `y` (series, n), NaN where there is no value, optionally `low` and
            `high` (series, n), `ticks` (n,) words for the places on the x axis, `xlabel`,
            `ylabel`, `log` (true: a logarithmic x axis), `percent`, `dashed` (series,) bool.
        width: of the drawing, in its own units.
        height: likewise.
    """
    xs, ys = arrays["x"].astype(float), np.atleast_2d(arrays["y"]).astype(float)
    low, high = (np.atleast_2d(arrays.get(k, ys)).astype(float) for k in ("low", "high"))
    log, percent = bool(arrays.get("log", False)), bool(arrays.get("percent", False))
    left, right, top, bottom = 64, width - 16, _top(arrays), height - 44
    place = np.log(xs) if log else xs
    first, last = place.min(), place.max()
    bottom_value, top_value, ticks = axis(float(np.nanmin(low)), float(np.nanmax(high)), 5)

    def x(value: float) -> float:
        return left + 8 + (value - first) / max(last - first, 1e-12) * (right - left - 16)

    def y(value: float) -> float:
        return bottom - (value - bottom_value) / (top_value - bottom_value) * (bottom - top)

    out = grid(ticks, y, left, right, percent=percent)
    said = (
        [str(tick) for tick in arrays["ticks"]] if "ticks" in arrays else map(number, xs.tolist())
    )
    every = 1 if "ticks" in arrays else math.ceil(36 * len(place) / (right - left))
    for word, at in [*zip(said, place.tolist(), strict=True)][:: max(1, every)]:
        out.append(text(x(at), bottom + 18, word, "middle"))
    for i in range(len(ys)):
        known = np.flatnonzero(np.isfinite(ys[i]))
        line = [(x(float(place[j])), y(ys[i, j])) for j in known]
        if not line:
            continue
        if "low" in arrays and len(line) > 1:
            upper = [(x(float(place[j])), y(high[i, j])) for j in known]
            lower = [(x(float(place[j])), y(low[i, j])) for j in reversed(known)]
            out.append(f'<path class="band s{i % 10}" d="{path([*upper, *lower])}Z"/>')
        css = "line dashed" if "dashed" in arrays and arrays["dashed"][i] else "line"
        out.append(f'<path class="{css} s{i % 10}" d="{path(line)}"/>')
        for j, (px, py) in zip(known, line, strict=True):
            tip = f"<title>{number(xs[j])}: {number(ys[i, j], percent=percent)}</title>"
            out.append(
                f'<circle class="end s{i % 10}" cx="{px:.1f}" cy="{py:.1f}" r="3">{tip}</circle>'
            )
    return svg(width, height, [*out, *_labels(arrays, left, right, height)])


def points(arrays: Arrays, *, width: int = 1040, height: int = 380) -> Markup:
    """Named points in a plane.

    Args:
        arrays: `x` (n,), `y` (n,), `names` (n,), optionally `group` (n,) int, which colours,
            `xlabel`, `ylabel`, `percent` (of the y axis).
        width: of the drawing, in its own units.
        height: likewise.
    """
    xs, ys = arrays["x"].astype(float), arrays["y"].astype(float)
    names = [str(name) for name in arrays["names"]]
    group = arrays.get("group", np.zeros(len(xs), dtype=int))
    percent = bool(arrays.get("percent", False))
    left, right, top, bottom = 64, width - 90, _top(arrays), height - 44
    x_low, x_high, x_ticks = axis(float(np.nanmin(xs)), float(np.nanmax(xs)), 6)
    y_low, y_high, y_ticks = axis(float(np.nanmin(ys)), float(np.nanmax(ys)), 5)

    def x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - top)

    out = grid(y_ticks, y, left, right, percent=percent)
    out += [text(x(tick), bottom + 18, number(tick), "middle") for tick in x_ticks]
    for px, py, name, colour in zip(xs, ys, names, group, strict=True):
        if not (math.isfinite(px) and math.isfinite(py)):
            continue
        out.append(
            f'<circle class="end s{int(colour) % 10}" cx="{x(px):.1f}" cy="{y(py):.1f}" r="5">'
            f"<title>{escape(name)}: {number(px)}, {number(py, percent=percent)}</title></circle>"
        )
        out.append(text(x(px) + 8, y(py) + 4, name, "start", "label"))
    return svg(width, height, [*out, *_labels(arrays, left, right, height)])


def _top(arrays: Arrays) -> int:
    """Where the drawing begins: below the label of the y axis, if there is one."""
    return 32 if _word(arrays, "ylabel") else 14


def _labels(arrays: Arrays, left: float, right: float, height: int) -> list[str]:
    out = []
    if said := _word(arrays, "xlabel"):
        out.append(text((left + right) / 2, height - 6, said, "middle", "label"))
    if said := _word(arrays, "ylabel"):
        out.append(text(left, 10, said, "start", "label"))
    return out


def _word(arrays: Arrays, key: str) -> str:
    value: Any = arrays.get(key, "")
    return str(value)
