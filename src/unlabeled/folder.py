"""The folder of a run: its resolved config, status, scores and checkpoint."""

import json
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from unlabeled.config import InputError
from unlabeled.slurm import Stopped

PACKAGES = ("unlabeled", "torch", "torchvision", "pytorch-lightning", "hydra-core", "numpy")


def plain(node: DictConfig) -> dict[str, Any]:
    """A config node as dictionaries, lists and numbers, with interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


class Folder:
    """Where one run keeps everything; a context that writes how the run ended.

    Only the first process writes.
    """

    def __init__(self, path: Path, cfg: DictConfig) -> None:
        self.path, self.cfg = path, cfg
        self.writes = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", 0))) == 0
        self.before = self._read("status.json")
        self.target = {key: cfg.trainer[key] for key in ("max_epochs", "max_steps")}
        self.identity = _identity(cfg)
        self.status: dict[str, Any] = {}

    def __enter__(self) -> "Folder":
        self._refuse_another_run()
        self.path.mkdir(parents=True, exist_ok=True)
        self.status = {
            "state": "running",
            "reason": None,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "command": " ".join(sys.argv),
            "versions": {"python": platform.python_version(), **_versions()},
            "commit": _commit(),
            "started": _now(),
            "seconds": None,
            "trained": self.before.get("trained"),
            "identity": self.identity,
        }
        self.clock = time.monotonic()
        self._write("status.json", self.status)
        if self.writes:
            hydra = self.path / ".hydra"
            hydra.mkdir(exist_ok=True)
            OmegaConf.save(self.cfg, hydra / "config.yaml", resolve=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state = "finished" if error is None else "failed"
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            state = "interrupted"
        self.status |= {
            "state": state,
            "reason": None if error is None else f"{type(error).__name__}: {error}",
            "ended": _now(),
            "seconds": round(time.monotonic() - self.clock, 1),
        }
        if error is not None and not isinstance(error, InputError):
            self.status["where"] = traceback.format_tb(trace)[-3:]
        self._write("status.json", self.status)

    def has_scores(self, evaluation: str) -> bool:
        """Whether an earlier start of this very run left scores of an evaluation."""
        goes_on = self.cfg.resume == "auto"  # else the weights will be others
        return (
            goes_on
            and self.trained
            and any(name.split("/")[0] == evaluation for name in self._read("scores.json"))
        )

    @property
    def trained(self) -> bool:
        """Whether an earlier start trained to the length that is asked for now."""
        return self.before.get("trained") == self.target

    def mark_trained(self) -> None:
        """Notes that training reached its end."""
        self.status["trained"] = self.target
        self._write("status.json", self.status)

    def checkpoint(self, resume: str | None) -> Path | None:
        """The checkpoint to go on from: `auto` this folder's, if there is one; a path; `none`.

        Raises:
            InputError: the path does not exist.
        """
        if resume is None or resume == "none":
            return None
        if resume == "auto":
            path = self.path / "checkpoints/last.ckpt"
            return path if path.exists() else None
        path = Path(resume)
        if path.is_dir():
            path = path / "checkpoints/last.ckpt"
        if not path.is_file():
            raise InputError(f"resume={resume}: there is no checkpoint {path}")
        return path

    def load(self, backbone: nn.Module, checkpoint: Path) -> None:
        """The trained weights of a finished run into its backbone."""
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        prefix = "backbone."
        own = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        backbone.load_state_dict(own)

    def _refuse_another_run(self) -> None:
        """Old weights and scores must not stand under another run's config."""
        old = self.before.get("identity")
        held = (self.path / "checkpoints/last.ckpt").exists()
        if self.cfg.resume == "auto" and held and old is not None and old != self.identity:
            keys = sorted(k for k in old | self.identity if old.get(k) != self.identity.get(k))
            raise InputError(
                f"{self.path} holds another run, which differs in {', '.join(keys)}: choose "
                "another hydra.run.dir, or write resume=none to begin anew there"
            )

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError):
            return {}  # what a kill cut short is written anew

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self.writes:
            partial = self.path / f".{name}.partial"
            partial.write_text(json.dumps(content, indent=2) + "\n")
            partial.replace(self.path / name)


def _identity(cfg: DictConfig) -> dict[str, Any]:
    """Dotted key -> value of what makes the weights; its length may grow, its place may move."""
    free = ("data.root", "data.workers")
    flat = {}
    todo: list[tuple[str, Any]] = [
        *((name, plain(cfg[name])) for name in ("method", "backbone", "data")),
        ("seed", cfg.seed),
        ("trainer.accumulate_grad_batches", cfg.trainer.accumulate_grad_batches),
    ]
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{key}.{name}", child) for name, child in value.items()]
        elif key not in free:
            flat[key] = value
    return dict(sorted(flat.items()))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> str | None:
    """The commit of the source tree, with a plus if it was changed; None for a wheel."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
        return head + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
