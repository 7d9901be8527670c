"""How far features move when an image is transformed, at every stage."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.batch import normalize
from unlabeled.draws import Draws, shuffled, subset
from unlabeled.evaluate.contract import FINAL, Data, Request, Result, Shapes, Subject
from unlabeled.evaluate.frozen import frozen
from unlabeled.evaluate.intervals import bootstrap
from unlabeled.evaluate.redrawn import FactorImages
from unlabeled.evaluate.shares import share
from unlabeled.evaluate.store import shapes_of

BINS = 20  # of a histogram, over distances from 0 to 2
BATCH = 256

Op = Callable[[Tensor, Draws], Tensor]  # images (B, 3, h, w) in [0, 1], which it may overwrite


class Invariance:
    """Distances of unit-length features of an image and of its transformed self.

    After figure 4 of Misra and van der Maaten (2019): |f(I) - f(I^t)|, from 0 (invariant) to 2,
    of average-pooled stages. Features that hardly differ between any images would look
    invariant, so the scores are relative: `<stage>/<transform>/relative` is the mean distance
    over the mean distance of two different images, 0 for an invariant stage and about 1 where
    the transform makes another image of it; `<stage>/<transform>/distance` is the numerator, and
    `<stage>/mean/...` the mean of either over the transforms. Histograms of the distances of every
    stage, and a curve over the stages, are in the report.

    Of rendered data, which can be made again with one factor drawn anew and all else the same
    (`redrawn` in `unlabeled.truth`), the same is told of each factor: `<stage>/redrawn/<factor>`.

    Args:
        transforms: by name, ops on images in [0, 1], as those of `unlabeled.augment`.
        limit: test images that are used, balanced over classes.
        redrawn: so many of them are rendered again, once for each factor; 0: none.
        data: another data module than the run's.
    """

    splits = frozenset({"test"})
    needs_labels = False
    reads_pixels = True

    def __init__(
        self,
        *,
        transforms: Mapping[str, Op],
        limit: int = 1000,
        redrawn: int = 200,
        data: Data | None = None,
    ) -> None:
        if not transforms:
            raise ValueError("transforms is empty: name at least one")
        if "mean" in transforms:
            raise ValueError("transforms has one called mean, as the mean over all: rename it")
        if limit < 2:
            raise ValueError(f"limit must be at least 2, got {limit}")
        if redrawn < 0:
            raise ValueError(f"redrawn must not be negative, got {redrawn}")
        self.transforms, self.limit, self.data = dict(transforms.items()), limit, data
        self.redrawn, self._rendered = redrawn, FactorImages()

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        return "it needs 2 test images, there is 1" if data.size("test") < 2 else None

    def requests(self, shapes: Shapes) -> set[Request]:
        return {*map(Request, shapes.maps), *(() if shapes.pooled else (FINAL,))}

    def tune(self, subject: Subject) -> Result:
        """Scores the subject, which is only looked at."""
        data, size = subject.data, subject.data.size("test")
        labels = data.labels("test")
        known = None if labels is None else labels.tolist()
        chosen = subset(known, size, min(self.limit, size), subject.seed, "invariance").tolist()
        shapes = shapes_of(subject.backbone, data, subject.device)
        stages = [*shapes.maps] + ([] if shapes.pooled else ["final"])
        with frozen(subject.backbone):
            features = self._features(subject, chosen, shapes)
            again = {
                name: self._stages(subject, x.to(subject.device).float() / 255, shapes)
                for name, x in self._rendered(data, chosen[: self.redrawn]).items()
            }
        # Every image with another one: a derangement, whatever the order of the images is.
        order = shuffled(len(chosen), subject.seed, "invariance others")
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        scores: dict[str, float] = {}
        per_image: dict[str, Tensor] = {}
        details: dict[str, dict[str, Any]] = {}
        histograms: dict[str, dict[str, Tensor]] = {}
        for stage in stages:
            plain = features[None][stage]
            apart = (plain - plain[other]).norm(dim=1)
            away = {n: (plain - features[n][stage]).norm(dim=1) for n in self.transforms}
            histograms[stage] = {n: _histogram(x) for n, x in away.items()}
            histograms[stage]["another image"] = _histogram(apart)
            between = apart.mean().clamp(min=1e-12)
            for name, moved in again.items():
                key = f"{stage}/redrawn/{name}/relative"
                value = (plain[: len(moved[stage])] - moved[stage]).norm(dim=1) / between
                ((low, high),) = bootstrap(value[:, None], subject.seed, "redrawn")
                scores[key] = value.double().mean().item()
                details[key] = {
                    "protocol": "distance of unit-length pooled features when one factor of the "
                    "scene is drawn anew, over that of different images",
                    "stage": stage,
                    "hyperparameters": {"factor": name},
                    "selection": "none",
                    **{"share": False, "better": "neither", "ci95": [low, high], "n": len(value)},
                }
            # Last, so that a table of one line per evaluation shows the last stage's mean.
            away["mean"] = torch.stack([*away.values()]).mean(0)
            for name, moved in away.items():
                values = {"distance": moved, "relative": moved / between}
                for kind, value in values.items():
                    key = f"{stage}/{name}/{kind}"
                    scores[key], per_image[key] = value.double().mean().item(), value
                    details[key] = {
                        "protocol": "distance of unit-length pooled features under a transform"
                        + (", over that of different images" if kind == "relative" else ""),
                        "stage": stage,
                        "hyperparameters": {
                            "transform": repr(self.transforms[name])
                            if name in self.transforms
                            else f"the mean over {', '.join(self.transforms)}"
                        },
                        "selection": "none",
                        "share": False,
                        "better": "neither",  # what is useful to know, not how useful it is
                        "between_images": apart.mean().item(),
                    }
        figures = self._figures(scores, stages, histograms)
        if again and len(stages) > 1:
            figures["factors"] = _over_stages(
                scores, stages, {name: f"redrawn/{name}" for name in again}, "factors of the scene"
            )
        return Result(scores, details, per_image, figures)

    def _features(
        self, subject: Subject, chosen: list[int], shapes: Shapes
    ) -> dict[str | None, dict[str, Tensor]]:
        """Unit-length features (n, D) of every stage: under each transform, and under None."""
        parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
        found: dict[str | None, list[dict[str, Tensor]]] = {None: []}
        found |= {name: [] for name in self.transforms}
        rows = torch.tensor(chosen)
        kept = {r.stage: subject.kept("test", r, rows) for r in self.requests(shapes)}
        plain = {stage: F.normalize(z, dim=1) for stage, z in kept.items() if z is not None}
        if len(plain) == len(kept):
            found[None] = [plain]
        mine = share(len(parts))
        scan = subject.data.cut("test", mine.of(parts), subject.data.eval_decode, "plain")
        for i, batch in enumerate(scan, mine.start):
            x = batch["crops"][0].to(subject.device).float() / 255
            if len(plain) < len(kept):
                found[None].append(self._stages(subject, x, shapes))
            for name, op in self.transforms.items():
                draws = Draws(subject.seed, "invariance", name, i, rows=len(x))
                found[name].append(self._stages(subject, op(x.clone(), draws), shapes))
            subject.progress("invariance", i + 1, len(parts))
        made: dict[str | None, dict[str, Tensor]] = {}
        for name, each in found.items():
            made[name] = {stage: torch.cat([some[stage] for some in each]) for stage in each[0]}
            if name is not None or len(plain) < len(kept):  # what is kept is of all images
                made[name] = {s: mine.all(z, subject.device) for s, z in made[name].items()}
        return made

    def _stages(self, subject: Subject, x: Tensor, shapes: Shapes) -> dict[str, Tensor]:
        x = normalize(x).contiguous(memory_format=torch.channels_last)
        backbone: Any = subject.backbone
        maps = backbone.stages(x) if shapes.maps else {}
        rows = {name: m.float().mean((2, 3)) for name, m in maps.items()}
        if not shapes.pooled:
            rows["final"] = backbone(x).float().flatten(1)
        return {name: F.normalize(z, dim=1).cpu() for name, z in rows.items()}

    def _figures(
        self,
        scores: dict[str, float],
        stages: list[str],
        histograms: dict[str, dict[str, Tensor]],
    ) -> dict[str, dict[str, Any]]:
        names = list(self.transforms)
        figures: dict[str, dict[str, Any]] = {
            f"histogram_{stage}": {
                "kind": "curves",
                "title": f"Distances of {stage} under transforms",
                "note": "Unit-length features of an image and its transformed self; in the last "
                "curve, of two different images. Share of images in each of 20 bins.",
                "x": np.linspace(0, 2, BINS, endpoint=False) + 1 / BINS,
                "y": np.stack([x.numpy() for x in histograms[stage].values()]),
                "names": np.array([*histograms[stage]]),
                "xlabel": "distance",
                "percent": True,
                "panel": "Distances under transforms, by stage",
                "part": stage,
                "order": number,
            }
            for number, stage in enumerate(stages)
        }
        if len(stages) > 1:
            named = {name: name for name in names}
            figures["stages"] = _over_stages(scores, stages, named, "transforms")
        return figures


def _over_stages(
    scores: Mapping[str, float], stages: list[str], names: Mapping[str, str], what: str
) -> dict[str, Any]:
    """A curve over the stages for each name, whose scores have the other name in them."""
    return {
        "kind": "curves",
        "title": f"Invariance of every stage: {what}",
        "note": "Distance under the change over the distance of different images: 0 is invariant.",
        "x": np.arange(1, len(stages) + 1),
        "y": np.array([[scores[f"{s}/{n}/relative"] for s in stages] for n in names.values()]),
        "names": np.array(list(names)),
        "ticks": np.array(stages),
    }


def _histogram(distance: Tensor) -> Tensor:
    """(BINS,) shares of distances in [0, 2]."""
    return torch.histc(distance.float(), BINS, 0, 2) / len(distance)
