"""Speed as ratios: every comparison takes turns with what it is compared with, in one run.

    python scripts/bench.py              the table, outputs/bench/bench.json and bench.png
    python scripts/bench.py --check      fails where a ratio misses its bar
    python scripts/bench.py --only step --quick

Ratios are medians over rounds, each of both sides one after the other; the spread is that of the
rounds. Everything runs on one thread.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it
from bench_rows import HEAD, Row, markdown, misses
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unlabeled.memory import reuse_freed_memory

OUT = Path(__file__).parents[1] / "outputs/bench"


def augment(quick: bool) -> list[Row]:
    """Views per second against torchvision, PIL and kornia."""
    import bench_augment

    return bench_augment.rows(3 if quick else 9)


def decode(quick: bool) -> list[Row]:
    """JPEGs to crops against other decoders and the usual pipeline."""
    import bench_decode

    return bench_decode.rows(3 if quick else 7)


def video(quick: bool) -> list[Row]:
    """Random pictures and clips of a video against PyAV and torchcodec; spectrograms."""
    import bench_video

    with tempfile.TemporaryDirectory() as folder:
        return bench_video.rows(Path(folder), 2 if quick else 7)


def photos(quick: bool) -> list[Row]:
    """Photographs at 224, from JPEG to crops and from crops to views, against whole pipelines."""
    import bench_photos

    with tempfile.TemporaryDirectory() as folder:
        return bench_photos.rows(Path(folder), *((2, 8) if quick else (5, 16)))


def step(quick: bool) -> list[Row]:
    """Training steps of five methods in the framework against bare loops."""
    import bench_step

    return bench_step.rows(1 if quick else 2)


def end(quick: bool) -> list[Row]:
    """From JPEGs to updates, against other frameworks' recipes."""
    import bench_end

    return bench_end.rows(1 if quick else 3)


def formats(quick: bool) -> list[Row]:
    """A step in channels_last and bfloat16 against NCHW float32."""
    import bench_formats

    return bench_formats.rows(3 if quick else 5)


def suite(quick: bool) -> list[Row]:
    """The frozen evaluations against a plain forward pass, and against one at a time."""
    import bench_suite

    return bench_suite.rows(1 if quick else 3)


def clusters(quick: bool) -> list[Row]:
    """k-means against faiss."""
    import bench_clusters

    return bench_clusters.rows(*((1, 10_000) if quick else (3, 50_000)))


def growth(quick: bool) -> list[Row]:
    """How cost grows with batch, crops, workers and images."""
    import bench_growth

    return bench_growth.rows(1 if quick else 3)


def start(quick: bool) -> list[Row]:
    """The command line against bare Hydra and bare imports."""
    import bench_start

    return bench_start.rows(*((3, 1) if quick else (9, 3)))


PARTS: dict[str, Callable[[bool], list[Row]]] = {
    "start": start,
    "augment": augment,
    "decode": decode,
    "video": video,
    "photos": photos,
    "step": step,
    "end": end,
    "formats": formats,
    "suite": suite,
    "clusters": clusters,
    "growth": growth,
}


def show(rows: Sequence[Row], console: Console) -> None:
    """The table in the terminal, with missed bars in red, and below it how each was measured."""
    table = Table(*HEAD[:-1], title="speed, as ratios")
    for row in rows:
        met = "red" if row.missed else "green" if row.bar is not None and row.values else ""
        name, value, *rest, _ = map(escape, row.cells())
        table.add_row(name, f"[{met}]{value}[/]" if met else value, *rest)
    console.print(table)
    for note in dict.fromkeys(row.note for row in rows if row.note):
        names = ", ".join(row.name for row in rows if row.note == note)
        console.print(escape(f"{names}: {note}"), style="dim")


def machine() -> dict[str, Any]:
    """Where the numbers are from."""
    import torch

    names = [
        line.partition(":")[2].strip()
        for line in _text("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="end with 1 if a bar is missed")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", choices=PARTS, help="one part of the table")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    given = parser.parse_args(arguments)
    load, began = os.getloadavg()[0], time.monotonic()
    reuse_freed_memory()  # as every run does; the others' code shares the process
    rows: list[Row] = []
    for name, part in PARTS.items():
        if given.only in (None, name):
            print(f"measuring: {part.__doc__}", file=sys.stderr, flush=True)
            rows += part(given.quick)
    OUT.mkdir(parents=True, exist_ok=True)
    where = {**machine(), "load": load}
    record = {"machine": where, "rows": [row.record() for row in rows]}
    (OUT / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    from bench_plot import draw  # matplotlib, for which nobody should wait to read --help

    draw(rows, OUT / "bench.png")
    if given.markdown:
        print(markdown(rows))
    else:
        show(rows, Console())
    print(f"{time.monotonic() - began:.0f} s on {where['cpu']}, load {load:.1f} before")
    if missed := misses(rows):
        print("missed:", *missed, sep="\n  ", file=sys.stderr)
    return 1 if missed and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
