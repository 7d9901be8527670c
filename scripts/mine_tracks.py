"""Mines tracks of moving patches in recordings, as Wang & Gupta (2015) did: for method=tracking.

    pip install 'unlabeled[tracks]'
    python scripts/mine_tracks.py tracks data=scenes_video
    python scripts/mine_tracks.py tracks data=scenes_video data.root=elsewhere --length 30
    unlabeled experiment=scenes/tracking data.tracks=tracks

What is not an option is an override of the run's config, which says what the recordings are. OUT
gets an index for each split (train.npz, test.npz) and a contact sheet of tracks (tracks.png): a
row for each, from the first patch to the last. A command that was stopped goes on where it was.

From every few frames on, corners are followed to the next frame. What moves otherwise than the
picture as a whole (a homography, robustly) by more than half a pixel is moving. Where too few
corners do there is nothing to see, where too many do the camera shook: both are left out. The
square with the most moving corners is tracked for `--length` frames: by the median of its corners'
ways, which have to lead back where they came from (Lucas-Kanade; "flow"), or by OpenCV's learned
appearance ("mil", which never says that it lost its patch).
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unlabeled.cli import conf_dir
from unlabeled.data.recordings import Recorded, Recording
from unlabeled.data.rgb import UnreadableError
from unlabeled.data.splits import Split
from unlabeled.data.tracks import Tracks

# None: `main` says what to install
cv2: Any = import_module("cv2") if find_spec("cv2") is not None else None

CHUNK = 50  # recordings whose tracks are kept together, so that a run can go on
LOOSE = 4  # fewest corners that tell where a patch goes
BACK = 1.0  # pixels by which a corner may miss where it came from
ROWS, COLUMNS, CELL = 24, 8, 64  # of the contact sheet, and pixels of a patch on it


class Track(NamedTuple):
    """A patch in consecutive pictures."""

    frames: np.ndarray  # (L + 1,) int64
    boxes: np.ndarray  # (L + 1, 4) float32: left, top, right, bottom


class Mining(NamedTuple):
    """What decides which tracks are found."""

    length: int  # frames that a patch is tracked for
    every: int  # frames from one start to the next
    side: int  # pixels of a picture's short side while it is looked at
    patch: float  # side of a patch, as a share of the short side
    moving: float  # pixels beyond which a corner moves
    least: float  # share of corners that move, at least
    most: float  # and at most
    tracker: str  # flow or mil


def grey(pictures: np.ndarray, side: int) -> list[np.ndarray]:
    """Pictures (F, 3, H, W) uint8 in grey, with a short side of `side` pixels."""
    found = []
    for x in pictures:
        plain = cv2.cvtColor(np.ascontiguousarray(x.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
        scale = side / min(plain.shape)
        size = (round(plain.shape[1] * scale), round(plain.shape[0] * scale))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        found.append(plain if scale == 1 else cv2.resize(plain, size, interpolation=how))
    return found


def follow(one: np.ndarray, two: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where corners (N, 2) of a picture are in the next one, and which of them were found again."""
    start = points.astype(np.float32)[:, None]
    window = {"winSize": (15, 15), "maxLevel": 3}
    there, found, _ = cv2.calcOpticalFlowPyrLK(one, two, start, None, **window)
    back, again, _ = cv2.calcOpticalFlowPyrLK(two, one, there, None, **window)
    near = np.linalg.norm((back - start)[:, 0], axis=1) < BACK
    return there[:, 0], near & (found[:, 0] == 1) & (again[:, 0] == 1)


def corners(picture: np.ndarray, box: np.ndarray | None = None, most: int = 400) -> np.ndarray:
    """Corners (N, 2) of a picture, or of a box of it."""
    mask = None
    if box is not None:
        left, top, right, bottom = (round(float(x)) for x in box)
        mask = np.zeros_like(picture)
        mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = 255
    found = cv2.goodFeaturesToTrack(picture, most, 0.01, 3, mask=mask)
    return np.zeros((0, 2), np.float32) if found is None else found[:, 0]


def residual(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(N,) pixels by which ways of corners differ from the picture's as a whole."""
    if len(start) >= 8:
        whole, _ = cv2.findHomography(start, end, cv2.RANSAC, 1.0)
        if whole is not None:
            carried = cv2.perspectiveTransform(start[:, None].astype(np.float64), whole)[:, 0]
            return np.linalg.norm(end - carried, axis=1)
    way = end - start
    return np.linalg.norm(way - np.median(way, axis=0), axis=1)


def proposed(one: np.ndarray, two: np.ndarray, how: Mining) -> np.ndarray | None:
    """The square (4,) of a picture in which most moves towards the next, if enough does."""
    start = corners(one)
    if len(start) < LOOSE:
        return None
    end, found = follow(one, two, start)
    start, end = start[found], end[found]
    if len(start) < LOOSE:
        return None
    moving = start[residual(start, end) > how.moving]
    if len(moving) < LOOSE or not how.least <= len(moving) / len(start) <= how.most:
        return None
    height, width = one.shape
    side = how.patch * min(height, width)
    # squares about each moving corner; the fullest one moves to the middle of what it holds
    inside = (np.abs(moving[:, None] - moving[None]) <= side / 2).all(2)
    middle = moving[inside[inside.sum(1).argmax()]].mean(0)
    corner = np.clip(middle - side / 2, 0, [width - side, height - side])
    return np.concatenate([corner, corner + side]).astype(np.float32)


def moved(one: np.ndarray, two: np.ndarray, box: np.ndarray) -> np.ndarray | None:
    """A box (4,) in the next picture: shifted and scaled as most of its moving corners are."""
    start = corners(one, box, 100)
    if len(start) < LOOSE:
        return None
    end, found = follow(one, two, start)
    start, end = start[found], end[found]
    if len(start) < LOOSE:
        return None
    way = end - start
    # What the patch is about moves; the background, which may have more corners, does not.
    fast = np.linalg.norm(way, axis=1)
    lively = fast > 0.5 * np.quantile(fast, 0.9)
    start, end, way = start[lively], end[lively], way[lively]
    if len(start) < LOOSE:
        return None
    shift = np.median(way, axis=0)
    one_by_one = np.triu_indices(len(start), 1)
    before = np.linalg.norm((start[:, None] - start[None])[one_by_one], axis=1)
    after = np.linalg.norm((end[:, None] - end[None])[one_by_one], axis=1)
    scale = float(np.clip(np.median(after / np.maximum(before, 1e-3)), 0.9, 1.1))
    middle, half = (box[:2] + box[2:]) / 2 + shift, (box[2:] - box[:2]) / 2 * scale
    return np.concatenate([middle - half, middle + half]).astype(np.float32)


def tracked(pictures: list[np.ndarray], box: np.ndarray, tracker: str) -> np.ndarray | None:
    """Boxes (F, 4) of a patch through pictures; None where it was lost or left the picture."""
    boxes = [box]
    follows: Any = None
    if tracker == "mil":
        cv2.setRNGSeed(0)  # its negatives are random
        follows = cv2.TrackerMIL.create()
        left, top, right, bottom = (round(float(x)) for x in box)
        follows.init(
            cv2.cvtColor(pictures[0], cv2.COLOR_GRAY2BGR), (left, top, right - left, bottom - top)
        )
    for one, two in itertools.pairwise(pictures):
        if follows is None:
            new = moved(one, two, boxes[-1])
        else:
            there, (left, top, w, h) = follows.update(cv2.cvtColor(two, cv2.COLOR_GRAY2BGR))
            new = np.array([left, top, left + w, top + h], np.float32) if there else None
        height, width = one.shape
        if new is None or not outside(new, width, height) <= 0.25:
            return None
        boxes.append(new)
    return np.stack(boxes)


def outside(box: np.ndarray, width: int, height: int) -> float:
    """The share of a box that is beyond the picture."""
    left, top, right, bottom = box
    seen = max(0.0, min(right, width) - max(left, 0)) * max(0.0, min(bottom, height) - max(top, 0))
    return 1 - seen / max(1e-6, (right - left) * (bottom - top))


def mined(recording: Recording, how: Mining) -> Iterator[Track]:
    """The tracks of a recording. Raises `UnreadableError`."""
    count = len(recording.times)
    if count <= how.length:
        return
    for start in range(0, count - how.length, how.every):
        first = recording.pictures([start, start + 1]).numpy()
        one, two = grey(first, how.side)
        box = proposed(one, two, how)
        if box is None:
            continue
        span = range(
            start, start + how.length + 1
        )  # in memory at once, of a recording of any length
        boxes = tracked(grey(recording.pictures(span).numpy(), how.side), box, how.tracker)
        if boxes is not None:
            scale = np.float32(min(first.shape[-2:]) / how.side)
            yield Track(np.arange(start, start + how.length + 1), boxes * scale)


Job = tuple[str, int, int, Mining, Path]  # split, recordings from and to, and where to keep them
SPLITS: dict[str, Split] = {}


def chunk(job: Job) -> tuple[int, int]:
    """Mines some recordings and keeps what was found; (tracks, unreadable recordings)."""
    side, start, stop, how, path = job
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rows, bad = [], 0
    for i in range(start, stop):
        try:
            rows += [(i, x) for x in mined(SPLITS[side].recording(i), how)]  # type: ignore
        except UnreadableError:
            bad += 1
    n = how.length + 1
    part = path.with_name(f".{path.name}.partial")
    with part.open("wb") as file:
        np.savez(
            file,
            recording=np.array([i for i, _ in rows], np.int64),
            frames=np.array([x.frames for _, x in rows], np.int64).reshape(-1, n),
            boxes=np.array([x.boxes for _, x in rows], np.float32).reshape(-1, n, 4),
            bad=np.array(bad),
        )
    os.replace(part, path)
    return len(rows), bad


def opened(overrides: Sequence[str]) -> None:
    """Opens the recordings in a worker."""
    SPLITS.update(splits(overrides))


def worked(
    jobs: Sequence[Job], workers: int, overrides: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """What `chunk` gives for each, in this process or in several."""
    if workers == 1:
        yield from map(chunk, jobs)
        return
    fresh = multiprocessing.get_context("spawn")  # a fork may inherit a lock of OpenMP's
    with ProcessPoolExecutor(workers, fresh, opened, (overrides,)) as pool:
        yield from pool.map(chunk, jobs)


def mine(
    out: Path, how: Mining, workers: int, overrides: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """All tracks of all splits, from parts that lie in OUT/parts and are made where they do not."""
    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    said = {"mining": how._asdict(), "splits": {k: x.identity() for k, x in SPLITS.items()}}
    plan = parts / "plan.json"
    if plan.exists() and json.loads(plan.read_text()) != json.loads(json.dumps(said)):
        raise ValueError(f"{out} has tracks of other recordings or settings: choose another folder")
    plan.write_text(json.dumps(said, indent=1))
    jobs = [
        (side, i, min(i + CHUNK, len(split)), how, parts / f"{side}-{i:08d}.npz")
        for side, split in SPLITS.items()
        for i in range(0, len(split), CHUNK)
    ]
    shown = (TextColumn("tracks {task.fields[tracks]}"), BarColumn(), MofNCompleteColumn())
    with Progress(*shown, TimeRemainingColumn()) as progress:
        bar = progress.add_task("", total=sum(stop - i for _, i, stop, *_ in jobs), tracks=0)
        count = 0
        left = [job for job in jobs if not job[-1].exists()]
        progress.advance(bar, sum(j[2] - j[1] for j in jobs) - sum(j[2] - j[1] for j in left))
        for job, (found, _) in zip(left, worked(left, workers, overrides), strict=True):
            count += found
            progress.update(bar, advance=job[2] - job[1], tracks=count)
    whole: dict[str, dict[str, np.ndarray]] = {}
    for side in SPLITS:
        kept = [np.load(job[-1], allow_pickle=False) for job in jobs if job[0] == side]
        whole[side] = {k: np.concatenate([np.atleast_1d(x[k]) for x in kept]) for k in kept[0]}
    return whole


def sheet(split: Split, found: dict[str, np.ndarray], path: Path) -> None:
    """A contact sheet: tracks that are spread over the recordings, a row for each."""
    chosen = np.unique(np.linspace(0, len(found["recording"]) - 1, ROWS).round().astype(int))
    rows = []
    for i in chosen:
        n = found["frames"].shape[1]
        at = np.unique(np.linspace(0, n - 1, min(COLUMNS, n)).round().astype(int))
        recording: Recording = split.recording(int(found["recording"][i]))  # type: ignore
        pictures = recording.pictures(found["frames"][i][at].tolist())
        cells = []
        for picture, box in zip(pictures, found["boxes"][i][at], strict=True):
            whole = Image.fromarray(picture.permute(1, 2, 0).numpy())
            cells.append(
                np.asarray(
                    whole.resize((CELL, CELL), Image.Resampling.BILINEAR, clipped(box, whole))
                )
            )
        rows.append(np.concatenate(cells, 1))
    Image.fromarray(np.concatenate(rows)).save(path)


def clipped(box: np.ndarray, picture: Image.Image) -> tuple[float, float, float, float]:
    """A box within a picture."""
    left, top, right, bottom = np.clip(box, 0, [picture.width, picture.height] * 2).tolist()
    return left, top, right, bottom


def splits(overrides: Sequence[str]) -> dict[str, Split]:
    """The recordings that a run with these overrides reads. Raises ValueError."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    layout, root = instantiate(cfg.data.layout), Path(cfg.data.root).expanduser()
    found: dict[str, Split] = layout(root, cfg.data.seed)
    for side, split in found.items():
        if not isinstance(split, Recorded):
            raise ValueError(
                f"the {side} split has images, not recordings: choose data=scenes_video"
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    """0: the index is written; 2: wrong input."""
    given = parser().parse_intermixed_args(arguments)
    settings = {name: getattr(given, name) for name in Mining._fields}
    try:
        if cv2 is None:
            raise ValueError("it needs OpenCV: pip install 'unlabeled[tracks]'")
        low = {"length": 1, "every": 1, "side": 32, "workers": 1}
        for name, least in low.items():
            if getattr(given, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(given, name)}")
        if not 0 < given.patch <= 1 or not 0 <= given.least < given.most <= 1 or given.moving <= 0:
            raise ValueError("need 0 < --patch <= 1, 0 <= --least < --most <= 1 and --moving > 0")
        SPLITS.clear()
        SPLITS.update(splits(given.overrides))
        whole = mine(given.out, Mining(**settings), given.workers, given.overrides)
        if not len(whole["train"]["recording"]):
            raise ValueError("nothing could be tracked: try a smaller --length or --least")
    except (ValueError, OSError, HydraException) as error:
        print(f"mine_tracks: {error}", file=sys.stderr)
        return 2
    for side, found in whole.items():
        frames, boxes = (torch.from_numpy(found[k][:, [0, -1]]) for k in ("frames", "boxes"))
        tracks = Tracks(torch.from_numpy(found["recording"]), frames, boxes)
        tracks.write(given.out / f"{side}.npz", SPLITS[side].identity())
        with_some, bad = len(np.unique(found["recording"])), int(found["bad"].sum())
        print(
            f"{side}: {len(frames)} tracks in {with_some} of {len(SPLITS[side])} recordings"
            + (f", {bad} unreadable" if bad else "")
        )
    sheet(SPLITS["train"], whole["train"], given.out / "tracks.png")
    print(f"look at {given.out / 'tracks.png'}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("out", type=Path, help="where the index is written")
    made.add_argument("overrides", nargs="*", help="of the config: data=scenes_video, data.root=…")
    made.add_argument("--length", type=int, default=30, help="frames that a patch is tracked for")
    made.add_argument("--every", type=int, default=15, help="frames from one start to the next")
    made.add_argument("--side", type=int, default=256, help="short side while mining, in pixels")
    made.add_argument("--patch", type=float, default=0.5, help="share of the short side")
    made.add_argument("--moving", type=float, default=0.5, help="pixels beyond which corners move")
    made.add_argument("--least", type=float, default=0.25, help="share of corners that move")
    made.add_argument("--most", type=float, default=0.75, help="share of corners that move")
    made.add_argument("--tracker", choices=["flow", "mil"], default="flow")
    made.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    return made


if __name__ == "__main__":
    sys.exit(main())
