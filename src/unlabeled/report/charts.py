"""Small crisp charts as SVG. Their colours are the page's, so they follow light and dark."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from unlabeled.report.run import Curve
from unlabeled.report.scores import Row, Score

POINTS = 400  # of a line: more than pixels to tell them apart


def line(
    series: Sequence[tuple[str, Curve]],
    *,
    width: int = 340,
    height: int = 170,
    percent: bool = False,
    smooth: bool = False,
    zero: bool = False,
) -> Markup:
    """Curves over steps.

    Args:
        series: (name, curve); at least one point each.
        width: of the drawing, in its own units.
        height: likewise.
        percent: values are shares.
        smooth: draw a moving average in front of the values.
        zero: the vertical axis begins at 0.
    """
    values = [v for _, curve in series for _, v in curve]
    steps = [s for _, curve in series for s, _ in curve]
    low, high, ticks = axis(0.0 if zero else min(values), max(values), 4 if height < 220 else 5)
    first, last = min(steps), max(max(steps), min(steps) + 1)
    left, right, top, bottom = 50, width - 12, 10, height - 24

    def x(step: float) -> float:
        return left + (step - first) / (last - first) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    out = grid(ticks, y, left, right, percent=percent)
    for tick in axis(first, last, max(3, width // 130))[2]:
        if first <= tick <= last:
            out.append(text(x(tick), height - 6, number(tick), "middle"))
    for i, (name, curve) in enumerate(series):
        curve = _thin(curve)
        points = [(x(s), y(v)) for s, v in curve]
        title = f"<title>{escape(name)}: {number(curve[-1][1], percent=percent)}</title>"
        if smooth and len(curve) > 20:
            out.append(f'<path class="line faint s{i % 10}" d="{path(points)}"/>')
            points = [(x(s), y(v)) for s, v in _average(curve)]
        out.append(f'<path class="line s{i % 10}" d="{path(points)}">{title}</path>')
        px, py = points[-1]
        out.append(f'<circle class="end s{i % 10}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>')
    return svg(width, height, out)


def bars(table: Sequence[Row], *, width: int = 1040, height: int = 260) -> Markup:
    """Trained beside random initialisation at every stage, raw pixels as a line across.

    Args:
        table: rows of one protocol and metric whose values are shares.
        width: of the drawing, in its own units.
        height: likewise.
    """
    tops = [s.high if s.high is not None else s.value for r in table for s in r.scores.values()]
    _, high, ticks = axis(0.0, max(tops), 4)
    left, right, top, bottom = 50, width - 92, 16, height - 28

    def y(value: float) -> float:
        return bottom - value / high * (bottom - top)

    out = grid(ticks, y, left, right, percent=True)
    if (pixels := next((r.scores["pixels"] for r in table if "pixels" in r.scores), None)) and (
        pixels.value <= high
    ):
        level = y(pixels.value)
        out.append(f'<path class="pixels dashed" d="M{left} {level:.1f}H{right}"/>')
        out.append(text(right + 6, level - 3, "raw pixels", "start"))
        out.append(text(right + 6, level + 11, number(pixels.value, percent=True), "start"))
    slot = (right - left) / len(table)
    bar = min(64.0, slot * 0.34)
    for i, row in enumerate(table):
        centre = left + slot * (i + 0.5)
        for kind, start in (("random", centre - bar - 2), ("trained", centre + 2)):
            if (score := row.scores.get(kind)) is not None:
                out += _bar(score, kind, start, bar, y, bottom)
        out.append(text(centre, height - 8, row.stage, "middle", "label"))
    return svg(width, height, out)


def ranges(row: Row, low: float, high: float) -> Markup:
    """The three scores of a row and their intervals on one line from low to high."""
    width, height = 220, 22

    def x(value: float) -> float:
        return 8 + (value - low) / (high - low) * (width - 16)

    out = [f'<path class="grid" d="M8 11H{width - 8}"/>']
    for kind, score in row.scores.items():
        if score.low is not None and score.high is not None:
            out.append(
                f'<path class="interval {kind}" d="M{x(score.low):.1f} 11H{x(score.high):.1f}"/>'
            )
    for kind, score in row.scores.items():
        title = f"<title>{kind}: {number(score.value, percent=row.share)}</title>"
        out.append(
            f'<circle class="dot {kind}" cx="{x(score.value):.1f}" cy="11" r="4.5">{title}</circle>'
        )
    return svg(width, height, out, css="ranges")


def _bar(score: Score, kind: str, start: float, bar: float, y, bottom: float) -> list[str]:
    top, middle = y(score.value), start + bar / 2
    out = [
        f'<rect class="bar {kind}" x="{start:.1f}" y="{top:.1f}" width="{bar:.1f}" '
        f'height="{max(0.0, bottom - top):.1f}" rx="3"/>'
    ]
    base = top
    if score.low is not None and score.high is not None:
        base = y(score.low)
        out.append(f'<path class="whisker" d="M{middle:.1f} {base:.1f}V{y(score.high):.1f}"/>')
    # Inside the bar, where neither the whisker nor the pixels' line crosses it.
    inside = bottom - base > 24
    place, css = (base + 16, "inside") if inside else (min(top, base) - 8, f"value {kind}")
    return [*out, text(middle, place, f"{100 * score.value:.1f}", "middle", css)]


def grid(ticks: Sequence[float], y, left: float, right: float, *, percent: bool) -> list[str]:
    """Horizontal lines at ticks, with their numbers."""
    out = []
    for tick in ticks:
        out.append(f'<path class="grid" d="M{left} {y(tick):.1f}H{right}"/>')
        out.append(text(left - 8, y(tick) + 4, number(tick, percent=percent), "end"))
    return out


def svg(width: int, height: int, parts: list[str], css: str = "chart") -> Markup:
    """A drawing of its parts."""
    body = "".join(parts)
    return Markup(f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img">{body}</svg>')


def text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    """Words in a drawing, escaped."""
    mark = f' class="{css}"' if css else ""
    return f'<text{mark} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def path(points: Sequence[tuple[float, float]]) -> str:
    """Straight lines through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def axis(low: float, high: float, count: int) -> tuple[float, float, list[float]]:
    """Round ticks, and the range that they span around the data."""
    if high - low < 1e-12 + 1e-6 * abs(high):
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [k * step for k in range(begin, end + 1)]
    return ticks[0], ticks[-1], ticks


def number(value: float, *, percent: bool = False) -> str:
    """A number, short."""
    if percent:
        return f"{100 * value:.3g} %"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g} k"
    return f"{value:.4g}"


def _thin(curve: Curve) -> Curve:
    """At most POINTS points, each the mean of its neighbours, the last one kept."""
    size = math.ceil(len(curve) / POINTS)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(g[-1][0], sum(v for _, v in g) / len(g)) for g in groups]


def _average(curve: Curve) -> Curve:
    """The mean over a window of a twentieth of the curve around every point."""
    half = max(1, len(curve) // 40)
    out = []
    for i, (step, _) in enumerate(curve):
        near = curve[max(0, i - half) : i + half + 1]
        out.append((step, sum(v for _, v in near) / len(near)))
    return out
