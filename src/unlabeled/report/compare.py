"""Many runs in one table and one page: `unlabeled method=none compare=[RUN,RUN,...]`."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unlabeled.report import compared, plots
from unlabeled.report.run import Run, read
from unlabeled.report.scores import Row, headline, leaders, rows

SAID = ("protocol", "stage", "selection", "split_hash", "seed", "epoch")  # no score is without
LONG = ("run", "score", "value", "low", "high", "random", "pixels", "supervised", *SAID)


@dataclass(frozen=True)
class Comparison:
    """The table's header and lines, as text, and where the page lies."""

    header: list[str]
    lines: list[list[str]]
    page: Path


def write(folders: Sequence[Path], out: Path) -> Comparison:
    """Writes comparison.csv, comparison.md and report.html of several runs.

    The CSV has a line for every score of every run, with its baselines, protocol, stage, selection,
    split hash, seed and epoch; the Markdown and the page a line per run with
    the scores of each protocol's headline, and the page also every protocol's accuracy by stage
    (a line per run, random initialisation dashed), low-shot curves, and performance against
    invariance where it was measured.

    Args:
        folders: of runs with scores.
        out: where the files go.

    Raises:
        ValueError: a folder has no scores, or is named twice.
    """
    runs = [read(folder) for folder in folders]
    if bare := [str(run.folder) for run in runs if not run.scores]:
        raise ValueError(f"compare: {bare[0]} has no scores.json: it is no finished run")
    names = _names(runs)
    tables = [rows(run.scores, run.details) for run in runs]
    header, lines, best = _table(names, tables)
    out.mkdir(parents=True, exist_ok=True)
    _csv(out / "comparison.csv", names, tables)
    _whole(out / "comparison.md", _markdown(header, lines))
    figures = [
        *compared.stages(names, tables),
        *compared.merged(names, runs, "lowshot"),
        *compared.invariance(names, tables),
    ]
    page = out / "report.html"
    _whole(page, _page(out, runs, names, header, lines, best, figures))
    return Comparison(header, lines, page)


def _names(runs: Sequence[Run]) -> list[str]:
    """What tells runs apart: folder names, with as many parents as that needs."""
    paths = [run.folder.resolve().parts for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError("compare names a run twice")
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("compare names a run twice")  # pragma: no cover (paths differ)


def _table(
    names: Sequence[str], tables: Sequence[list[Row]]
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """A column for the headline of each protocol of any run, chosen for no run apart.

    Its header, its lines, and the (line, column) of the best run under each headline.
    """
    shown: dict[str, None] = {}
    for table in tables:
        shown |= {row.name: None for row in headline(table)}
    by_name = [{row.name: row for row in table} for table in tables]
    best = {
        (i, column)
        for column, headed in enumerate(shown, 1)
        for i in leaders([known.get(headed) for known in by_name])
    }
    lines = []
    for name, known in zip(names, by_name, strict=True):
        line = [name]
        for column in shown:
            row = known.get(column)
            if row is None or "trained" not in row.scores:
                line.append("–")
                continue
            score = row.scores["trained"]
            spread = score.spread(share=row.share)
            line.append(f"{score.text(share=row.share)} {spread}".strip())
        lines.append(line)
    return ["run", *shown], lines, best


def _csv(path: Path, names: Sequence[str], tables: Sequence[list[Row]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(LONG)
        for name, table in zip(names, tables, strict=True):
            for row in table:
                own = row.scores.get("trained")
                if own is None:
                    continue
                beside = (row.scores.get(kind) for kind in ("random", "pixels", "supervised"))
                values = [own.value, own.low, own.high, *(s.value if s else None for s in beside)]
                values += [row.details.get(key) for key in SAID]
                writer.writerow([name, row.name, *("" if v is None else v for v in values)])
    os.replace(partial, path)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    marks = ["---", *["---:"] * (len(header) - 1)]
    cells = [[f"`{cell}`" for cell in header], marks, *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def _page(
    out: Path,
    runs: Sequence[Run],
    names: Sequence[str],
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    best: set[tuple[int, int]],
    figures: Sequence[plots.Figure],
) -> str:
    here = files("unlabeled.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((here / "compare.html.j2").read_text(encoding="utf-8"))
    about = [
        (name, run.choice("method") or "none", run.choice("backbone"), run.choice("data"))
        for name, run in zip(names, runs, strict=True)
    ]
    return template.render(
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        folder=out.resolve().name,
        header=header,
        lines=lines,
        best=best,
        about=about,
        figures=figures,
    )


def _whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
