"""Runs any set of evaluations on one backbone, with the baselines beside it."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from unlabeled import dist
from unlabeled.evaluate.contract import (
    Data,
    Evaluation,
    Features,
    Progress,
    Request,
    Result,
    Shapes,
    Subject,
    Tuned,
)
from unlabeled.evaluate.intervals import bootstrap
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.scores import Scores
from unlabeled.evaluate.store import FeatureStore, shapes_of


def evaluate(
    evals: Mapping[str, Evaluation | Tuned],
    *,
    backbone: nn.Module,
    data: Any,
    out: Path,
    seed: int,
    device: torch.device | str = "cpu",
    random_backbone: nn.Module | None = None,
    pixels: bool = True,
    progress: Progress | None = None,
    epoch: int | None = None,
    explicit: bool = False,
    dtype: Literal["float32", "float16"] = "float32",
    supervised: Mapping[str, float] | None = None,
) -> Scores:
    """Scores of a frozen backbone, and of the baselines, under every evaluation.

    All processes extract features; the first alone trains heads, and has the scores.

    Args:
        evals: evaluations by the first part of their scores' names.
        backbone: what is evaluated.
        data: the run's data module, which evaluations without their own use.
        out: features are kept in out/features and used again by whoever asks for the same.
        seed: of heads and intervals.
        device: where backbones run and heads are trained.
        random_backbone: the same backbone at random initialisation, for the baseline.
        pixels: whether raw pixels are scored too.
        progress: called with a text, what is done, of how much.
        epoch: of the training that made the backbone, for the details.
        explicit: whether an evaluation that the data cannot serve is an error, or skipped.
        dtype: of the features on disk.
        supervised: scores by name of a supervised run, for the baseline.

    Raises:
        ValueError: if `explicit` and an evaluation finds no labels or no test split.
    """
    scores, sources = Scores(), {}
    for name, evaluation in evals.items():
        source = evaluation.data if evaluation.data is not None else data
        if reason := obstacle(evaluation, source):
            if explicit:
                raise ValueError(f"the evaluation {name!r} cannot run: {reason}")
            scores.skipped[name] = reason
        else:
            sources[name] = source
    able = {name: evaluation for name, evaluation in evals.items() if name in sources}
    tuned = {name: cast(Tuned, e) for name, e in able.items() if _trains(e)}
    chosen = {name: cast(Evaluation, e) for name, e in able.items() if not _trains(e)}
    frozen_sources = {name: sources[name] for name in chosen}
    trunks = {"": backbone}
    if random_backbone is not None:
        trunks["baseline/random/"] = random_backbone
    if pixels:
        trunks["baseline/pixels/"] = Pixels()
    store = FeatureStore(out / "features", dtype=dtype)
    features = {
        prefix: _extract(store, trunk, chosen, frozen_sources, seed, device, progress, prefix)
        for prefix, trunk in trunks.items()
    }
    results: dict[str, dict[str, Result]] = {
        prefix: {
            name: evaluation.tune(_subject(trunk, sources[name], seed, device, progress, prefix))
            for name, evaluation in tuned.items()
            if not isinstance(trunk, Pixels) or getattr(evaluation, "reads_pixels", False)
        }
        for prefix, trunk in trunks.items()
    }
    if dist.rank() == 0:  # heads train once, and nobody waits for them
        for prefix, of_trunk in features.items():
            answers = {name: chosen[name](given) for name, given in of_trunk.items()}
            results[prefix] = {**answers, **results.get(prefix, {})}
        known = None if supervised is None else dict(supervised)
        for prefix, of_trunk in results.items():
            for name, result in of_trunk.items():
                common = {
                    "split_hash": sources[name].split_hash(),
                    "seed": seed,
                    "epoch": epoch,
                }
                others = {
                    other.split("/")[1]: baseline[name]
                    for other, baseline in results.items()
                    if other and not prefix and name in baseline
                }
                _add(scores, f"{prefix}{name}/", result, others, common)
                if not prefix:
                    scores.add_supervised(f"{name}/", known)
                drawn = result.figures.items()
                scores.figures |= {f"{prefix}{name}/{title}": arrays for title, arrays in drawn}
    scores.finished = [*chosen, *tuned]
    return scores


def _trains(evaluation: Evaluation | Tuned) -> bool:
    return hasattr(evaluation, "tune")


def _subject(
    trunk: nn.Module,
    data: Any,
    seed: int,
    device: torch.device | str,
    progress: Progress | None,
    prefix: str,
) -> Subject:
    what = _what(prefix)

    def shown(text: str, done: int, of: int) -> None:
        if progress:
            progress(f"{text} of {what}", done, of)

    own = copy.deepcopy(trunk).to(device)
    return Subject(own, data, seed, torch.device(device), shown)


def _what(prefix: str) -> str:
    return prefix.removeprefix("baseline/").rstrip("/") or "backbone"


def obstacle(evaluation: Evaluation | Tuned, data: Any) -> str | None:
    """Why an evaluation cannot run on these data, if it cannot."""
    if evaluation.data is not None:
        try:
            evaluation.data.setup("test")  # type: ignore[attr-defined]
        except (ValueError, OSError) as error:
            return f"its data cannot be read: {error}"
    for split in sorted(evaluation.splits, reverse=True):  # "train" first
        if not data.has(split):
            return f"the data have no {split} split"
        if getattr(evaluation, "needs_labels", True) and data.labels(split) is None:
            return f"the images of the {split} split have no labels"
    own = getattr(evaluation, "obstacle", None)
    return own(data) if own else None


def _extract(
    store: FeatureStore,
    trunk: nn.Module,
    chosen: Mapping[str, Evaluation],
    sources: Mapping[str, Data],
    seed: int,
    device: torch.device | str,
    progress: Progress | None,
    prefix: str,
) -> dict[str, Features]:
    """What each evaluation asked for, from one pass over each split of each data module."""
    what = _what(prefix)

    def shown(text: str, done: int, of: int) -> None:
        if progress:
            progress(f"{text} of {what}", done, of)

    given: dict[str, Features] = {}
    for data in {id(source): source for source in sources.values()}.values():
        names = [name for name in chosen if sources[name] is data]
        shapes: Shapes = shapes_of(trunk, data, device)
        wanted: dict[str, set[Request]] = {}
        for name in names:
            for split in chosen[name].splits:
                wanted.setdefault(split, set()).update(chosen[name].requests(shapes))
        splits, labels = {}, {}
        for split in sorted(wanted, reverse=True):  # in one order in all processes
            splits[split] = store.extract(
                trunk,
                data,
                split,
                wanted[split],
                shapes=shapes,
                device=device,
                progress=shown,
            )
            if (known := data.labels(split)) is not None:
                labels[split] = known
        most = max((int(y.max()) + 1 for y in labels.values()), default=0)
        together = Features(
            splits=splits,
            labels=labels,
            classes=max(len(data.classes), most),
            selection=data.selection(),
            shapes=shapes,
            seed=seed,
            device=torch.device(device),
            progress=shown,
            data=data,
        )
        given |= dict.fromkeys(names, together)
    return {name: given[name] for name in chosen}


def _add(
    scores: Scores,
    prefix: str,
    result: Result,
    baselines: Mapping[str, Result],
    common: Mapping[str, Any],
) -> None:
    """Every score of a result with all of its details."""
    names = list(result.per_image)
    intervals = {}
    if names:
        columns = torch.stack([result.per_image[name] for name in names], dim=1)
        drawn = bootstrap(columns, common["seed"], "bootstrap")
        intervals = dict(zip(names, drawn, strict=True))
    for name, value in result.scores.items():
        own = result.details[name]
        details = {**common, **own, "baselines": {}}
        if name in intervals:
            details |= {"ci95": list(intervals[name]), "n": len(result.per_image[name])}
        for kind, baseline in baselines.items():
            # Raw pixels have one stage, which stands beside each of the backbone's.
            twin = name if name in baseline.scores else name.replace(own["stage"], kind, 1)
            if twin in baseline.scores:
                details["baselines"][kind] = baseline.scores[twin]
        scores.add(prefix + name, value, details)
