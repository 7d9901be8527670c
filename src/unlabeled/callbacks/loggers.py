"""Optional dashboards beside `metrics.csv`. None of them can stop or hold up a run."""

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger(__name__)


class Guarded(Logger):
    """A logger whose failures do not reach the run: the first is reported, then it is silent.

    Args:
        make: builds the logger, at its first use and on the first process only.
        title: what to call it in messages.
    """

    def __init__(self, make: Callable[[], Logger], title: str) -> None:
        super().__init__()
        self.make, self.title = make, title
        self.logger: Logger | None = None
        self.failed = False

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.title

    @property
    def version(self) -> int:
        """Always 0: the run's folder tells runs apart."""
        return 0

    @rank_zero_only
    def _try(self, method: str, *args: Any) -> None:
        if self.failed:
            return
        try:
            self.logger = self.logger or self.make()
            getattr(self.logger, method)(*args)
        except Exception as error:
            self.failed = True
            log.warning(
                "%s failed (%s: %s); the run goes on without it, metrics.csv has everything",
                self.title,
                type(error).__name__,
                error,
            )

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Passes the config on."""
        self._try("log_hyperparams", params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Passes values on."""
        self._try("log_metrics", dict(metrics), step)

    def finalize(self, status: str) -> None:
        """Ends it, if it ever began."""
        if self.logger is not None:
            self._try("finalize", status)


def tensorboard(*, folder: str | Path) -> Logger:
    """Event files in the run's folder: `tensorboard --logdir FOLDER`."""
    if not find_spec("tensorboard"):
        raise ValueError("logger=tensorboard needs: pip install 'unlabeled[tensorboard]'")

    def make() -> Logger:
        from pytorch_lightning.loggers import TensorBoardLogger

        return TensorBoardLogger(str(folder), name="", version="tensorboard")

    return Guarded(make, "TensorBoard")


def wandb_logger(
    *,
    folder: str | Path,
    project: str = "unlabeled",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
) -> Logger:
    """Weights & Biases: offline where there is no key or no network, and never in the way.

    A run that goes on in its folder goes on as the same W&B run. WANDB_MODE, if set, decides.
    """
    run = Path(folder)

    def make() -> Logger:
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        offline = "WANDB_MODE" not in os.environ and not _reachable()
        if offline:
            log.warning(
                "W&B is offline: no key or no network. Later: wandb sync %s", run / "wandb/*run-*"
            )
        if wandb.run is not None:  # an earlier job of a sweep in this process
            wandb.finish()
        known = getattr(wandb.Settings, "model_fields", {})
        limits = {"init_timeout": 30, "finish_timeout": 60, "silent": True}
        settings = wandb.Settings(**{k: v for k, v in limits.items() if k in known})
        logger = WandbLogger(
            project=project,
            entity=entity,
            name=name or run.name,
            group=group,
            tags=tags,
            save_dir=str(run),
            id=_identity(run),
            offline=offline,
            settings=settings,
        )
        _ = logger.experiment  # starts it here, where a failure is caught
        return logger

    return Guarded(make, "W&B")


def _identity(run: Path) -> str:
    path = run / "wandb_id"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _reachable() -> bool:
    """Whether W&B has a key for this user and answers within seconds."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = url.hostname or "api.wandb.ai", url.port or (80 if url.scheme == "http" else 443)
    try:
        listed = netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, NetrcParseError):
        listed = None
    if not os.environ.get("WANDB_API_KEY") and not listed:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # a direct connection would say nothing
    answers = []

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((host, port), timeout=3).close()
            answers.append(True)

    # In a thread, because looking a name up has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(4)
    return bool(answers)
