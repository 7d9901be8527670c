"""A run's loggers from its beginning to its end: what they are told, and when."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pytorch_lightning.loggers import Logger

from unlabeled.callbacks.loggers import Guarded
from unlabeled.callbacks.metrics import MetricsCSV
from unlabeled.report import dashboard
from unlabeled.report.run import Run, read
from unlabeled.shown import About, Files, Images, Source
from unlabeled.slurm import Stopped

log = logging.getLogger(__name__)
FACTS = ("commit", "versions", "command", "run", "host")  # of status.json
NAMED = ("experiment", "method", "data", "backbone")  # groups whose choices are tags
LOADERS = "unlabeled.backbones.load."  # what reads checkpoints
LONGEST = 64  # characters of a W&B tag


class Dashboards:
    """`metrics.csv`, and the dashboards beside it; a context that ends them as the run ended.

    Args:
        folder: the run's, whose config and status are written.
        makers: of the dashboards; each is told what the run is.
    """

    def __init__(self, folder: Path, makers: Sequence[Callable[..., Guarded]]) -> None:
        self.folder = folder
        # Processes other than the first may come before the folder does, and show nothing.
        self.about = about(read(folder)) if folder.is_dir() else About(folder)
        self.csv = MetricsCSV(folder)
        self._shows = True
        self.boards: list[Guarded] = [make(about=self.about) for make in makers]

    @property
    def loggers(self) -> list[Logger]:
        """For Lightning's trainer."""
        return [self.csv, *self.boards]

    def showing(self, anything: bool) -> "Dashboards":
        """A context for a run that is about to train or evaluate, or has nothing left to do."""
        self._shows = anything
        return self

    def __enter__(self) -> "Dashboards":
        for board in self.boards if self._shows else ():
            board.log_hyperparams(dict(self.about.config))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        states = {Stopped: "requeued", KeyboardInterrupt: "interrupted"}
        known = (state for stop, state in states.items() if isinstance(error, stop))
        state = "finished" if error is None else next(known, "failed")
        for board in self.boards:
            board.close(state)

    def keep(
        self, kind: Literal["checkpoint", "features"], paths: Sequence[Path], *, stay: bool = True
    ) -> None:
        """Hands files on that are there, and that `stay` after the run or do not."""
        there = [path for path in paths if path.exists()]
        if not (there and self.boards and self._shows):
            return
        run = read(self.folder)
        updates = run.status.get("updates")
        if updates is None:  # curves do not have them all
            updates = dashboard.last_step(run) + 1
        facts = {"updates": updates, "epochs": run.status.get("epochs")}
        for board in self.boards:
            board.log_files(Files(kind, there, facts, stay))

    def publish(self) -> None:
        """Shows scores, pictures and charts, from the run's files."""
        if not (self._shows and self.folder.is_dir()):
            return
        run = read(self.folder)
        step, scores = dashboard.last_step(run), dashboard.scores(run)
        for logger in self.loggers if scores else ():
            logger.log_metrics(scores, step)
        if not self.boards:
            return
        try:
            for item in dashboard.shown(run):
                for board in self.boards:
                    if isinstance(item, Images):
                        board.log_images(item, step)
                    else:
                        board.log_table(item, step)
        except Exception as error:  # the run is done, and its report has them
            log.warning("dashboards miss pictures (%s: %s)", type(error).__name__, error)


def about(run: Run) -> About:
    """What dashboards are told of a run, from its folder."""
    chosen = (run.choices.get(group) for group in NAMED)
    tags = [name[:LONGEST] for name in chosen if name not in (None, "none")]
    sweep = run.sweep
    return About(
        run.folder,
        config=run.config,
        facts={name: run.status.get(name) for name in FACTS},
        name=None if sweep is None else f"{sweep.name}-{run.folder.name}",
        group=None if sweep is None else sweep.name,
        tags=tags,
        kind="pretrain" if run.config.get("method") else "evaluate",
        sources=_sources(run),
    )


def _sources(run: Run) -> dict[str, Source]:
    """The checkpoints that a run starts from, by the keys of its config, each once."""
    named = dict(_named(run.config, ""))
    if (resume := run.config.get("resume")) not in (None, "auto", "none"):
        named["resume"] = resume
    found: dict[Path, tuple[str, Source]] = {}
    for key, path in named.items():
        source = _source(Path(path).expanduser())
        found.setdefault(source.file, (key, source))
    return dict(found.values())


def _named(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, path) of every checkpoint in a config."""
    if isinstance(node, list):
        node = {str(i): x for i, x in enumerate(node)}
    if not isinstance(node, Mapping):
        return
    path = node.get("path")
    if str(node.get("_target_", "")).startswith(LOADERS) and path:
        yield f"{key}path", path
    for name, x in node.items():
        yield from _named(x, f"{key}{name}.")


def _source(path: Path) -> Source:
    """A run's folder, or a checkpoint in one, or any other file."""
    file = path / "checkpoints/last.ckpt" if path.is_dir() else path
    folder = path if path.is_dir() else path.parent.parent
    if not (folder / "status.json").exists():
        return Source(file)
    run, known = read(folder), folder / "wandb_id"
    return Source(
        file,
        run=folder,
        id=known.read_text().strip() if known.exists() else None,
        project=run.get("logger.wandb.project"),
        entity=run.get("logger.wandb.entity"),
    )
