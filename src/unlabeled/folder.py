"""The folder of a run: its resolved config, status, scores and checkpoints."""

import errno
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from torch import nn

from unlabeled import checkpoints
from unlabeled.disk import replace
from unlabeled.errors import InputError
from unlabeled.identity import differing, digest, holds_results, identity, protocol, refusal
from unlabeled.lock import HeldError, Lock
from unlabeled.provenance import commit, now, versions
from unlabeled.redact import hidden, hide_in_logs
from unlabeled.slurm import Stopped

log = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT)
RANKS = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")  # 0 or absent in the first process


def plain(node: DictConfig) -> dict[str, Any]:
    """A config node as dictionaries, lists and numbers, with interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


class Folder:
    """Where a run's first process writes everything; a context that notes how the run ended."""

    def __init__(self, path: Path, cfg: DictConfig, hydra: dict[str, Any] | None = None) -> None:
        self.path, self.cfg, self.hydra = path, cfg, hydra
        self.writes = all(int(os.environ.get(name, 0)) == 0 for name in RANKS)
        self.target = {key: cfg.trainer[key] for key in ("max_epochs", "max_steps")}
        self.status: dict[str, Any] = {}
        self._lock = Lock()

    def __enter__(self) -> "Folder":
        try:
            self._enter()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise InputError(
                    f"cannot write in the run's folder {self.path} ({error}): choose another "
                    "hydra.run.dir, or make room or write permission there"
                ) from error
            raise
        return self

    def _enter(self) -> None:
        hide_in_logs()
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        goes_on = self.cfg.resume == "auto"  # else the weights will be others
        self.before = self._read("status.json") if goes_on else {}
        self.identity = hidden(identity(plain(self.cfg)))
        self._newest = self._newest_good() if goes_on else None
        if not self.cfg.method or (self._newest is None and holds_results(self.path)):
            self._refuse_another_run(self.before.get("identity"))
        if not (self.cfg.method or goes_on):
            self._forget_scores()
        self.clock = time.monotonic()
        self.status = {
            "state": "running",
            "reason": None,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "command": hidden(" ".join(sys.argv)),
            "versions": versions(),
            "commit": commit(),
            "started": now(),
            "seconds": None,
            "trained": self.before.get("trained"),
            "epochs": self.before.get("epochs"),
            "updates": self.before.get("updates"),
            "evaluated": self.before.get("evaluated", {}),
            "run": digest(self.identity),
            "identity": self.identity,
        }
        self._write("status.json", self.status)
        self._write(".hydra/config.yaml", plain(self.cfg))
        for name, content in (self.hydra or {}).items():
            self._write(f".hydra/{name}", content)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = isinstance(error, KeyboardInterrupt | Stopped)
        state = "finished" if error is None else "interrupted" if stopped else "failed"
        full = isinstance(error, OSError) and error.errno in FULL
        if full:
            told = (
                f"the disk of {self.path} is full ({error}); what was written before is whole: "
                "make room and start the same command again, to go on from the newest checkpoint"
            )
        else:
            told = hidden(f"{type(error).__name__}: {error}")
        self.status |= {
            "state": state,
            "reason": None if error is None else told,
            "ended": now(),
            "seconds": round(time.monotonic() - self.clock, 1),
        }
        if error is not None and not isinstance(error, InputError):
            self.status["where"] = traceback.format_tb(trace)[-3:]
        try:
            self._write("status.json", self.status)
        except OSError as unwritten:
            if error is None:
                raise
            log.warning("cannot note in %s how the run ended: %s", self.path, unwritten)
        finally:
            self._lock.release()
        if full:
            raise OSError(error.errno, told) from error  # type: ignore[union-attr]

    def has_scores(self, evaluation: str) -> bool:
        """Whether an earlier start of this very run left scores of an evaluation as it is now."""
        known = self.before.get("evaluated", {}).get(evaluation)
        there = any(name.split("/")[0] == evaluation for name in self.scores())
        return self.trained and there and known == protocol(plain(self.cfg), evaluation)

    @property
    def trained(self) -> bool:
        """Whether an earlier start trained to the length that is asked for now."""
        if not self.cfg.method:
            return self.cfg.resume == "auto"
        return self._newest is not None and self.before.get("trained") == self.target

    def mark_trained(self, epochs: int, updates: int) -> None:
        """Notes that training reached its end, after so many; older weights' scores go."""
        self._forget_scores()
        done = {"trained": self.target, "epochs": epochs, "updates": updates}
        self.status |= {**done, "evaluated": {}}
        self._write("status.json", self.status)

    def mark_evaluated(self, evaluations: Sequence[str]) -> None:
        """Notes which evaluations have their scores in the folder."""
        config = plain(self.cfg)
        self.status["evaluated"] |= {name: protocol(config, name) for name in evaluations}
        self._write("status.json", self.status)

    def scores(self) -> dict[str, float]:
        """By name; none where nothing was evaluated."""
        return self._read("scores.json")

    def _forget_scores(self) -> None:
        stale = {*self.path.glob("scores*.json"), *self.path.glob("figures/*.npz")}
        for path in stale - {self.path / "figures/samples.npz"} if self.writes else ():
            path.unlink(missing_ok=True)

    def checkpoint(self, resume: str | None) -> Path | None:
        """The checkpoint to go on from: `auto` this folder's, if there is one; a path; `none`.

        Raises:
            InputError: the path does not exist, or holds no good checkpoint of a run.
        """
        if resume is None or resume == "none":
            return None
        if resume == "auto":
            return self._newest
        return checkpoints.named(resume, self.cfg.trainer)

    def load(self, backbone: nn.Module, checkpoint: Path) -> int:
        """The trained weights of a finished run into its backbone; the epochs it trained."""
        saved = checkpoints.read(checkpoint)
        prefix, state = "backbone.", saved["state_dict"]
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        backbone.load_state_dict(own)
        epochs = self.before.get("epochs")
        return int(saved["epoch"] if epochs is None else epochs)

    def _newest_good(self) -> Path | None:
        """The newest checkpoint that is whole, and of this very run; damaged ones are set aside.

        Raises:
            InputError: it is another run's, or there are checkpoints and none is good.
        """
        there = checkpoints.found(self.path / "checkpoints" / checkpoints.NEWEST)
        for path in there:
            try:
                saved = checkpoints.read(path)
            except checkpoints.DamagedError as error:
                log.warning("%s: set aside, the one before is used", error)
                self.before.pop("trained", None)  # what it lacks is trained again
                if self.writes:
                    path.replace(path.with_name(f"{path.name}.damaged"))
                continue
            except FileNotFoundError:
                continue  # another process of this run set it aside
            except (ValueError, OSError) as error:
                raise InputError(f"cannot go on in {self.path}: {error}") from error
            self._refuse_another_run(saved.get("identity") or self.before.get("identity"))
            return path
        if there:
            raise InputError(
                f"every checkpoint in {self.path / 'checkpoints'} is damaged: bring one back, "
                "or write resume=none to begin anew there"
            )
        return None

    def _refuse_another_run(self, old: dict[str, Any] | None) -> None:
        """Old weights and scores must not stand under another run's config."""
        if old is not None and (keys := differing(hidden(old), self.identity)):
            raise InputError(refusal(self.path, keys))

    def _take_lock(self) -> None:
        try:
            self._lock.take(self.path / ".lock")
        except HeldError as error:
            running = self._read("status.json")
            raise InputError(
                f"{self.path} is in use by another run (process {running.get('process')} on "
                f"{running.get('host')}, started {running.get('started')}): choose another "
                "hydra.run.dir, or end that one"
            ) from error

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError):
            return {}  # what a kill cut short is written anew

    def _write(self, name: str, content: Any) -> None:
        """Replaces a JSON or YAML file in one piece; secrets stay out of it."""
        if not self.writes:
            return
        content = hidden(content)
        if name.endswith(".json"):
            text = json.dumps(content, indent=2) + "\n"
        else:
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        replace(self.path / name, text)
