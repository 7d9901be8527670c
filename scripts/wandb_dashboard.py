"""Builds a workspace and a report at Weights & Biases for the runs of a project.

    python scripts/wandb_dashboard.py --entity me --project unlabeled
    python scripts/wandb_dashboard.py --entity me --group 2026-01-31_12-00-00
    python scripts/wandb_dashboard.py --dry-run --out dashboard.json

The workspace has a section each for scores and their baselines, stages, neighbours and embedding,
training, health, speed, views and the pretext task, and the machine; the report the same with
words between, over the runs of one sweep where --group names one. Without a key, or with
--dry-run, nothing is sent: the JSON specification that would be sent is written.

Needs: pip install 'unlabeled[wandb]'
"""

import argparse
import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unlabeled.callbacks.wandb_run import STEP, reachable

NAME = "unlabeled"
BARS = {"label": "stage", "value": "trained"}
POINTS = {"x": "x", "y": "y"}
SYSTEM = ("system.cpu", "system.memory_percent", "system.gpu.0.gpu", "system.gpu.0.memory")


@dataclass(frozen=True)
class Section:
    """Panels that belong together.

    Args:
        title: of the section.
        says: what a reader looks for in it.
        curves: (title, metrics) of curves over updates.
        bars: (title, metrics) of last values, a bar per run.
        media: (title, keys) of pictures.
        tables: their keys.
        charts: (title, chart of W&B's, table, {field of the chart: column}).
    """

    title: str
    says: str
    curves: tuple[tuple[str, tuple[str, ...]], ...] = ()
    bars: tuple[tuple[str, tuple[str, ...]], ...] = ()
    media: tuple[tuple[str, tuple[str, ...]], ...] = ()
    tables: tuple[str, ...] = ()
    charts: tuple[tuple[str, str, str, dict[str, str]], ...] = ()


def with_baselines(score: str) -> tuple[str, ...]:
    """A score with those of random initialisation and raw pixels."""
    first, *rest = score.split("/")
    pixels = "/".join([first, "pixels", rest[-1]]) if first == "linear" else score
    return (
        f"eval/{score}",
        f"eval/baseline/random/{score}",
        f"eval/baseline/pixels/{pixels}",
    )


SECTIONS = (
    Section(
        "Scores",
        "Every score beside the same backbone at random initialisation, and raw pixels: what "
        "training is worth is the distance to them.",
        bars=(
            ("kNN, k = 20, top-1", with_baselines("knn/k20_t0.07/top1")),
            ("Linear probe of the final features, top-1", with_baselines("linear/final/top1")),
        ),
    ),
    Section(
        "Stages and features",
        "Which stages hold what was learned, which images lie close to one another, and a map.",
        media=(
            ("Linear probe by stage", ("stages/linear_top1_drawing",)),
            ("Map of test images", ("embedding/test_drawing",)),
        ),
        tables=("neighbours/test",),
        charts=(
            ("Linear probe by stage", "wandb/bar/v0", "stages/linear_top1", BARS),
            ("Map of test images", "wandb/scatter/v0", "embedding/test", POINTS),
        ),
    ),
    Section(
        "Training",
        "The loss and the learning rate over updates, and probes while it trains.",
        curves=(
            ("Loss", ("train/loss",)),
            ("Learning rate", ("optim/lr",)),
            ("Accuracy of the pretext task", ("train/accuracy", "held_out/accuracy")),
            ("Online probes, top-1", ("online/knn_top1", "online/linear_top1")),
        ),
    ),
    Section(
        "Health",
        "Collapse shows here first: a spread or an effective rank that falls to nothing, a mean "
        "cosine that rises to 1.",
        curves=(
            ("Spread of embeddings (1 isotropic)", ("health/std",)),
            ("Effective rank", ("health/effective_rank",)),
            ("Mean cosine", ("health/mean_cosine",)),
        ),
    ),
    Section(
        "Speed",
        "Images per second over all processes, and the share of time that waits for data.",
        curves=(
            ("Images per second", ("perf/images_per_second",)),
            ("Waiting for data", ("perf/data_wait",)),
            ("CPU seconds", ("perf/cpu_seconds",)),
        ),
    ),
    Section(
        "What the network sees",
        "Augmented views of a few images, and the pretext task on images not learned from.",
        media=(
            ("Views", ("views/augmented",)),
            ("Pretext task", ("pretext/test",)),
        ),
    ),
    Section("Machine", "System metrics.", curves=(("Use", SYSTEM),)),
)


def panels(section: Section, wr: Any) -> list[Any]:
    """A section's panels; `wr` is `wandb_workspaces.reports.v2`."""
    x = "RelativeTime(Process)" if section.title == "Machine" else STEP
    found = [wr.LinePlot(title=title, x=x, y=list(names)) for title, names in section.curves]
    found += [wr.BarPlot(title=title, metrics=list(names)) for title, names in section.bars]
    for title, keys in section.media:
        found.append(wr.MediaBrowser(title=title, media_keys=list(keys), num_columns=2))
    found += [wr.WeavePanelSummaryTable(table_name=key) for key in section.tables]
    for title, chart, table, fields in section.charts:
        found.append(
            wr.CustomChart(
                query={"summaryTable": {"tableKey": f"Custom Chart Tables/{table}_table"}},
                chart_name=chart,
                chart_fields=fields,
                chart_strings={"title": title},
            )
        )
    for i, panel in enumerate(found):
        panel.layout = wr.Layout(x=8 * (i % 3), y=8 * (i // 3), w=8, h=8)
    return found


def workspace(entity: str, project: str, group: str | None) -> Any:
    """A saved view of a project, with a section for each of `SECTIONS`."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    runs = ws.RunsetSettings(filters=[ws.Metric("Group") == group] if group else [])
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME if group is None else f"{NAME} {group}",
        sections=[ws.Section(name=s.title, panels=panels(s, wr), is_open=True) for s in SECTIONS],
        settings=ws.WorkspaceSettings(x_axis=STEP, group_by_prefix="first"),
        runset_settings=runs,
    )


def report(entity: str, project: str, group: str | None) -> Any:
    """A report over the same panels, with what to look for in each section."""
    import wandb_workspaces.reports.v2 as wr

    filters = f"Metric('Group') = '{group}'" if group else ""
    title = f"{project}: representations without labels"
    blocks: list[Any] = [wr.TableOfContents()]
    for section in SECTIONS:
        runs = wr.Runset(filters=filters)  # of the report's own project
        grid = wr.PanelGrid(runsets=[runs], panels=panels(section, wr))
        blocks += [wr.H1(text=section.title), wr.P(text=section.says), grid]
    return wr.Report(
        entity=entity,
        project=project,
        title=title if group is None else f"{title}, sweep {group}",
        description="Scores, stages, health and pictures of runs.",
        blocks=blocks,
        width="fluid",
    )


def specification(made: dict[str, Any]) -> dict[str, Any]:
    """What would be sent of each, as W&B's server would get it."""
    found = {}
    for kind, one in made.items():
        model = one._to_model()
        text = model.spec.model_dump_json(by_alias=True, exclude_none=True)
        found[kind] = {
            "entity": one.entity,
            "project": one.project,
            "name": model.display_name,
            "spec": json.loads(text),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entity", help="user or team; by default the key's own")
    parser.add_argument("--project", default="unlabeled")
    parser.add_argument("--group", help="only runs of this group: a sweep's name")
    parser.add_argument("--kind", choices=("both", "workspace", "report"), default="both")
    parser.add_argument("--dry-run", action="store_true", help="send nothing, write the JSON")
    parser.add_argument("--out", type=Path, default=Path("wandb_dashboard.json"))
    args = parser.parse_args()
    if not find_spec("wandb_workspaces"):
        sys.exit("unlabeled: needs: pip install 'unlabeled[wandb]'")
    offline = args.dry_run or not reachable()
    entity = args.entity
    if entity is None:
        import wandb

        entity = "ENTITY" if offline else wandb.Api().default_entity
    makers = {"workspace": workspace, "report": report}
    kinds = list(makers) if args.kind == "both" else [args.kind]
    made = {kind: makers[kind](entity, args.project, args.group) for kind in kinds}
    if not offline:
        for kind, one in made.items():
            print(f"{kind}: {one.save().url}")
        return
    args.out.write_text(json.dumps(specification(made), indent=2) + "\n", encoding="utf-8")
    why = "" if args.dry_run else " (no key or no network: nothing was sent)"
    print(f"{args.out}: {' and '.join(made)} as they would be sent{why}")


if __name__ == "__main__":
    main()
