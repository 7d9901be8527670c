"""The members of a sweep, each a small file in the sweep's folder, so that none is run twice."""

import fcntl
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unlabeled.errors import InputError
from unlabeled.redact import hidden

RECORDS = ".members"  # in the sweep's folder: NUMBER.json and what members say, NUMBER.log
FREE = ("launcher", "debug", "resume", "objective", "logger", "data.workers", "data.root")
ENDED = ("finished", "failed", "interrupted")


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Args:
        number: its number, which no other member ever gets.
        overrides: of the command line, as Hydra gives them to the run.
        folder: of the run, in the sweep's.
        state: queued, running, or one of ENDED.
        reason: why it failed, or waits.
        job: SLURM's number of it.
        objective: the score that the sweep is after.
        tries: how often it was started.
        seconds: of all tries that ended by themselves.
        since: when the last try began, in seconds of the epoch.
        code: the exit code it would have on its own: 2 for wrong input.
    """

    number: int
    overrides: list[str]
    folder: str
    state: str = "queued"
    reason: str | None = None
    job: str | None = None
    objective: str | None = None
    tries: int = 0
    seconds: float = 0.0
    since: float | None = None
    code: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other members: overrides that make another run."""
        return key(self.overrides)


def key(overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides without what changes no result, in one order."""
    kept = [line for line in overrides if not _free(line.lstrip("+").partition("=")[0])]
    return tuple(sorted(kept))


def _free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def records(sweep: Path) -> list[Member]:
    """All members that a sweep's folder knows, by number."""
    found = []
    for path in (sweep / RECORDS).glob("*.json"):
        try:
            found.append(Member(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path}: not a record of a sweep's member ({error}); delete it to run that "
                "member under a new number"
            ) from error
    return sorted(found, key=lambda m: m.number)


def load(sweep: Path, number: int) -> Member:
    """One member, as its file has it now."""
    return Member(**json.loads(_path(sweep, number).read_text(encoding="utf-8")))


def save(sweep: Path, member: Member, **changes: Any) -> Member:
    """Writes a changed member's file, without secrets, in one piece; returns the member."""
    member = replace(member, **changes)
    path = _path(sweep, member.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    text = json.dumps(hidden(asdict(member)), indent=2) + "\n"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return member


def update(sweep: Path, number: int, **changes: Any) -> Member:
    """Changes a member's file."""
    return save(sweep, load(sweep, number), **changes)


def log_path(sweep: Path, number: int) -> Path:
    """Where a member that runs in its own process says what it says."""
    return sweep / RECORDS / f"{number}.log"


def plan(
    sweep: Path, jobs: Sequence[Sequence[str]], *, objective: str | None, numbered: bool = True
) -> list[Member]:
    """A member for each job of a sweep, in order: one that is there already, or a new one.

    New numbers are larger than all that any member, or any folder, ever had. Equal jobs are one
    member.

    Args:
        sweep: the sweep's folder.
        jobs: each one's overrides.
        objective: the score that the sweep is after.
        numbered: whether the folder of a member is its number; else it is filled in when it runs.
    """
    known = {member.key: member for member in records(sweep)}
    taken = [m.number for m in known.values()]
    taken += [int(p.name) for p in sweep.glob("*") if p.name.isdecimal()]
    number = max(taken, default=-1) + 1
    planned = []
    for job in jobs:
        kept = hidden(list(job))  # what may stand in files
        member = known.get(key(kept))
        if member is None:
            folder = str(number) if numbered else ""
            member = Member(number, kept, folder, objective=objective)
            number += 1
        elif member.state == "finished" or _finished_by_hand(sweep, member):
            member = replace(member, state="finished", reason=None, objective=objective)
        else:
            fresh = {"state": "queued", "reason": None} if member.state in ENDED else {}
            member = replace(member, overrides=kept, objective=objective, **fresh)
        if known.get(member.key) != member:  # else a job that runs may write it just now
            known[member.key] = save(sweep, member)
        planned.append(replace(member, overrides=list(job)))
    return planned


def _finished_by_hand(sweep: Path, member: Member) -> bool:
    """Whether somebody ran a failed member on its own, in its folder."""
    status = sweep / member.folder / "status.json"
    if not member.folder or not status.exists():
        return False
    try:
        return json.loads(status.read_text(encoding="utf-8")).get("state") == "finished"
    except (OSError, ValueError):
        return False


def scores(sweep: Path, member: Member) -> dict[str, float]:
    """A member's scores, empty if it has none."""
    try:
        text = (sweep / member.folder / "scores.json").read_text(encoding="utf-8")
        return json.loads(text) if member.folder else {}
    except (OSError, ValueError):
        return {}


def started(sweep: Path, number: int, **changes: Any) -> Member:
    """Notes that a try of a member begins."""
    before = load(sweep, number)
    return save(
        sweep,
        before,
        **{"state": "running", "reason": None, "code": 0, "since": time.time()},
        tries=before.tries + 1,
        **changes,
    )


def ended(sweep: Path, number: int, state: str, reason: str | None = None, code: int = 0) -> Member:
    """Notes how a try of a member ended."""
    before = load(sweep, number)
    spent = time.time() - before.since if before.since else 0.0
    return save(
        sweep,
        before,
        **{"state": state, "reason": reason, "code": code, "since": None},
        seconds=round(before.seconds + spent, 1),
    )


_held: dict[Path, Any] = {}  # locks that last as long as this process


def lock(sweep: Path) -> None:
    """Keeps other sweeps out of a folder until this process ends, however it ends.

    Raises:
        InputError: another process sweeps in the folder.
    """
    sweep = sweep.resolve()
    if sweep in _held:
        return
    (sweep / RECORDS).mkdir(parents=True, exist_ok=True)
    file = (sweep / RECORDS / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(
            f"{sweep}: another sweep runs in this folder; wait for it, or choose another "
            "hydra.sweep.dir"
        ) from error
    _held[sweep] = file


def release(sweep: Path) -> None:
    """Gives a folder back."""
    if file := _held.pop(sweep.resolve(), None):
        file.close()


def _path(sweep: Path, number: int) -> Path:
    return sweep / RECORDS / f"{number}.json"
