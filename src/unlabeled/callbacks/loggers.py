"""Optional dashboards beside `metrics.csv`. None of them can stop or hold up a run."""

import logging
import threading
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, Literal

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from unlabeled.shown import About, Dashboard, Files, Images, Table

log = logging.getLogger(__name__)
MODES = ("upload", "reference", "none")


class Guarded(Logger):
    """A dashboard whose failures do not reach the run.

    One that cannot be opened, that fails to take numbers or that does not answer is given up and
    reported once; a picture or a file that it refuses is reported, and it goes on.

    Args:
        make: opens the dashboard, at its first use and on the first process only.
        title: what to call it in messages.
        patience: seconds until a call counts as hung; None: a dashboard that only writes files,
            which is called directly.
        abandon: is called when one hung, so that it cannot hold up the end of the process.
    """

    def __init__(
        self,
        make: Callable[[], Dashboard],
        title: str,
        *,
        patience: float | None = None,
        abandon: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.make, self.title, self.patience, self.abandon = make, title, patience, abandon
        self.dashboard: Dashboard | None = None
        self.failed = self.hung = False
        self._worker = None if patience is None else _Worker()

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.title

    @property
    def version(self) -> int:
        """Always 0: the run's folder tells runs apart."""
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Passes the config on."""
        self._try("log_hyperparams", params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Passes values on."""
        self._try("log_metrics", dict(metrics), step, needed=True)

    def log_images(self, images: Images, step: int) -> None:
        """Passes pictures on."""
        self._try("log_images", images, step)

    def log_table(self, table: Table, step: int) -> None:
        """Passes a table on."""
        self._try("log_table", table, step)

    def log_files(self, files: Files) -> None:
        """Passes files on."""
        self._try("log_files", files)

    def finalize(self, status: str) -> None:
        """Nothing: Lightning calls this after training, and evaluations come after that."""

    def close(self, state: str) -> None:
        """Ends it, if it ever began."""
        if self.dashboard is not None and not self.hung:
            self.failed = False  # what it took before shall be kept
            self._try("close", state)
            self.dashboard, self.failed = None, True

    @rank_zero_only
    def _try(self, method: str, *args: Any, needed: bool = False) -> None:
        if self.failed:
            return

        def work() -> None:
            self.dashboard = self.dashboard or self.make()
            getattr(self.dashboard, method)(*args)

        try:
            if self._worker is None:
                work()
            else:
                self._worker.call(work, self.patience)
        except _HungError:
            self.failed = self.hung = True
            log.warning(
                "%s did not answer for %g seconds; the run goes on without it, metrics.csv has "
                "everything",
                self.title,
                self.patience,
            )
            if self.abandon is not None:
                self.abandon()
        except Exception as error:
            self.failed = needed or self.dashboard is None
            log.warning(
                "%s failed (%s: %s); the run goes on without %s, metrics.csv has everything",
                self.title,
                type(error).__name__,
                error,
                "it" if self.failed else f"what {method} would have shown there",
            )


class _HungError(Exception):
    """A call did not return in time."""


class _Worker:
    """One thread that makes a dashboard's calls, in order; the process does not wait for it."""

    def __init__(self) -> None:
        self.todo: SimpleQueue[tuple[Callable[[], None], list[Exception | None], threading.Event]]
        self.todo = SimpleQueue()
        self.thread: threading.Thread | None = None

    def call(self, work: Callable[[], None], patience: float | None) -> None:
        """Runs it there, and raises what it raises, or `_HungError` after `patience` seconds."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        raised: list[Exception | None] = []
        done = threading.Event()
        self.todo.put((work, raised, done))
        if not done.wait(patience):
            raise _HungError
        if raised[0] is not None:
            raise raised[0]

    def _run(self) -> None:
        while True:
            work, raised, done = self.todo.get()
            try:
                work()
                raised.append(None)
            except Exception as error:
                raised.append(error)
            done.set()


def tensorboard(*, about: About) -> Logger:
    """Event files in the run's folder: `tensorboard --logdir FOLDER`."""
    if not find_spec("tensorboard"):
        raise ValueError("logger=tensorboard needs: pip install 'unlabeled[tensorboard]'")

    def make() -> Dashboard:
        from unlabeled.callbacks.tensorboard_run import TensorBoard

        return TensorBoard(about.folder / "tensorboard")

    return Guarded(make, "TensorBoard")


def wandb_logger(
    *,
    about: About,
    project: str = "unlabeled",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    checkpoint: Literal["upload", "reference", "none"] = "upload",
    features: Literal["upload", "reference", "none"] = "reference",
    largest: float = 1024,
    patience: float = 60,
) -> Logger:
    """Weights & Biases: offline where there is no key or no network, and never in the way.

    A run that goes on in its folder goes on as the same W&B run. WANDB_MODE, if set, decides
    whether it is online.

    Args:
        about: the run.
        project: where W&B keeps it.
        entity: whose project that is; None: the user's default.
        name: None: the folder's name, in a sweep with the sweep's before it.
        group: None: the sweep that the run is a member of, if it is.
        tags: None: the names of experiment, method, data and backbone.
        checkpoint: what becomes of the trained checkpoint: "upload", "reference" (its place and
            checksum alone) or "none".
        features: the same of what evaluations extracted; what does not stay (`keep_features=true`
            or `features=DIR`) is not referenced.
        largest: MB; what is larger is referenced, not uploaded.
        patience: seconds that W&B may take for anything before the run goes on without it.
    """
    for key, mode in (("checkpoint", checkpoint), ("features", features)):
        if mode not in MODES:
            raise ValueError(f"logger.wandb.{key}={mode!r}: choose one of {MODES}")
    if patience <= 0 or largest < 0:
        raise ValueError(
            f"logger.wandb.patience={patience} must be positive, and largest={largest} not negative"
        )
    from unlabeled.callbacks import wandb_run

    def make() -> Dashboard:
        return wandb_run.WandB(
            about,
            project=project,
            entity=entity,
            name=name,
            group=group,
            tags=tags,
            keep={"checkpoint": checkpoint, "features": features},
            largest=largest,
            patience=patience,
        )

    # W&B's own limits end first: what they raise says more.
    return Guarded(make, "W&B", patience=patience + 5, abandon=wandb_run.abandon)
