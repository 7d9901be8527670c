"""Progress of what happens after training: passes over images, heads that train."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from unlabeled import dist


@contextmanager
def stages(*, line: float = 5.0) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function (what, done, of) that shows bars in a terminal, and lines elsewhere.

    Args:
        line: seconds between two lines about the same thing.
    """
    if dist.rank() > 0:
        yield lambda what, done, of: None
        return
    if not sys.stdout.isatty():
        yield _lines(line)
        return
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as bars:
        tasks = {}

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield show


def _lines(interval: float) -> Callable[[str, int, int], None]:
    last: dict[str, float] = {}

    def show(what: str, done: int, of: int) -> None:
        now = time.monotonic()
        if done >= of or now - last.get(what, -interval) >= interval:
            last[what] = now
            print(f"{what}: {done} of {of}", flush=True)

    return show
