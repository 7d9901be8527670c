"""The last thing a run prints."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unlabeled.report.compare import Comparison
from unlabeled.report.run import read
from unlabeled.report.scores import TITLES, kinds, main, rows

WIDTH = 1000  # where the output is a file: what is read there later shall not be cut
COLOURS = {"up": "green", "down": "red", "": "default"}  # of a gain


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def show(run: Path, *, console: Console | None = None) -> None:
    """Prints a run's scores: raw pixels, random initialisation and trained, side by side."""
    console = console or _console()
    found = read(run)
    table = Table(title="Scores, with 95 % intervals", title_justify="left")
    table.add_column("protocol", no_wrap=True)
    scores = rows(found.scores, found.details)
    columns = kinds(scores)
    for kind in columns:
        table.add_column(TITLES[kind], justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    last = ""
    for row in main(scores):
        if last and row.protocol != last:
            table.add_section()
        last = row.protocol
        cells = []
        for kind in columns:
            score = row.scores.get(kind)
            text = "–" if score is None else score.text(share=row.share)
            spread = "" if score is None else score.spread(share=row.share)
            style = "[bold]" if kind == "trained" and score else ""
            cells.append(f"{style}{text}{'[/]' if style else ''} [dim]{spread}[/]".rstrip())
        gain = row.gain("random")
        if gain is None:
            cells.append("–")
        else:
            text = f"{100 * gain:+.1f}" if row.share else f"{gain:+.3g}"
            cells.append(f"[{COLOURS[row.verdict('random')]}]{text}[/]")
        table.add_row(escape(row.name), *cells)
    if table.row_count:
        console.print(table)


def compare(found: Comparison, *, console: Console | None = None) -> None:
    """Prints a comparison: a line per run."""
    console = console or _console()
    table = Table(title="Runs", title_justify="left")
    for i, title in enumerate(found.header):
        table.add_column(escape(title), justify="right" if i else "left", no_wrap=True)
    for line in found.lines:
        table.add_row(*map(escape, line))
    console.print(table)
    console.print(f"[dim]{escape(str(found.page))}[/]")
