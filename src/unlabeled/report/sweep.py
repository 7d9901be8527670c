"""The table of a sweep: sweep.csv, sweep.md and sweep.html in its folder."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unlabeled.report.scores import Row, headline, leaders, rows

FIXED = ("member", "status", "seconds", "tries", "job", "reason", "overrides")  # the CSV's first


@dataclass(frozen=True)
class _Line:
    member: Mapping[str, Any]  # its record
    scores: dict[str, float]
    shown: dict[str, Row]  # headline score -> its row


def write(sweep: Path) -> list[str]:
    """Writes the table as the records and scores of members are now; any process may, any time.

    The CSV has every score, the others the headline of each protocol, with the objective first.

    Args:
        sweep: a sweep's folder, which holds .members/NUMBER.json.

    Returns:
        The headline scores' names.
    """
    waits = _json(sweep / ".members/waits")
    lines = [_line(sweep, path, waits) for path in (sweep / ".members").glob("*.json")]
    lines = sorted((line for line in lines if line), key=lambda line: line.member["number"])
    objective = next((o for line in lines if (o := line.member["objective"])), None)
    keys = differing([line.member["overrides"] for line in lines])
    names = _headlines(lines, objective)
    _whole(sweep / "sweep.csv", _csv(lines, objective))
    header = ["member", *keys, "status", "time", *names, "reason"]
    cells = [_cells(line, keys, names) for line in lines]
    _whole(sweep / "sweep.md", _markdown(header, cells))
    _whole(sweep / "sweep.html", _page(sweep, header, cells, lines, keys, names))
    return names


def differing(overrides: Sequence[Sequence[str]]) -> list[str]:
    """The keys whose values are not the same in all members, in the order of the command line."""
    given = [dict(_split(line) for line in lines) for lines in overrides]
    keys = dict.fromkeys(k for one in given for k in one if not k.startswith("launcher."))
    return [key for key in keys if len({one.get(key) for one in given}) > 1]


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def _line(sweep: Path, path: Path, waits: Mapping[str, Any]) -> _Line | None:
    member = _json(path)
    if "number" not in member:
        return None
    state, why = waits.get(str(member["number"]), ("", ""))
    if member["state"] == "queued" and state == "PENDING":
        member["reason"] = f"SLURM: {why}"
    folder = sweep / member["folder"] if member["folder"] else None
    scores = _json(folder / "scores.json") if folder else {}
    table = rows(scores, _json(folder / "scores_details.json")) if folder and scores else []
    return _Line(member, scores, {row.name: row for row in table if "trained" in row.scores})


def _headlines(lines: Sequence[_Line], objective: str | None) -> list[str]:
    names: dict[str, None] = {}
    if objective and any(objective in line.shown for line in lines):
        names[objective] = None
    for line in lines:
        names |= {row.name: None for row in headline(list(line.shown.values()))}
    return list(names)


def _cells(line: _Line, keys: Sequence[str], names: Sequence[str]) -> list[str]:
    member = line.member
    given = dict(_split(override) for override in member["overrides"])
    scores = []
    for name in names:
        row = line.shown.get(name)
        scores.append("–" if row is None else row.scores["trained"].text(share=row.share))
    return [
        str(member["number"]),
        *(given.get(key, "") for key in keys),
        member["state"],
        clock(member["seconds"]) if member["seconds"] else "–",
        *scores,
        member["reason"] or "",
    ]


def _csv(lines: Sequence[_Line], objective: str | None) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line.scores))
    names.sort(key=lambda name: name != objective)  # it comes first, the rest as they were
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*FIXED, *names])
    for line in lines:
        m = line.member
        fixed = [m["number"], m["state"], m["seconds"], m["tries"], m["job"] or ""]
        fixed += [m["reason"] or "", " ".join(m["overrides"])]
        writer.writerow([*fixed, *(line.scores.get(name, "") for name in names)])
    return text.getvalue()


def _markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [[f"`{title}`" for title in header], ["---"] * len(header)]
    lines += [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _page(
    sweep: Path,
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    lines: Sequence[_Line],
    keys: Sequence[str],
    names: Sequence[str],
) -> str:
    here = files("unlabeled.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((here / "sweep.html.j2").read_text(encoding="utf-8"))
    first = len(keys) + 3  # the column of the first score
    best: set[tuple[int, int]] = set()
    for i, name in enumerate(names):
        best |= {(n, first + i) for n in leaders([line.shown.get(name) for line in lines])}
    links = [
        f"{line.member['folder']}/report.html"
        if line.member["folder"] and (sweep / line.member["folder"] / "report.html").exists()
        else ""
        for line in lines
    ]
    states: dict[str, int] = {}
    for line in lines:
        states[line.member["state"]] = states.get(line.member["state"], 0) + 1
    common = [
        o for o in (lines[0].member["overrides"] if lines else []) if _split(o)[0] not in keys
    ]
    return template.render(
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        folder=sweep.resolve().name,
        header=header,
        cells=cells,
        best=best,
        links=links,
        states=states,
        common=common,
        numbers=range(first - 1, first + len(names)),
    )


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there, or not yet


def _whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
