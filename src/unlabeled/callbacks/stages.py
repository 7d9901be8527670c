"""Progress of what happens after training: passes over images, heads that train."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from unlabeled import dist


@contextmanager
def stages(*, line: float = 5.0) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function (what, done, of) that shows bars in a terminal, and lines elsewhere.

    Args:
        line: seconds between two lines about the same thing, at first; a hundredth of the time that
            it took so far, later.
    """
    if dist.rank() > 0:
        yield lambda what, done, of: None
        return
    if not sys.stdout.isatty():
        yield _lines(line)
        return
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bars:
        tasks = {}

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield show


@dataclass
class _Told:
    """What was told about one thing, in seconds of a clock and how much was done."""

    began: float
    first: int
    last: float
    done: int


def _lines(interval: float) -> Callable[[str, int, int], None]:
    told: dict[str, _Told] = {}

    def show(what: str, done: int, of: int) -> None:
        now = time.monotonic()
        about = told.get(what)
        if about is None or done < about.done:  # it begins, or begins again
            told[what] = _Told(now, done, now, done)
            print(f"{what}: {done} of {of}", flush=True)
            return
        spent, about.done = now - about.began, done
        if done < of and now - about.last < max(interval, spent / 100):
            return
        about.last, left = now, ""
        if about.first < done < of:
            seconds = spent / (done - about.first) * (of - done)
            left = f", {timedelta(seconds=round(seconds))} left"
        print(f"{what}: {done} of {of}{left}", flush=True)

    return show
