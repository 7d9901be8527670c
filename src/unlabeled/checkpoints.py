"""The checkpoints in a run's folder: their names, and whether one is whole and harmless."""

import errno
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unlabeled.errors import InputError

NEWEST = "last.ckpt"  # then last-1.ckpt, the one before, and so on
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "epoch")


class DamagedError(Exception):
    """A checkpoint that was written once and cannot be read now, or only in part."""


def earlier(newest: Path, age: int) -> Path:
    """The name of the checkpoint that was written `age` saves before the newest."""
    return newest.with_name(f"{newest.stem}-{age}{newest.suffix}") if age else newest


def found(newest: Path) -> list[Path]:
    """The checkpoints beside the newest one's place, itself first, then the one before, ..."""
    aged = re.compile(rf"{re.escape(newest.stem)}-([1-9][0-9]*){re.escape(newest.suffix)}")
    by_age = {0: newest} if newest.is_file() else {}
    for path in newest.parent.glob(f"{newest.stem}-*{newest.suffix}"):
        if match := aged.fullmatch(path.name):
            by_age[int(match[1])] = path
    return [by_age[age] for age in sorted(by_age)]


def named(resume: str, trainer: Mapping[str, Any]) -> Path:
    """The checkpoint that `resume=` names: a file, or a run's folder.

    Args:
        resume: the setting.
        trainer: `max_epochs` and `max_steps` of the run that goes on from it.

    Raises:
        InputError: there is none, or no good one, or it was trained for longer already.
    """
    path = Path(resume)
    path = path / "checkpoints" / NEWEST if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"resume={resume}: there is no checkpoint {path}")
    try:
        saved = read(path)
    except (DamagedError, ValueError, OSError) as error:
        raise InputError(f"resume={resume}: {error}") from error
    for unit, reached in (("epoch", saved["epoch"] + 1), ("step", saved["global_step"])):
        most = trainer.get(f"max_{unit}s")
        if most is not None and 0 <= most < reached:  # it would train nothing
            raise InputError(
                f"resume={resume}: {path} has reached {unit} {reached}, and this run ends after "
                f"{most}: write trainer.max_{unit}s of at least {reached}"
            )
    return path


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint of a run holds, once all of it has been compared with its checksums.

    Tensors stay on the disk until they are used. No code of the file's choosing is run: it may
    hold tensors and plain values only.

    Raises:
        DamagedError: the file is cut short or its contents changed since it was written.
        ValueError: it is whole, but no checkpoint of a run.
        OSError: the disk does not give it.
    """
    if _parts(path) != {zipfile.ZIP_STORED}:
        raise ValueError(f"{path} is compressed, which no checkpoint is")  # a bomb?
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, which could run code: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch and what it unpickles fail in any way
        raise DamagedError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(content, Mapping) or (lacks := [p for p in PARTS if p not in content]):
        what = f"lacks {', '.join(lacks)}" if isinstance(content, Mapping) else "is no dictionary"
        raise ValueError(f"{path} is no checkpoint of a run: it {what}")
    return dict(content)


def _parts(path: Path) -> set[int]:
    """How the parts of a zip file are compressed; those that are not are compared and read."""
    try:
        with zipfile.ZipFile(path) as archive:
            how = {part.compress_type for part in archive.infolist()}
            part = archive.testzip() if how == {zipfile.ZIP_STORED} else None
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place it cannot have
            raise
        raise DamagedError(f"{path} is damaged or no checkpoint: {error}") from error
    if part is not None:
        raise DamagedError(f"{path} is damaged: the checksum of {part} is another")
    return how
