"""Nearest neighbours of frames among other recordings: the lectures' figure, with numbers."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from unlabeled.backbones.load import checkpoint
from unlabeled.draws import subset
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.frozen import frozen
from unlabeled.evaluate.retrieval import BATCH, SHOWN, neighbours
from unlabeled.evaluate.shares import share
from unlabeled.evaluate.store import images


class ClipDecode(Protocol):
    """Cuts one clip of a recording, as `unlabeled.data.clip_decode.Evenly`."""

    @property
    def gives(self) -> frozenset[str]:
        """The entries of a batch that it fills."""
        ...


class FrameRetrieval:
    """Each of some frames of the test recordings queries those of all other recordings by cosine.

    `class@k` is the share of the k nearest frames that are of a recording of the query's class,
    and where the data know them `motion@k` that of recordings with its kind of motion, and
    `distance@k` how far the thing that moves (the first track) is from where it is in the query:
    the mean distance between the centres of boxes, in shares of the picture's width and height.
    Frames of the same recording and frames with the same pixels are no neighbours.

    Args:
        decode: cuts one clip of a recording, whose frames are used.
        k: numbers of neighbours.
        limit: test recordings that are used, balanced over classes.
        queries: rows of a sheet.
        supervised: a run or a checkpoint whose neighbours are shown and scored beside these.
        data: another data module than the run's.
    """

    splits = frozenset({"test"})
    needs_labels = False
    reads_pixels = True

    def __init__(
        self,
        *,
        decode: ClipDecode,
        k: Sequence[int] = (1, 5),
        limit: int = 1000,
        queries: int = 8,
        supervised: str | None = None,
        data: Data | None = None,
    ) -> None:
        if not k or min(k) < 1:
            raise ValueError(f"k must list numbers of neighbours of at least 1, got {list(k)}")
        if limit <= max(k) or queries < 1:
            raise ValueError(
                f"limit must be more than k and queries at least 1, got {limit} and {queries}"
            )
        self.decode, self.k, self.limit, self.queries = decode, tuple(sorted(k)), limit, queries
        self.supervised, self.data = supervised, data
        self._beside: nn.Module | None = None
        if supervised is not None:
            self._beside = checkpoint(supervised)  # wrong paths are told before anything runs

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        if "frames" not in getattr(data, "gives", ()):
            return "its neighbours are frames of recordings, and the data are images"
        n, least = data.size("test"), max(*self.k, SHOWN) + 1
        return f"it needs {least} test recordings, there are {n}" if n < least else None

    def tune(self, subject: Subject) -> Result:
        """Scores the subject, which is only looked at."""
        data = subject.data
        labels = data.labels("test")
        known, size = None if labels is None else labels.tolist(), data.size("test")
        rows = subset(known, size, min(self.limit, size), subject.seed, "frame retrieval")
        backbones = {"": subject.backbone}
        if self._beside is not None:  # once: the first subject is what was trained
            backbones["supervised/"] = self._beside.to(subject.device).eval()
            self._beside = None
        features, pixels, frames = self._features(subject, rows, backbones)
        facts = _facts(data, rows, frames)
        owner = torch.arange(len(rows)).repeat_interleave(frames.shape[1])
        per_image: dict[str, Tensor] = {}
        details: dict[str, dict[str, Any]] = {}
        figures: dict[str, dict[str, Any]] = {}
        y = torch.full((len(owner),), -1) if labels is None else labels[rows][owner]
        for name, z in features.items():
            near, similarity = neighbours(z, owner, pixels, max(*self.k, SHOWN), subject.device)
            for kind, fact in facts.items():
                for k in self.k:
                    score = f"{name}{kind}@{k}"
                    per_image[score] = _shares(near[:, :k], fact, kind, len(rows))
                    details[score] = self._details(kind, k)
            sheet = self._sheet(near, similarity, pixels, y, subject)
            title = "Nearest frames of other recordings"
            title += ": supervised" if name else ""
            figures[name.replace("/", "_") + "frames"] = {**sheet, "title": title}
        scores = {name: each.mean().item() for name, each in per_image.items()}
        return Result(scores, details, per_image, figures)

    def _features(
        self, subject: Subject, rows: Tensor, backbones: dict[str, nn.Module]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Of frames (n T, D) by backbone, the frames uint8 (n T, 3, h, w), and which (n, T)."""
        parts = [part.tolist() for part in rows.split(max(1, BATCH // 4))]
        found: dict[str, list[Tensor]] = {name: [] for name in backbones}
        pixels, frames = [], []
        mine = share(len(parts))
        scan = subject.data.cut("test", mine.of(parts), self.decode, "plain")
        for i, batch in enumerate(scan, mine.start):
            (clip,) = batch["crops"]
            pixels.append(clip.flatten(0, 1))
            frames.append(batch["frames"])
            for name, backbone in backbones.items():
                with frozen(backbone):
                    x = images(pixels[-1], subject.device)
                    found[name].append(backbone(x).flatten(1).float().cpu())
            subject.progress("retrieval of frames", i + 1, len(parts))
        made = {name: mine.all(torch.cat(x), subject.device) for name, x in found.items()}
        shown, which = (mine.all(torch.cat(x), subject.device) for x in (pixels, frames))
        return made, shown, which

    def _details(self, kind: str, k: int) -> dict[str, Any]:
        return {
            "protocol": "frames of other test recordings by cosine",
            "stage": "final",
            "hyperparameters": {"k": k, "limit": self.limit, "decode": repr(self.decode)},
            "selection": "none: k is given",
            **({"better": "lower"} if kind == "distance" else {}),
        }

    def _sheet(
        self, near: Tensor, similarity: Tensor, pixels: Tensor, y: Tensor, subject: Subject
    ) -> dict[str, Any]:
        known = None if bool((y < 0).all()) else y.tolist()
        rows = subset(known, len(near), min(self.queries, len(near)), subject.seed, "frames")
        found = near[rows, :SHOWN]
        shown = pixels.permute(0, 2, 3, 1).numpy()
        return {
            "kind": "neighbours",
            "note": "Queries on the left; their own recordings are left out.",
            "queries": shown[rows.numpy()],
            "neighbours": shown[found.numpy()],
            "query_labels": y[rows].numpy(),
            "neighbour_labels": y[found].numpy(),
            "similarity": similarity[rows, :SHOWN].numpy(),
            "classes": np.array(list(subject.data.classes), dtype=np.str_),
        }


def _shares(near: Tensor, fact: Tensor, kind: str, count: int) -> Tensor:
    """What the neighbours (n T, k) of frames share with them, the mean of each recording (n,).

    Frames of a recording are no independent samples: intervals are over recordings. One whose
    track is never seen has the mean of the others.
    """
    if kind == "distance":
        each = (fact[near] - fact[:, None]).norm(dim=2).double()
    else:
        each = (fact[near] == fact[:, None]).double()
    mean = each.view(count, -1).nanmean(1)
    return torch.where(mean.isnan(), mean.nanmean(), mean)


def _facts(data: Any, rows: Tensor, frames: Tensor) -> dict[str, Tensor]:
    """What is known of every frame (n T, ...): class, motion, where the first track is."""
    found: dict[str, Tensor] = {}
    labels, each = data.labels("test"), frames.shape[1]
    if labels is not None:
        found["class"] = labels[rows].repeat_interleave(each)
    kinds = data.kinds("test") if hasattr(data, "kinds") else frozenset()
    if "motion" in kinds:
        ways = data.annotation("test", "motion").stacked(rows.tolist())
        found["motion"] = ways.repeat_interleave(each)
    if "tracks" in kinds:
        height, width = data.image("test", int(rows[0])).shape[-2:]
        boxes = [
            track[0, at] if len(track) else torch.full((each, 4), torch.nan)
            for track, at in zip(
                data.annotation("test", "tracks").several(rows.tolist()), frames, strict=True
            )
        ]
        middle = torch.cat(boxes).unflatten(1, (2, 2)).mean(1)
        found["distance"] = middle / torch.tensor([width, height])
    return found
