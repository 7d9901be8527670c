"""report.html: what was done, how it went and how good it is, in one file without a network."""

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unlabeled.report import beside, charts, pictures, plots
from unlabeled.report.run import Curve, Run, read
from unlabeled.report.scores import TITLES, Row, headline, kinds, main, rows

PROTOCOLS = {"knn": "kNN", "linear": "Linear probe"}

# What the run's numbers mean: (column, title, note, how to draw it).
MONITORS: tuple[tuple[str, str, str, dict[str, bool]], ...] = (
    ("health/std", "Spread of embeddings", "1 isotropic, 0 collapsed", {"zero": True}),
    ("health/effective_rank", "Effective rank", "directions in use; 1 collapsed", {"zero": True}),
    ("health/mean_cosine", "Mean cosine", "between different images; 1 collapsed", {}),
    ("online/knn_top1", "Online kNN", "top-1 during training", {"percent": True}),
    ("online/linear_top1", "Online linear probe", "top-1 during training", {"percent": True}),
    ("held_out/accuracy", "Pretext accuracy", "on images not learned from", {"percent": True}),
    ("optim/lr", "Learning rate", "of the first parameter group", {"zero": True}),
    ("perf/images_per_second", "Images per second", "over all processes", {"zero": True}),
    ("perf/data_wait", "Waiting for data", "share of time", {"zero": True, "percent": True}),
)

SETTINGS = (
    ("epochs", "trainer.max_epochs"),
    ("batch", "data.batch_size"),
    ("optimizer", "method.optim.optimizer._target_"),
    ("base learning rate", "method.optim.lr"),
    ("weight decay", "method.optim.weight_decay"),
    ("precision", "trainer.precision"),
    ("seed", "seed"),
)


def write(run: Path) -> Path:
    """Makes report.html in a run's folder, from that folder's files only.

    Parts whose files are missing are left out.

    Raises:
        ValueError: the folder does not exist.
    """
    found = read(run)
    here = files("unlabeled.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        (here / "template.html.j2").read_text(encoding="utf-8"),
    )
    style = Markup((here / "style.css").read_text(encoding="utf-8"))
    page = template.render(style=style, titles=TITLES, **_content(found))
    path = found.folder / "report.html"
    temporary = path.with_name(".report.html.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _content(run: Run) -> dict[str, Any]:
    """Everything the template shows."""
    table = rows(run.scores, run.details)
    short = main(table)
    span = _span(short)
    state = str(run.status.get("state", ""))
    near = pictures.queries(run.neighbours) if run.neighbours else []
    settings, environment = _settings(run), _flat(run.status)
    points = run.embedding if run.embedding is not None and len(run.embedding["xy"]) else None
    return {
        "method": _class(run, "method") or "Evaluation",
        "data": run.choice("data"),
        "backbone": run.choice("backbone"),
        "state": state,
        "settings": settings,
        "cards": [_card(row) for row in headline(table)] + _facts(run),
        "rows": [(row, charts.ranges(row, *span) if row.share else "") for row in short],
        "scale": [f"{100 * v:.0f} %" for v in span] if any(r.share for r in short) else [],
        "table": table,
        "kinds": kinds(table),
        "stages": _stages(short),
        "loss": _loss(run.curves),
        "monitors": _monitors(run.curves),
        "queries": near,
        "hits": pictures.hit_rate(near),
        "samples": pictures.samples(run.samples) if run.samples else [],
        "figures": plots.figures(beside.together(run.figures, table)),
        "map": pictures.scatter(points) if points else None,
        "legend": pictures.legend(points) if points else [],
        "projection": str(points["method"]) if points and "method" in points else "",
        "config": run.text,
        "environment": environment,
        "folder": run.folder.resolve().name,
    }


def _class(run: Run, group: str) -> str:
    """The name of the class that a group builds: SimCLR."""
    return str(run.get(f"{group}._target_") or "").rsplit(".", 1)[-1]


def _settings(run: Run) -> list[tuple[str, str]]:
    """What a reader asks first: the common settings, then the method's own numbers."""
    found = [(title, run.get(path)) for title, path in SETTINGS]
    if (run.get("trainer.max_steps") or -1) > 0:
        found[0] = ("steps", run.get("trainer.max_steps"))
    own = run.get("method")
    for name, value in own.items() if isinstance(own, dict) else ():
        if isinstance(value, str | int | float) and not name.startswith("_"):
            found.append((name.replace("_", " "), value))
    return [
        (t, str(v).rsplit(".", 1)[-1] if t == "optimizer" else str(v))
        for t, v in found
        if v is not None
    ]


def _card(row: Row) -> dict[str, Any]:
    """A protocol's score with its distance to the baselines."""
    score, gains = row.scores["trained"], []
    for kind in ("random", "pixels"):
        if (gain := row.gain(kind)) is not None:
            text = f"{100 * gain:+.1f}" if row.share else f"{gain:+.3g}"
            gains.append((text, f"over {TITLES[kind]}", row.verdict(kind)))
    return {
        "title": PROTOCOLS.get(row.protocol, row.protocol),
        "value": score.text(share=row.share),
        "spread": score.spread(share=row.share),
        "gains": gains,
        "note": f"{row.metric}, {row.stage}" if row.stage else row.metric,
    }


def _facts(run: Run) -> list[dict[str, Any]]:
    """Cards about the training itself."""
    cards = []
    if speed := run.curves.get("perf/images_per_second"):
        middle = sorted(v for _, v in speed)[len(speed) // 2]
        wait = run.curves.get("perf/data_wait")
        note = f"{100 * sum(v for _, v in wait) / len(wait):.0f} % waiting for data" if wait else ""
        cards.append({"title": "Images per second", "value": f"{middle:,.0f}", "note": note})
    if rank := run.curves.get("health/effective_rank"):
        std = run.curves.get("health/std")
        note = f"spread {std[-1][1]:.2f} (1 isotropic)" if std else ""
        cards.append({"title": "Effective rank", "value": f"{rank[-1][1]:.1f}", "note": note})
    return [{"spread": "", "gains": [], **card} for card in cards]


def _span(table: list[Row]) -> tuple[float, float]:
    """The least and greatest of all scores that are shares, with their intervals."""
    scores = [s for row in table if row.share for s in row.scores.values()]
    ends = [v for s in scores for v in (s.value, s.low, s.high) if v is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    return low, high if high > low else low + 1e-3


def _stages(table: list[Row]) -> list[tuple[str, Markup]]:
    """A bar chart for every protocol that scores several stages."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in table:
        if row.share and "trained" in row.scores and "stage" in row.details:
            groups.setdefault((row.protocol, row.metric), []).append(row)
    return [
        (f"{PROTOCOLS.get(protocol, protocol)}, {metric} by stage", charts.bars(group))
        for (protocol, metric), group in groups.items()
        if len({row.details["stage"] for row in group}) > 1
    ]


def _loss(curves: dict[str, Curve]) -> tuple[Markup, list[str]] | None:
    """The loss, and its terms if it has several."""
    if "train/loss" not in curves:
        return None
    terms = sorted(n for n in curves if n.startswith("train/") and n != "train/loss")
    names = ["train/loss", *(terms if len(terms) > 1 else [])]
    series = [(name.removeprefix("train/"), curves[name]) for name in names]
    drawing = charts.line(series, width=1040, height=260, smooth=True)
    return drawing, [name for name, _ in series]


def _monitors(curves: dict[str, Curve]) -> list[tuple[str, str, Markup]]:
    known = [(t, note, name, how) for name, t, note, how in MONITORS if name in curves]
    listed = {name for name, *_ in MONITORS} | {"epoch"}
    rest = [n for n in curves if n not in listed and not n.startswith(("train/", "eval/"))]
    known += [(name, "", name, {}) for name in rest]
    return [(t, note, charts.line([(t, curves[name])], **how)) for t, note, name, how in known]


def _flat(node: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (name, value)."""
    out: list[tuple[str, str]] = []
    for name, value in node.items():
        title = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            out += _flat(value, "" if name == "versions" else f"{title} ")
        elif value not in (None, ""):
            out.append((title, str(value)))
    return out
