"""Charts as pixels, for dashboards that show pictures only."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unlabeled.report.scores import KINDS, TITLES, Row

WIDE, HIGH, DPI = 9.0, 4.0, 100  # inches, and pixels of one
COLOURS = {"trained": "#2563eb", "random": "#9ca3af", "pixels": "#d1d5db"}


def bars(title: str, rows: Sequence[Row]) -> np.ndarray:
    """Scores of every stage: the trained backbone's beside its baselines', with intervals."""
    kinds = [kind for kind in reversed(KINDS) if any(kind in row.scores for row in rows)]

    def draw(axes: Any) -> None:
        for i, kind in enumerate(kinds):
            known = [(x, row.scores[kind]) for x, row in enumerate(rows) if kind in row.scores]
            places = [x + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for x, _ in known]
            values = [score.value for _, score in known]
            below = [s.value - (s.value if s.low is None else s.low) for _, s in known]
            above = [(s.value if s.high is None else s.high) - s.value for _, s in known]
            axes.bar(places, values, 0.8 / len(kinds), label=TITLES[kind], color=COLOURS[kind])
            axes.errorbar(places, values, np.clip([below, above], 0, None), fmt="none", ecolor="k")
        axes.set_xticks(range(len(rows)), [str(row.details["stage"]) for row in rows])
        axes.legend()

    return _drawn(title, draw)


def curves(title: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """A figure of kind "curves": see `unlabeled.report.plots.curves`."""
    xs, ys = arrays["x"].astype(float), np.atleast_2d(arrays["y"]).astype(float)

    def draw(axes: Any) -> None:
        for i, name in enumerate(arrays["names"]):
            known = np.isfinite(ys[i])
            axes.plot(xs[known], ys[i][known], marker="o", label=str(name))
            if "low" in arrays and "high" in arrays:
                low, high = (np.atleast_2d(arrays[key])[i][known] for key in ("low", "high"))
                axes.fill_between(xs[known], low, high, alpha=0.2)
        if bool(arrays.get("log", False)):
            axes.set_xscale("log")
        if "ticks" in arrays:
            axes.set_xticks(xs, [str(tick) for tick in arrays["ticks"]])
            axes.minorticks_off()
        _labels(axes, arrays)
        axes.legend()

    return _drawn(title, draw)


def points(title: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """A figure of kind "points": see `unlabeled.report.plots.points`."""
    xs, ys = arrays["x"].astype(float), arrays["y"].astype(float)

    def draw(axes: Any) -> None:
        axes.scatter(xs, ys, c=arrays.get("group", np.zeros(len(xs))), cmap="tab10", vmax=9, vmin=0)
        for x, y, name in zip(xs, ys, arrays["names"], strict=True):
            if np.isfinite(x) and np.isfinite(y):
                axes.annotate(str(name), (x, y), xytext=(6, 2), textcoords="offset points")
        _labels(axes, arrays)

    return _drawn(title, draw)


def embedding(title: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The points of figures/embedding.npz, a colour per class."""
    xy, names = arrays["xy"], [str(name) for name in arrays["classes"]]

    def draw(axes: Any) -> None:
        for label in np.unique(arrays["label"]):
            mine = xy[arrays["label"] == label]
            known = 0 <= label < len(names)
            axes.scatter(*mine.T, s=4, label=names[label] if known else f"class {label}")
        axes.set_aspect("equal")
        axes.set_axis_off()
        if len(np.unique(arrays["label"])) <= 20:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3)

    return _drawn(title, draw, high=7)


def _labels(axes: Any, arrays: Mapping[str, np.ndarray]) -> None:
    axes.set_xlabel(str(arrays.get("xlabel", "")))
    axes.set_ylabel(str(arrays.get("ylabel", "")))
    axes.grid(alpha=0.3)


def _drawn(title: str, draw: Callable[[Any], None], *, high: float = HIGH) -> np.ndarray:
    """uint8 (h, w, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE, high), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    draw(axes)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return np.asarray(Image.open(buffer).convert("RGB"))
