"""Rows of the benchmark's table, and which of them miss their bar."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

HEAD = ("what", "ratio", "spread", "bar", "ours", "other", "measured")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        name: what is compared with what.
        values: the ratio in each round, or one count; none if nothing was measured.
        bar: what their median must reach, if anything must be reached.
        better: whether high or low values are better.
        ours: the measurement of this package, in words.
        other: the measurement of what it is compared with, in words.
        note: how it was measured, or why it was not.
        unit: "x" for ratios; empty for counts.
        curve: sizes with the seconds that each took, where the row says how these grow.
    """

    name: str
    values: Sequence[float] = ()
    bar: float | None = None
    better: Literal["high", "low"] = "high"
    ours: str = ""
    other: str = ""
    note: str = ""
    unit: str = "x"
    curve: Sequence[tuple[int, float]] = ()

    @property
    def value(self) -> float | None:
        """The median over rounds."""
        return statistics.median(self.values) if self.values else None

    @property
    def missed(self) -> bool:
        """Whether a bar was not reached; what was not measured misses none."""
        if self.value is None or self.bar is None:
            return False
        # `not` of the good case, so that NaN misses too
        return not (self.value >= self.bar if self.better == "high" else self.value <= self.bar)

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEAD."""
        value = "-" if self.value is None else self._text(self.value)
        several = len(self.values) > 1
        spread = f"{min(self.values):.2f}-{max(self.values):.2f}" if several else ""
        sign = "≥" if self.better == "high" else "≤"
        bar = "" if self.bar is None else f"{sign} {self.bar:g}{self.unit}"
        return (self.name, value, spread, bar, self.ours, self.other, self.note)

    def _text(self, value: float) -> str:
        return f"{value:.2f}{self.unit}" if self.unit else f"{value:g}"

    def record(self) -> dict[str, Any]:
        """The row for a file."""
        return {**asdict(self), "value": self.value, "missed": self.missed}


def misses(rows: Sequence[Row]) -> list[str]:
    """A line for every bar that was not reached."""
    return [f"{r.name}: {r.cells()[1]}, the bar is {r.cells()[3]}" for r in rows if r.missed]


def markdown(rows: Sequence[Row]) -> str:
    """The table for a README."""
    table = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def seconds(values: Sequence[float]) -> str:
    """Durations in words: the median, and the least."""
    median, least = statistics.median(values), min(values)
    if median < 1:
        return f"{median * 1e3:.0f} ms (least {least * 1e3:.0f})"
    return f"{median:.2f} s (least {least:.2f})"


def per_round(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    """Ours over the other's, round by round: what slows a whole round cancels."""
    return [a / b for a, b in zip(ours, other, strict=True)]
