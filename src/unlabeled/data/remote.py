"""Shards by path, URL or command: which there are, and how they are fetched.

Whatever fsspec reads (s3://, gs://, https://, memory:// ...), and the output of a command
(pipe:aws s3 cp s3://bucket/0.tar -).
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")
URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
CUT = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")  # a URL that went through pathlib
TRIES = 3
PIPE = "pipe:"


class Source(NamedTuple):
    """A shard: a path, URL or pipe, and its size and modification time in ns where known, or 0."""

    place: str
    size: int = 0
    changed: int = 0

    @property
    def remote(self) -> bool:
        """Whether it has to be copied first."""
        return is_remote(self.place)

    @property
    def name(self) -> str:
        """What it is called in its folder."""
        return self.place if self.place.startswith(PIPE) else self.place.rpartition("/")[2]


def is_remote(place: str) -> bool:
    """Whether a place is a URL or a pipe."""
    return place.startswith(PIPE) or URL.match(place) is not None


def expand(pattern: str) -> list[str]:
    """Braces as in a shell: {000..120} counts, {a,b} are alternatives; others stay."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    low, dots, high = found[1].partition("..")
    numbers = bool(dots) and low.isdigit() and high.isdigit()
    width = len(low) if numbers else 0
    options = (
        [str(i).zfill(width) for i in range(int(low), int(high) + 1)]
        if numbers
        else found[1].split(",")
    )
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [full for option in options for full in expand(head + option + tail)]


def find(root: Path, pattern: str) -> list[Source]:
    """The shards of a pattern (braces, then * and ?), relative to the root or a whole URL.

    Raises:
        ValueError: none is found, or one that is named is not there.
    """
    sources, missing = [], []
    for place in expand(located(root, pattern)):
        if place.startswith(PIPE):
            sources.append(Source(place))
        elif any(c in place for c in "*?["):
            sources += _listed(place)
        elif URL.match(place):
            sources.append(Source(place))
        elif os.path.isfile(place):
            sources.append(_local(place))
        else:
            missing.append(place)
    if missing:
        named = len(missing) + len(sources)
        raise ValueError(
            f"{len(missing)} of the {named} shards of {pattern!r} are not there, first {missing[0]}"
        )
    return sources


def located(root: Path, pattern: str) -> str:
    """A pattern with its root before it, unless it is a whole path, URL or pipe."""
    if is_remote(pattern) or os.path.isabs(pattern):
        return pattern
    return CUT.sub(r"\1://", str(root)).rstrip("/") + "/" + pattern


def filesystem(place: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        ValueError: nobody knows the protocol, or its package is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(place)
    except ImportError as error:
        raise ValueError(
            f"{place}: {error}; pip install 'unlabeled[shards]' has the common ones"
        ) from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def read_beside(place: str) -> str | None:
    """The text of a small file on the disk or remote; None if there is none."""
    try:
        if not URL.match(place):
            return Path(place).read_text()
        system, path = filesystem(place)
        return system.cat_file(path).decode()
    except (OSError, UnicodeDecodeError):
        return None


def fetch(place: str, target: Path) -> None:
    """Copies a remote shard, completely or not at all.

    Raises:
        OSError: it could not be read, after several tries.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for attempt in range(TRIES):
            try:
                with open(partial, "wb") as file:
                    _copy(place, file)
                os.replace(partial, target)
                return
            except FileNotFoundError:
                raise
            except Exception as error:  # clients of object stores raise what they like
                if attempt == TRIES - 1:
                    raise OSError(f"cannot read {place}: {error}") from error
                time.sleep(2**attempt)
    finally:
        partial.unlink(missing_ok=True)


def _copy(place: str, file: Any) -> None:
    if place.startswith(PIPE):
        words = shlex.split(place.removeprefix(PIPE))  # no shell: nothing in them is expanded
        done = subprocess.run(words, stdout=file, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()[-200:]
            raise OSError(f"the command ended with {done.returncode}: {said}")
        return
    system, path = filesystem(place)
    with system.open(path, "rb") as source:
        shutil.copyfileobj(source, file, 1 << 20)


def _local(path: str) -> Source:
    status = os.stat(path)
    return Source(path, status.st_size, status.st_mtime_ns)


def _listed(place: str) -> list[Source]:
    if not URL.match(place):
        import glob

        return [_local(path) for path in sorted(glob.glob(place, recursive=True))]
    system, path = filesystem(place)
    found = system.glob(path, detail=True)
    return [
        Source(system.unstrip_protocol(name), int(found[name].get("size") or 0))
        for name in sorted(found)
    ]
