"""Scores beside their baselines, as both the page and the terminal show them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("pixels", "random", "trained")  # the columns, worst informed first
TITLES = {"pixels": "raw pixels", "random": "random init", "trained": "trained"}
TITLES["supervised"] = "supervised"  # a column where `baseline.supervised` names a run
PREFIX = {"pixels": "baseline/pixels/", "random": "baseline/random/", "trained": ""}


@dataclass(frozen=True)
class Score:
    """One number and its 95 % interval, if there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, *, share: bool) -> str:
        """The number, as a percentage where it is a share."""
        return f"{100 * self.value:.1f} %" if share else f"{self.value:.4g}"

    def spread(self, *, share: bool) -> str:
        """Half the width of the interval."""
        if self.low is None or self.high is None:
            return ""
        half = (self.high - self.low) / 2
        return f"± {100 * half:.1f}" if share else f"± {half:.2g}"


@dataclass(frozen=True)
class Row:
    """One protocol's scores of raw pixels, random initialisation and the trained backbone."""

    name: str  # e.g. linear/res5/top1
    scores: Mapping[str, Score]  # by kind
    details: Mapping[str, Any]

    @property
    def protocol(self) -> str:
        """The first part of the name: knn, linear."""
        return self.name.split("/")[0]

    @property
    def stage(self) -> str:
        """What a linear probe reads; the hyperparameters for others."""
        return "/".join(self.name.split("/")[1:-1])

    @property
    def metric(self) -> str:
        """The last part of the name: top1."""
        return self.name.split("/")[-1]

    @property
    def share(self) -> bool:
        """Whether the numbers are shares, to be shown in percent."""
        known = self.details.get("share", True)  # false: a distance may be below 1 too
        return bool(known) and all(0 <= s.value <= 1 for s in self.scores.values())

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is, 0 where neither is."""
        return {"lower": -1, "neither": 0}.get(str(self.details.get("better")), 1)

    def verdict(self, over: str) -> str:
        """Whether trained is better than a baseline: "up" for yes, "down" for no, or ""."""
        gain = (self.gain(over) or 0.0) * self.sign
        return "up" if gain > 0 else "down" if gain < 0 else ""

    def gain(self, over: str) -> float | None:
        """How far trained is above a baseline."""
        if "trained" not in self.scores or over not in self.scores:
            return None
        return self.scores["trained"].value - self.scores[over].value


def rows(scores: Mapping[str, float], details: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row per protocol and stage, in the order of the scores."""
    names: dict[str, None] = {}
    for name in scores:
        kind = _kind(name)
        base = name.removeprefix(PREFIX[kind])
        if kind == "trained" or (base not in names and not _stands_in(base)):
            names[base] = None
    made = []
    for base in names:
        keys = {kind: _key(base, kind, scores) for kind in KINDS}
        found = {k: _score(name, scores, details) for k, name in keys.items() if name}
        own = details.get(keys["trained"] or "", {})
        labels = own.get("baselines", {}).get("supervised")
        if isinstance(labels, int | float):
            found["supervised"] = Score(labels)
        made.append(Row(base, found, own))
    return made


def kinds(table: list[Row]) -> tuple[str, ...]:
    """The columns that a table needs."""
    known = any("supervised" in row.scores for row in table)
    return (*KINDS, "supervised") if known else KINDS


def main(table: list[Row]) -> list[Row]:
    """The rows worth a place in a short table: no top-5 where there is a top-1."""
    names = {row.name for row in table}
    return [r for r in table if r.metric != "top5" or r.name[:-1] + "1" not in names]


def headline(table: list[Row]) -> list[Row]:
    """One row per protocol: its last, the deepest stage or the largest k."""
    return list({row.protocol: row for row in main(table) if "trained" in row.scores}.values())


def leaders(column: Sequence[Row | None]) -> set[int]:
    """Where one score of several runs, None where it is missing, is at its best."""
    known = {i: row for i, row in enumerate(column) if row is not None and "trained" in row.scores}
    value = {i: row.sign * row.scores["trained"].value for i, row in known.items() if row.sign}
    return {i for i, v in value.items() if v == max(value.values())}


def _kind(name: str) -> str:
    return next((k for k in ("pixels", "random") if name.startswith(PREFIX[k])), "trained")


def _stands_in(base: str) -> bool:
    return "pixels" in base.split("/")


def _key(base: str, kind: str, scores: Mapping[str, float]) -> str | None:
    """The name of the score that belongs in a row's column."""
    name = PREFIX[kind] + base
    if name in scores:
        return name
    if kind == "pixels":  # pixels have no stages: one probe of them stands beside all
        first, *rest = base.split("/")
        name = "/".join([PREFIX[kind] + first, "pixels", *(rest[1:] or rest)])
        return name if name in scores else None
    return None


def _score(
    name: str, scores: Mapping[str, float], details: Mapping[str, Mapping[str, Any]]
) -> Score:
    low, high = details.get(name, {}).get("ci95") or (None, None)
    return Score(scores[name], low, high)
