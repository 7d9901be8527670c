"""Writes the images of a folder, a list or a known data set as WebDataset shards.

    python scripts/make_shards.py photos shards
    python scripts/make_shards.py photos shards --list train.txt --max-side 512
    python scripts/make_shards.py imagenet shards --layout imagenet --workers 16
    python scripts/make_shards.py VOCdevkit shards --layout voc07
    unlabeled data=shards data.root=shards

A shard is OUT/<split>/<number>.tar, with its index (.index.npz) and its count, unreadable images
and SHA-256 (_stats.json) beside it; `cd OUT; sha256sum -c SHA256SUMS` checks all. A sample is the
image's file as it is, or a JPEG where it was larger than --max-side, `.json` with its path, and
`.cls` with its class, whose names are in OUT/classes.txt. The same command with the same images
gives the same bytes; one that was stopped goes on where it was, and a finished shard is not
written again.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unlabeled.data import tar
from unlabeled.data.layouts import Folder, ImageNet, List
from unlabeled.data.rgb import MAX_PIXELS, UnreadableError, read
from unlabeled.data.splits import Files
from unlabeled.data.voc import VOC
from unlabeled.draws import shuffled

NAMED = 10  # unreadable images that are printed


class Plan(NamedTuple):
    """What makes the bytes of a split's shards."""

    folder: Path
    split: Files
    order: np.ndarray  # (N,) positions in the split
    per_shard: int
    max_side: int | None
    quality: int
    check: bool
    name: str  # a hash of all this

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-len(self.split) // self.per_shard)


PLANS: dict[str, Plan] = {}  # what forked workers find
WRITTEN = multiprocessing.get_context("fork").Value("q", 0)  # images, by all of them


def main(arguments: list[str] | None = None) -> int:
    """0: all is written; 1: too much cannot be read; 2: wrong input."""
    given = parser().parse_args(arguments)
    try:
        splits = read_splits(given)
        PLANS.update({side: plan(side, split, given) for side, split in splits.items()})
        refuse_others(given.out)
    except ValueError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    for each in PLANS.values():
        each.folder.mkdir(parents=True, exist_ok=True)
        for partial in each.folder.glob(".*.partial"):
            partial.unlink()  # of a run that was killed
    classes = PLANS["train"].split.classes
    if classes and PLANS["train"].split.labels is not None:
        replace(given.out / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    stats = write_all(given.workers)
    sums = [
        f"{shard['sha256']}  {side}/{number:05d}.tar\n"
        for (side, number), shard in sorted(stats.items())
    ]
    replace(given.out / "SHA256SUMS", "".join(sums).encode())
    return report(stats, given.max_unreadable)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("source", type=Path, help="the folder of the images")
    made.add_argument("out", type=Path, help="where shards are written")
    made.add_argument(
        "--layout", choices=["folder", "imagenet", "voc07", "voc12"], default="folder"
    )
    made.add_argument("--list", help="a text file of paths, one a line, instead of the folder")
    made.add_argument("--per-shard", type=int, help="images of a shard; default: 10 000, or fewer")
    made.add_argument("--max-side", type=int, help="shrink images whose longer side is longer")
    made.add_argument("--quality", type=int, default=92, help="of JPEGs that are written")
    made.add_argument("--keep-order", action="store_true", help="do not shuffle the images")
    made.add_argument("--seed", type=int, default=0, help="of the shuffle")
    made.add_argument("--check", action="store_true", help="decode every image completely")
    made.add_argument("--max-unreadable", type=float, default=0.01, help="share that may be")
    made.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    return made


def read_splits(given: argparse.Namespace) -> dict[str, Files]:
    """The images. Raises ValueError if there are none or a setting is wrong."""
    for name, low in (("per_shard", 1), ("max_side", 1), ("workers", 1)):
        if getattr(given, name) is not None and getattr(given, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}")
    if not 1 <= given.quality <= 100:
        raise ValueError(f"--quality must be 1 to 100, got {given.quality}")
    if not 0 <= given.max_unreadable < 1:
        raise ValueError(f"--max-unreadable must be in [0, 1), got {given.max_unreadable}")
    if given.list is not None and given.layout != "folder":
        raise ValueError("--list and --layout exclude one another")
    if given.source.resolve() == given.out.resolve():
        raise ValueError("write the shards to another folder than the images'")
    layout = {
        "folder": Folder(test_share=0) if given.list is None else List(train=given.list),
        "imagenet": ImageNet(),
        "voc07": VOC(),
        "voc12": VOC(train=["2012/trainval"], test=[]),
    }[given.layout]
    return layout(given.source, 0)  # type: ignore[return-value]


def images_of_a_shard(count: int) -> int:
    """10 000, or fewer where that leaves workers without a shard; the same on every machine."""
    return min(10_000, max(250, -(-count // 16)))


def plan(side: str, split: Files, given: argparse.Namespace) -> Plan:
    """What is to be written of a split."""
    order = (
        np.arange(len(split)) if given.keep_order else shuffled(len(split), given.seed, "shards")
    )
    per_shard = given.per_shard or images_of_a_shard(len(split))
    settings = (per_shard, given.max_side, given.quality, given.check)
    h = hashlib.blake2b(split.identity().encode(), digest_size=16)
    h.update(np.asarray(order).astype("<i8").tobytes() + repr(settings).encode())
    return Plan(given.out / side, split, np.asarray(order), *settings, h.hexdigest())


def refuse_others(out: Path) -> None:
    """Shards of other images or settings stay as they are. Raises ValueError."""
    for each in PLANS.values():
        for path in sorted(each.folder.glob("*_stats.json")):
            archive = path.with_name(path.name.replace("_stats.json", ".tar"))
            if archive.exists() and finished(each, int(path.name.partition("_")[0])) is None:
                raise ValueError(
                    f"{path} tells of other images or other settings: choose another folder than "
                    f"{out}, or delete it"
                )


def finished(plan: Plan, number: int) -> dict[str, Any] | None:
    """What a shard's statistics say if it is complete and of this plan."""
    base = plan.folder / f"{number:05d}"
    try:
        stats = json.loads(base.with_name(f"{base.name}_stats.json").read_text())
        whole = base.with_suffix(".tar").stat().st_size == stats["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    index = base.with_suffix(".index.npz").exists()
    return stats if whole and index and stats.get("plan") == plan.name else None


def write_all(workers: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Writes what is missing; the statistics of every shard."""
    todo = [(side, n) for side, each in PLANS.items() for n in range(each.shards)]
    done = {key: stats for key in todo if (stats := finished(PLANS[key[0]], key[1])) is not None}
    todo = [key for key in todo if key not in done]
    there, WRITTEN.value = sum(len(members(PLANS[side], n)) for side, n in done), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    fork = multiprocessing.get_context("fork")  # the plans are not sent, they are there
    with ProcessPoolExecutor(min(workers, max(1, len(todo))), mp_context=fork) as pool:
        written = {pool.submit(write, side, n): (side, n) for side, n in todo}
        try:
            with Progress(*columns, TimeRemainingColumn()) as progress:
                total = sum(len(each.split) for each in PLANS.values())
                bar = progress.add_task("images", total=total)
                waiting = set(written)
                while waiting:
                    ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                    progress.update(bar, completed=there + WRITTEN.value)
                    done |= {written[future]: future.result() for future in ended}
                progress.update(bar, completed=there + WRITTEN.value)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what is finished stays
            raise
    return done


def members(plan: Plan, number: int) -> np.ndarray:
    """Positions of a shard's images."""
    return plan.order[number * plan.per_shard : (number + 1) * plan.per_shard]


def write(side: str, number: int) -> dict[str, Any]:
    """One shard: the archive, its index, and last its statistics, each at once or not at all."""
    plan = PLANS[side]
    target = plan.folder / f"{number:05d}.tar"
    partial = target.with_name(f".{target.name}.partial")
    failed: dict[str, str] = {}
    with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
        for place, i in enumerate(members(plan, number).tolist(), number * plan.per_shard):
            try:
                for suffix, data in sample(plan, i):
                    info = tarfile.TarInfo(f"{place:09d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            except UnreadableError as error:
                failed[plan.split.name(i)] = str(error)
            with WRITTEN.get_lock():
                WRITTEN.value += 1
    with open(partial, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    stats = {
        "count": len(members(plan, number)),
        "successes": len(members(plan, number)) - len(failed),
        "failed_to_read": failed,
        "bytes": partial.stat().st_size,
        "sha256": checksum,
        "plan": plan.name,
    }
    index = tar.scan(partial)._replace(changed=np.array(0))
    tar.save(target.with_suffix(".index.npz"), index)
    os.replace(partial, target)
    text = json.dumps(stats, indent=1).encode()
    replace(target.with_name(f"{number:05d}_stats.json"), text)
    return stats


def sample(plan: Plan, i: int) -> Iterator[tuple[str, bytes]]:
    """The members of an image. Raises UnreadableError before the first."""
    split = plan.split
    path = split.root / split.name(i)
    suffix, data = encoded(plan, path)
    about: dict[str, Any] = {"path": split.name(i)}
    if "presence" in split.annotations:
        marks = split.annotations["presence"][i].tolist()
        about["classes"] = [name for name, x in zip(split.classes, marks, strict=True) if x == 1]
    yield suffix, data
    yield "json", json.dumps(about).encode()
    if split.labels is not None:
        yield "cls", str(int(split.labels[i])).encode()


def encoded(plan: Plan, path: Path) -> tuple[str, bytes]:
    """An image's file, or a smaller JPEG of it, and how its name ends."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Exception as error:  # on damaged files the decoders raise nearly anything
        raise UnreadableError(f"{type(error).__name__}: {error}") from error
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"{width} x {height} pixels")
    small = plan.max_side is None or max(width, height) <= plan.max_side
    if plan.check or not small:
        upright = read(io.BytesIO(data))
    if small:
        return path.suffix[1:].lower(), data
    upright.thumbnail((plan.max_side, plan.max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    upright.save(file, "JPEG", quality=plan.quality)
    return "jpg", file.getvalue()


def replace(path: Path, content: bytes) -> None:
    """Writes a file at once or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def report(stats: dict[tuple[str, int], dict[str, Any]], allowed: float) -> int:
    """Prints what was written and what could not be read."""
    failed = {k: why for shard in stats.values() for k, why in shard["failed_to_read"].items()}
    count = sum(shard["count"] for shard in stats.values())
    size = sum(shard["bytes"] for shard in stats.values())
    print(f"{count - len(failed)} images in {len(stats)} shards, {size / 1e9:.2f} GB")
    for name, why in list(failed.items())[:NAMED]:
        print(f"cannot read {name} ({why})", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {count} images cannot be read (see *_stats.json)", file=sys.stderr)
    return int(len(failed) > allowed * count)


if __name__ == "__main__":
    sys.exit(main())
