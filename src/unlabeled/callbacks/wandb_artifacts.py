"""Checkpoints and features as W&B artifacts: their names, their contents, where they wait."""

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from unlabeled.shown import Source

WAITING = "wandb/artifacts"  # in the run's folder: what is sent from there
MB = 1e6  # bytes


def name(kind: str, owner: str) -> str:
    """What an artifact of a run is called: checkpoint-1a2b3c4d."""
    return f"{kind}-{owner}"


def owner(source: Source) -> str:
    """The id of the run that made a checkpoint, or what stands for it where W&B has none."""
    place = str(source.file.resolve()).encode()
    return source.id or blake2b(place, digest_size=4).hexdigest()


def artifact(
    kind: str, owner: str, paths: Sequence[Path], how: str, facts: Mapping[str, Any]
) -> Any:
    """An artifact with files as they are, or with their places and checksums ("reference").

    W&B copies nothing: what it is to send must stay as it is until then, see `waiting`.
    """
    import wandb

    made = wandb.Artifact(name(kind, owner), type=kind, metadata=dict(facts))
    for path in paths:
        if how == "reference":
            # All files: W&B's default limit would leave some out.
            made.add_reference(path.resolve().as_uri(), max_objects=10**9)
            continue
        for file in _files(path):  # `add_dir` prints
            inside = file.relative_to(path.parent).as_posix()
            made.add_file(str(file), inside, policy="immutable", skip_cache=True)
    return made


def megabytes(paths: Sequence[Path]) -> float:
    """The size of files and folders."""
    return sum(file.stat().st_size for path in paths for file in _files(path)) / MB


def waiting(run: Path, path: Path) -> Path:
    """A file or folder under a second name, which stays when the first is replaced or deleted.

    It costs no space as long as both are there.
    """
    place = run / WAITING / secrets.token_hex(4) / path.name
    for file in _files(path):
        to = place / file.relative_to(path) if path.is_dir() else place
        to.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, to)
        except OSError:  # another file system, or one without links
            shutil.copy2(file, to)
    return place


def sent(run: Path) -> None:
    """Nothing waits any more."""
    shutil.rmtree(run / WAITING, ignore_errors=True)


def _files(path: Path) -> list[Path]:
    """A file, or those of a folder but for locks, which are empty."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
