"""The benchmark's ratios beside their bars, and how costs grow, as one picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from bench_rows import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a backend without a screen


def draw(rows: Sequence[Row], path: Path) -> None:
    """Two panels where there is something for both: ratios on the left, growth on the right."""
    ratios = [r for r in rows if r.value is not None and r.unit and not r.curve]
    curves = [r for r in rows if r.value is not None and r.curve]
    panels = [kind for kind in (ratios, curves) if kind]
    if not panels:
        return
    height = max(3.0, 0.3 * len(ratios) + 1)
    figure, axes = plt.subplots(1, len(panels), figsize=(9 * len(panels), height), squeeze=False)
    for axis, kind in zip(axes[0], panels, strict=True):
        (_bars if kind is ratios else _curves)(axis, kind)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: plt.Axes, rows: Sequence[Row]) -> None:
    places = range(len(rows), 0, -1)
    values = [row.value or 0.0 for row in rows]
    colors = ["#c0392b" if row.missed else "#2a7f62" for row in rows]
    low = [v - min(r.values) for v, r in zip(values, rows, strict=True)]
    high = [max(r.values) - v for v, r in zip(values, rows, strict=True)]
    axis.barh(places, values, xerr=[low, high], color=colors, height=0.6, ecolor="#888888")
    for place, row in zip(places, rows, strict=True):
        if row.bar is not None:
            axis.plot([row.bar] * 2, [place - 0.45, place + 0.45], color="black")
    axis.set_yticks(list(places), [row.name for row in rows], fontsize=7)
    axis.set_xscale("log")
    axis.set_xlabel("ratio; black: the bar; red: missed")


def _curves(axis: plt.Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        sizes, times = zip(*row.curve, strict=True)
        if min(sizes) < 1:  # workers: 0 has no logarithm
            continue
        each = [t / n for n, t in zip(sizes, times, strict=True)]
        label = row.name.partition(":")[0]
        axis.plot([n / sizes[0] for n in sizes], [e / each[0] for e in each], "o-", label=label)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("size / smallest size")
    axis.set_ylabel("cost of one item / at the smallest size; rising: worse than linear")
    axis.legend(fontsize=8)
