"""From clips to their sounds and back: recall, and sheets of what was found."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.draws import subset
from unlabeled.evaluate.contract import Data, Result, Subject
from unlabeled.evaluate.forward import images
from unlabeled.evaluate.frozen import frozen
from unlabeled.evaluate.shares import share

BATCH = 256  # recordings per forward
SHOWN = 8  # of a query on a sheet
SAME = 1e-6  # cosines that differ by less are equal


class CrossModalRetrieval:
    """Every clip looks for its sound among those of all test recordings, and a sound for its clip.

    `video_to_sound/recall@k` is the share of clips whose own sound is among the k of highest cosine
    (of projections into one space), `sound_to_video/recall@k` the other way round, and
    `.../class@1` the share whose nearest is of their class. Sounds that are equally near count in
    random order, so that who finds all alike has what chance has: `chance/recall@k` = k / n and
    `chance/class@1`, beside.

    Args:
        k: how many are looked at.
        limit: test recordings that are used, balanced over classes.
        queries: rows of a sheet.
        data: another data module than the run's.
    """

    splits = frozenset({"test"})
    needs_labels = False

    def __init__(
        self,
        *,
        k: Sequence[int] = (1, 5, 10),
        limit: int = 2000,
        queries: int = 8,
        data: Data | None = None,
    ) -> None:
        if not k or min(k) < 1:
            raise ValueError(f"k must list numbers of at least 1, got {list(k)}")
        if limit < 2 or queries < 1:
            raise ValueError(f"limit must be at least 2 and queries 1, got {limit} and {queries}")
        self.k, self.limit, self.queries, self.data = tuple(sorted(k)), limit, queries, data

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        gives = getattr(getattr(data, "eval_decode", None), "gives", frozenset())
        if "audio" not in gives:
            return "its recordings have no sound: set data.eval_decode.sound"
        n = data.size("test")
        return f"it needs 2 test recordings, there are {n}" if n < 2 else None

    def misfit(self, backbone: nn.Module) -> str | None:
        return unprojected(backbone)

    def tune(self, subject: Subject) -> Result:
        """Scores the subject, which is only looked at."""
        size, labels = subject.data.size("test"), subject.data.labels("test")
        known = None if labels is None else labels.tolist()
        chosen = subset(known, size, min(self.limit, size), subject.seed, "cross-modal retrieval")
        with frozen(subject.backbone):
            video, sound, pictures = self._embedded(subject, chosen)
        y = None if labels is None else labels[chosen]
        n = len(chosen)
        scores: dict[str, float] = {}
        details: dict[str, dict[str, Any]] = {}
        per_image: dict[str, Tensor] = {}
        figures: dict[str, dict[str, Any]] = {}
        ways = {"video_to_sound": (video, sound), "sound_to_video": (sound, video)}
        for way, (queries, others) in ways.items():
            s = queries @ others.T
            found = {f"recall@{k}": recall(s, k) for k in self.k}
            if y is not None:
                found["class@1"] = (y[s.argmax(1)] == y).double()
            for name, hits in found.items():
                per_image[f"{way}/{name}"] = hits
            figures[way] = self._sheet(way, s, pictures, y, subject)
        chance = {f"recall@{k}": min(1.0, k / n) for k in self.k}
        if y is not None:
            chance["class@1"] = float((y.bincount().double() / n).square().sum())
        scores = {name: hits.mean().item() for name, hits in per_image.items()}
        scores |= {f"chance/{name}": value for name, value in chance.items()}
        for name in scores:
            details[name] = {
                "protocol": "cosine of projections among test recordings",
                "stage": "projection",
                "hyperparameters": {"limit": self.limit},
                "selection": "none: k is given",
                "chance": chance[name.split("/")[1]],
            }
            if name.startswith("chance/"):
                details[name] |= {"better": "neither", "ci95": [scores[name]] * 2, "n": n}
        return Result(scores, details, per_image, figures)

    def _embedded(self, subject: Subject, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit projections (n, D) of clips and of sounds, and pictures (n, 3, h, w) uint8."""
        positions, net = chosen.tolist(), subject.backbone
        parts = [positions[i : i + BATCH] for i in range(0, len(positions), BATCH)]
        seen: list[Tensor] = []
        heard: list[Tensor] = []
        pictures: list[Tensor] = []
        mine = share(len(parts))
        scan = subject.data.cut("test", mine.of(parts), subject.data.eval_decode, "plain")
        for i, batch in enumerate(scan, mine.start):
            clips = batch["crops"][0]
            h = net(images(clips, subject.device))
            g = net.hear(batch["audio"].to(subject.device))  # type: ignore[operator]
            v, a = net.embed(h, g)  # type: ignore[operator]
            seen.append(v.float().cpu())
            heard.append(a.float().cpu())
            pictures.append(clips[:, clips.shape[1] // 2] if clips.ndim == 5 else clips)
            subject.progress("cross-modal retrieval", i + 1, len(parts))
        v, a, shown = (mine.all(torch.cat(x), subject.device) for x in (seen, heard, pictures))
        return F.normalize(v, dim=1), F.normalize(a, dim=1), shown

    def _sheet(
        self, way: str, s: Tensor, pictures: Tensor, y: Tensor | None, subject: Subject
    ) -> dict[str, Any]:
        known = None if y is None else y.tolist()
        count = min(self.queries, len(s))
        rows = subset(known, len(s), count, subject.seed, "sheet", "cross-modal")
        similarity, near = s[rows].topk(min(SHOWN, s.shape[1]), dim=1)

        def shown(at: Tensor) -> np.ndarray[Any, Any]:
            return pictures[at].movedim(-3, -1).numpy()

        # Without classes what is marked as right is the query's own recording.
        labels = torch.arange(len(s)) if y is None else y
        names = [f"recording {i}" for i in labels] if y is None else subject.data.classes
        asked, given = ("clip", "sound") if way == "video_to_sound" else ("sound", "clip")
        return {
            "kind": "neighbours",
            "title": f"From each {asked} to the nearest {given}s",
            "note": f"A picture stands for its recording, whose {asked} is the query on the left, "
            f"and whose {given} was found on the right; its own may be among them.",
            "queries": shown(rows),
            "neighbours": shown(near),
            "query_labels": labels[rows].numpy(),
            "neighbour_labels": labels[near].numpy(),
            "similarity": similarity.numpy(),
            "classes": np.array(list(names), dtype=np.str_),
        }


def recall(s: Tensor, k: int) -> Tensor:
    """(n,) float64: how likely row i's own column is among its k highest, ties in random order.

    Args:
        s: (n, n) cosines; the diagonal holds what is looked for.
        k: how many.
    """
    own = s.diagonal()[:, None]
    nearer = (s > own + SAME).sum(1)
    equal = ((s - own).abs() <= SAME).sum(1)  # itself among them
    return ((k - nearer) / equal).double().clamp(0, 1)


def unprojected(backbone: nn.Module) -> str | None:
    """Why a backbone cannot: it has no projections of clips and of sound into one space."""
    if hasattr(backbone, "embed") and getattr(backbone, "space", 1):
        return None
    return (
        f"the backbone {type(backbone).__name__} does not project clips and sound into one "
        "space: choose backbone=audio_video, or for method=avc method.head=distance "
        "method.sound=null method.augment.spectrogram=null backbone=look_listen_pair "
        "backbone.hidden=[128] backbone.space=128, or leave this evaluation out"
    )
