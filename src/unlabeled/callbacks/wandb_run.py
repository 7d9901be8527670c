"""A run at Weights & Biases, online or as files that `wandb sync` sends later."""

import logging
import os
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unlabeled.callbacks import wandb_artifacts as artifacts
from unlabeled.redact import hidden_command
from unlabeled.shown import About, Files, Images, Table

log = logging.getLogger(__name__)
STEP = "trainer/global_step"  # what curves are drawn over, by Lightning's name
KINDS = ("checkpoint", "features")


class WandB:
    """One W&B run, the same for every start of a run in its folder.

    Args:
        about: the run.
        project: see `unlabeled.callbacks.loggers.wandb_logger`, as for what follows.
        entity: likewise.
        name: likewise.
        group: likewise.
        tags: likewise.
        keep: "upload", "reference" or "none" for each of `KINDS`.
        largest: MB.
        patience: seconds.
    """

    def __init__(
        self,
        about: About,
        *,
        project: str,
        entity: str | None,
        name: str | None,
        group: str | None,
        tags: Sequence[str] | None,
        keep: Mapping[str, str],
        largest: float,
        patience: float,
    ) -> None:
        import wandb

        self.about, self.keep, self.largest = about, keep, largest
        offline = "WANDB_MODE" not in os.environ and not reachable()
        if offline:
            log.warning(
                "W&B is offline: no key or no network. Later: wandb sync %s",
                about.folder / "wandb/*run-*",
            )
        if wandb.run is not None:  # an earlier job of a sweep in this process
            wandb.finish()
        about.folder.mkdir(parents=True, exist_ok=True)
        with hidden_command():
            self.run = wandb.init(
                project=project,
                entity=entity,
                name=name or about.name or about.folder.name,
                group=group or about.group,
                tags=list(about.tags if tags is None else tags),
                job_type=about.kind,
                dir=str(about.folder),
                id=identity(about),
                resume="allow",
                settings=_settings(wandb, patience, offline),
            )
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP, step_sync=True)
        self._use()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """The config, with what the run was made with, and started from."""
        sources = {
            key: {"file": str(s.file), "run": None if s.run is None else str(s.run), "id": s.id}
            for key, s in self.about.sources.items()
        }
        more = {"provenance": dict(self.about.facts), "sources": sources}
        self.run.config.update({**params, **more}, allow_val_change=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """A row of history."""
        self._log(metrics, step or 0)

    def log_images(self, images: Images, step: int) -> None:
        """Pictures side by side."""
        import wandb

        pairs = zip(images.images, images.captions, strict=True)
        self._log({images.name: [wandb.Image(x, caption=words) for x, words in pairs]}, step)

    def log_table(self, table: Table, step: int) -> None:
        """A table, its chart, and its drawing."""
        import wandb

        rows = [
            [wandb.Image(cell) if hasattr(cell, "shape") else cell for cell in row]
            for row in table.rows
        ]
        made = wandb.Table(columns=list(table.columns), data=rows)
        first, second, *rest = table.columns
        shown: Any = made
        if table.chart == "bars":
            shown = wandb.plot.bar(made, first, second, title=table.title, split_table=True)
        elif table.chart == "points":
            shown = wandb.plot.scatter(made, first, second, title=table.title, split_table=True)
        elif table.chart == "lines":
            stroke = rest[0] if rest else None
            shown = wandb.plot.line(
                made, first, second, stroke=stroke, title=table.title, split_table=True
            )
        content = {table.name: shown}
        if table.drawing is not None:
            content[f"{table.name}_drawing"] = wandb.Image(table.drawing, caption=table.title)
        self._log(content, step)

    def log_files(self, files: Files) -> None:
        """An artifact of this run, by what its kind is to become."""
        how = self.keep[files.kind]
        if how == "none" or (how == "reference" and not files.stay):
            return
        size = artifacts.megabytes(files.paths)
        if how == "upload" and size > self.largest:
            instead = "referenced, not uploaded" if files.stay else "left out"
            log.warning(
                "W&B: the %s, %.0f MB: %s (logger.wandb.largest=%g)",
                *(files.kind, size, instead, self.largest),
            )
            if not files.stay:
                return
            how = "reference"
        paths = files.paths
        if how == "upload":
            paths = [artifacts.waiting(self.about.folder, path) for path in paths]
        facts = {**files.facts, "folder": str(self.about.folder), "run": self.run.id}
        made = artifacts.artifact(files.kind, self.run.id, paths, how, facts)
        self.run.log_artifact(made, aliases=["latest", f"updates-{files.facts['updates']}"])

    def close(self, state: str) -> None:
        """Ends the run; one that goes back in a queue is marked as preempted."""
        if state == "requeued":
            self.run.mark_preempting()
        offline, folder = self.run.offline, Path(self.run.dir).parent
        self.run.finish(exit_code=0 if state == "finished" else 1)
        if offline and (folder / f"run-{self.run.id}.wandb").exists():
            print(f"W&B kept this run offline; to send it: wandb sync {folder}")
        elif state == "finished":
            artifacts.sent(self.about.folder)

    def _log(self, row: Mapping[str, Any], step: int) -> None:
        # W&B's own count only grows: a run that goes on before where it was killed, whose rows
        # come again, would have them dropped.
        self.run.log({**row, STEP: step}, step=max(step, self.run.step))

    def _use(self) -> None:
        """Names the checkpoints that this run starts from as its input.

        W&B asks its server which artifact a name means. Offline, or where it is not there, the
        same artifact is described again: the server tells by its checksums that it has it.
        """
        import wandb

        for source in self.about.sources.values():
            mine = artifacts.owner(source)
            if not self.run.offline and source.id is not None:
                place = [source.entity or self.run.entity, source.project or self.run.project]
                known = f"{artifacts.name('checkpoint', mine)}:latest"
                try:
                    self.run.use_artifact("/".join(str(word) for word in (*place, known)))
                    continue
                except (wandb.Error, ValueError):
                    pass  # that run was never sent
            sent = self.keep["checkpoint"] == "upload" and source.id is not None
            small = artifacts.megabytes([source.file]) <= self.largest
            how = "upload" if sent and small else "reference"
            facts = {"folder": None if source.run is None else str(source.run), "run": source.id}
            made = artifacts.artifact("checkpoint", mine, [source.file], how, facts)
            self.run._log_artifact(made, use_after_commit=True)  # the public way needs a server


def identity(about: About) -> str:
    """The id of a folder's W&B run, kept there; a new one for a new folder.

    Under W&B's own sweep agent it is the one that the agent gave.
    """
    path = about.folder / "wandb_id"
    if not path.exists():
        given = None if about.group else os.environ.get("WANDB_RUN_ID")
        about.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(given or secrets.token_hex(4))
    return path.read_text().strip()


def reachable() -> bool:
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


def abandon() -> None:
    """Ends W&B's own process, which hangs: this one would wait for it when it ends."""
    import wandb

    # There is no public way that does not wait.
    service = getattr(wandb.setup(), "_connection", None)
    with suppress(AttributeError, OSError, TypeError):  # another process may own it
        service._cleanup()  # type: ignore[union-attr]
        service._proc._process.kill()  # type: ignore[union-attr]


def _settings(wandb: Any, patience: float, offline: bool) -> Any:
    """Limits of time, and which source tree makes the run: not the one that it is started in."""
    mode = "offline" if offline else os.environ.get("WANDB_MODE")  # W&B reads it once per process
    known = getattr(wandb.Settings, "model_fields", {})
    tree = Path(__file__).resolve().parents[3]
    wanted = {"init_timeout": patience, "finish_timeout": patience, "silent": True}
    wanted |= {"mode": mode} if mode else {}
    wanted |= {"git_root": str(tree)} if (tree / ".git").exists() else {"disable_git": True}
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in known})
