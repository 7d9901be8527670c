"""Nearest neighbours of images and of patches: the figures of the lectures, and recall."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.draws import Draws, subset
from unlabeled.evaluate.contract import FINAL, Data, Request, Result, Shapes, Subject
from unlabeled.evaluate.frozen import frozen
from unlabeled.evaluate.knn import search
from unlabeled.evaluate.shares import share
from unlabeled.evaluate.store import images

BATCH = 256  # images or patches per forward
SHOWN = 8  # neighbours of a query on a sheet
SAME = 1 - 1e-5  # cosine of what may be a duplicate


class Retrieval:
    """Each test image, and each patch of one, queries all others by cosine similarity.

    `image/recall@k` is the share of queries with an image of their class among the k nearest;
    `patch/recall@k` the same for patches, which carry their image's label. The query itself,
    duplicates of it (the same pixels) and, for patches, the other patches of its image are no
    neighbours. Patches are squares at random places, enlarged to the size of a test image: the
    features of a patch are those of an image (Doersch et al., 2015, section 4.1).

    Args:
        k: numbers of neighbours.
        patches: of each image; 0: images only.
        share: side of a patch as a share of the image's.
        limit: test images that are used, balanced over classes.
        queries: rows of a sheet.
        data: another data module than the run's.
    """

    splits = frozenset({"test"})
    needs_labels = False
    reads_pixels = True

    def __init__(
        self,
        *,
        k: Sequence[int] = (1, 5, 10),
        patches: int = 4,
        share: float = 0.5,
        limit: int = 2000,
        queries: int = 8,
        data: Data | None = None,
    ) -> None:
        if not k or min(k) < 1:
            raise ValueError(f"k must list numbers of neighbours of at least 1, got {list(k)}")
        if patches < 0:
            raise ValueError(f"patches must not be negative, got {patches}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        if limit <= max(k) or queries < 1:
            raise ValueError(
                f"limit must be more than k and queries at least 1, got {limit} and {queries}"
            )
        self.k, self.patches, self.share = tuple(sorted(k)), patches, share
        self.limit, self.queries, self.data = limit, queries, data

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        n, least = data.size("test"), max(*self.k, SHOWN) + 1
        return f"it needs {least} test images, there are {n}" if n < least else None

    def requests(self, shapes: Shapes) -> set[Request]:
        return {FINAL}

    def tune(self, subject: Subject) -> Result:
        """Scores the subject, which is only looked at."""
        data, size = subject.data, subject.data.size("test")
        labels = data.labels("test")
        known = None if labels is None else labels.tolist()
        chosen = subset(known, size, min(self.limit, size), subject.seed, "retrieval")
        with frozen(subject.backbone):
            whole, parts, shown = self._features(subject, chosen)
        y = None if labels is None else labels[chosen]
        scores: dict[str, float] = {}
        details: dict[str, dict[str, Any]] = {}
        per_image: dict[str, Tensor] = {}
        figures: dict[str, dict[str, Any]] = {}
        owner = torch.arange(len(chosen))
        kinds = {"image": (whole, owner, shown["image"])}
        if self.patches:
            kinds["patch"] = (parts, owner.repeat_interleave(self.patches), shown["patch"])
        for kind, (features, owners, pixels) in kinds.items():
            near, similarity = neighbours(
                features, owners, pixels, max(*self.k, SHOWN), subject.device
            )
            labelled = None if y is None else y[owners]
            figures[kind] = self._sheet(kind, near, similarity, pixels, labelled, subject)
            if labelled is None:
                continue
            right = labelled[near] == labelled[:, None]
            for k in self.k:
                name = f"{kind}/recall@{k}"
                hit = right[:, :k].any(1)
                # Patches of an image are no independent samples: the interval is over images.
                per_image[name] = hit.double().view(len(chosen), -1).mean(1)
                scores[name] = hit.double().mean().item()
                details[name] = {
                    "protocol": f"{kind} retrieval by cosine among test images",
                    "stage": "final",
                    "hyperparameters": {
                        "k": k,
                        "limit": self.limit,
                        **(
                            {"patches": self.patches, "share": self.share}
                            if kind != "image"
                            else {}
                        ),
                    },
                    "selection": "none: k is given",
                }
        return Result(scores, details, per_image, figures)

    def _features(
        self, subject: Subject, chosen: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Of images (n, D) and of patches (n * patches, D), and both as pixels uint8."""
        positions = chosen.tolist()
        known = subject.kept("test", FINAL, chosen)
        batches = [positions[i : i + BATCH] for i in range(0, len(positions), BATCH)]
        whole: list[Tensor] = []
        parts: list[Tensor] = []
        pixels: list[Tensor] = []
        cuts: list[Tensor] = []
        mine = share(len(batches))
        scan = subject.data.cut("test", mine.of(batches), subject.data.eval_decode, "plain")
        for i, batch in enumerate(scan, mine.start):
            crop = batch["crops"][0]
            pixels.append(crop)
            if known is None:
                x = images(crop, subject.device)
                whole.append(subject.backbone(x).flatten(1).float().cpu())
            if self.patches:
                cut = self._cut(crop, Draws(subject.seed, "patches", i, rows=len(crop)))
                cuts.append(cut)
                parts += [
                    subject.backbone(images(some, subject.device)).flatten(1).float().cpu()
                    for some in cut.split(BATCH)
                ]
            subject.progress("retrieval", i + 1, len(batches))
        shown = {"image": mine.all(torch.cat(pixels), subject.device)}
        of_patches = torch.empty(0)
        if cuts:
            shown["patch"] = mine.all(torch.cat(cuts), subject.device)
            of_patches = mine.all(torch.cat(parts), subject.device)
        of_images = mine.all(torch.cat(whole), subject.device) if known is None else known
        return of_images, of_patches, shown

    def _cut(self, crop: Tensor, draws: Draws) -> Tensor:
        """Patches (B * patches, 3, S, S) uint8 of crops (B, 3, S, S), enlarged."""
        size = crop.shape[-1]
        side = max(1, round(self.share * size))
        corners = draws.integers(size - side + 1, self.patches, 2)  # B P 2
        windows = crop.unfold(2, side, 1).unfold(3, side, 1)  # B 3 h w side side
        rows = torch.arange(len(crop))[:, None]
        cut = windows.permute(0, 2, 3, 1, 4, 5)[rows, corners[..., 0], corners[..., 1]]
        cut = cut.flatten(0, 1).float()
        large = F.interpolate(cut, size=(size, size), mode="bilinear", antialias=True)
        return large.round().clamp(0, 255).to(torch.uint8)

    def _sheet(
        self,
        kind: str,
        near: Tensor,
        similarity: Tensor,
        pixels: Tensor,
        labels: Tensor | None,
        subject: Subject,
    ) -> dict[str, Any]:
        known = None if labels is None else labels.tolist()
        rows = subset(known, len(near), min(self.queries, len(near)), subject.seed, "sheet", kind)
        found = near[rows, :SHOWN]

        def picture(at: Tensor) -> np.ndarray:
            x = pixels[at.flatten()].permute(0, 2, 3, 1).numpy()
            return x.reshape(*at.shape, *x.shape[1:])

        y = torch.full((len(near),), -1) if labels is None else labels
        return {
            "kind": "neighbours",
            "title": f"Nearest neighbours of {'images' if kind == 'image' else 'patches'}",
            "note": "Queries on the left; the query, its duplicates"
            + (" and patches of its own image" if kind == "patch" else "")
            + " are left out.",
            "queries": picture(rows),
            "neighbours": picture(found),
            "query_labels": y[rows].numpy(),
            "neighbour_labels": y[found].numpy(),
            "similarity": similarity[rows, :SHOWN].numpy(),
            "classes": np.array(list(subject.data.classes), dtype=np.str_),
        }


def neighbours(
    features: Tensor, owner: Tensor, pixels: Tensor, k: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Positions and similarities (n, k) of every row's nearest rows of other owners.

    Rows with the same pixels as the query are left out too. Where a row has fewer than k
    neighbours left, the last one is repeated.

    Args:
        features: (n, D).
        owner: (n,) rows of one owner are never each other's neighbours.
        pixels: (n, 3, h, w) uint8.
        k: how many.
        device: where similarities are computed.
    """
    own = int(owner.bincount().max())
    spare = min(len(features), k + own + 4)  # room for the owner's rows and a few duplicates
    while True:
        similarity, near = search(features, features, spare, device=device)
        bad = owner[near] == owner[:, None]
        close = (similarity > SAME) & ~bad
        rows, columns = close.nonzero(as_tuple=True)
        alike = (pixels[rows] == pixels[near[rows, columns]]).flatten(1).all(1)
        bad[rows[alike], columns[alike]] = True
        if spare == len(features) or int((~bad).sum(1).min()) >= k:
            break
        spare = min(len(features), 2 * spare)
    order = bad.long().argsort(dim=1, stable=True)[:, :k]  # the good ones first, as they were
    last = (~bad).sum(1).clamp(min=1, max=k)[:, None] - 1
    order = order.gather(1, torch.arange(order.shape[1])[None].minimum(last))
    return near.gather(1, order), similarity.gather(1, order)
