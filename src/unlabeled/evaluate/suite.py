"""Runs any set of evaluations on one backbone, with the baselines beside it."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from unlabeled import dist
from unlabeled.evaluate.contract import Evaluation, Progress, Result, Tuned
from unlabeled.evaluate.frozen import same_everywhere, unchanged
from unlabeled.evaluate.intervals import bootstrap
from unlabeled.evaluate.one_pass import Pass
from unlabeled.evaluate.pixels import Pixels
from unlabeled.evaluate.scores import Scores
from unlabeled.evaluate.store import FeatureStore


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
    store: FeatureStore | None = None,
    supervised: Mapping[str, float] | None = None,
) -> Scores:
    """Scores of a frozen backbone, and of the baselines, under every evaluation.

    One pass over each split of each data module extracts what all evaluations of frozen features
    need. All processes extract; the first alone trains heads, and has the scores. Whatever the
    evaluations do, backbone and baselines are verified to be what they were.

    Args:
        evals: evaluations by the first part of their scores' names.
        backbone: what is evaluated.
        data: the run's data module, which evaluations without their own use.
        out: features are kept in out/features where no store is given.
        seed: of heads and intervals.
        device: where backbones run and heads are trained.
        random_backbone: the same backbone at random initialisation, for the baseline.
        pixels: whether raw pixels are scored too.
        progress: called with a text, what is done, of how much.
        epoch: of the training that made the backbone, for the details.
        explicit: whether an evaluation that the data cannot serve is an error, or skipped.
        store: keeps features, which whoever asks for the same uses again.
        supervised: scores by name of a supervised run, for the baseline.

    Raises:
        ValueError: if `explicit` and an evaluation finds no labels or no test split.
        RuntimeError: if the backbone, or that of a baseline, changed.
    """
    scores, sources = Scores(), {}
    for name, evaluation in evals.items():
        source = evaluation.data if evaluation.data is not None else data
        if reason := obstacle(evaluation, source) or misfit(evaluation, backbone):
            if explicit:
                raise ValueError(f"the evaluation {name!r} cannot run: {reason}")
            scores.skipped[name] = reason
        else:
            sources[name] = source
    able = {name: evaluation for name, evaluation in evals.items() if name in sources}
    tuned = {name: cast(Tuned, e) for name, e in able.items() if _tunes(e)}
    chosen = {name: cast(Evaluation, e) for name, e in able.items() if not _tunes(e)}
    trunks = {"": backbone}
    if random_backbone is not None:
        trunks["baseline/random/"] = random_backbone
    if pixels:
        trunks["baseline/pixels/"] = Pixels()
    store = store or FeatureStore(out / "features")
    with ExitStack() as verified:
        for trunk in trunks.values():
            same_everywhere(trunk.to(device))
            verified.enter_context(unchanged(trunk))
        passes = {
            prefix: Pass(trunk, _what(prefix), store, seed=seed, device=device, progress=progress)
            for prefix, trunk in trunks.items()
        }
        features = {prefix: p.features(chosen, tuned, sources) for prefix, p in passes.items()}
        results: dict[str, dict[str, Result]] = {
            prefix: {
                name: evaluation.tune(passes[prefix].subject(sources[name]))
                for name, evaluation in tuned.items()
                if not isinstance(trunk, Pixels) or getattr(evaluation, "reads_pixels", False)
            }
            for prefix, trunk in trunks.items()
        }
        if dist.rank() == 0:  # heads train once, and nobody waits for them
            for prefix, of_trunk in features.items():
                answers = {name: chosen[name](given) for name, given in of_trunk.items()}
                results[prefix] = {**answers, **results[prefix]}
    if dist.rank() == 0:
        known = None if supervised is None else dict(supervised)
        for prefix, of_trunk in results.items():
            for name, result in of_trunk.items():
                common = {
                    "split_hash": sources[name].split_hash(),
                    "seed": seed,
                    "epoch": epoch,
                    "better": "higher",  # unless the evaluation says otherwise
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


def in_turn(
    evals: Mapping[str, Evaluation | Tuned], data: Any
) -> list[Mapping[str, Evaluation | Tuned]]:
    """What to evaluate together, in an order in which much is known soon.

    Whatever looks at the frozen backbone is one group, and comes first; whatever trains networks
    is long, and each is a group of its own, so that its scores can be kept before the next
    begins. What cannot run is in the first group, which says so at once. Heads of frozen
    features train in the first process alone: with several processes they come last, or the
    others would wait for them until their connection is given up.
    """
    long = {
        name
        for name, e in evals.items()
        if trains_long(e) and not obstacle(e, e.data if e.data is not None else data)
    }
    groups = [{name: e for name, e in evals.items() if name not in long}]
    groups += [{name: e} for name, e in evals.items() if name in long]
    if dist.world_size() > 1:
        groups.reverse()
    return [group for group in groups if group]


def trains_long(evaluation: Evaluation | Tuned) -> bool:
    """Whether an evaluation trains networks for many updates."""
    return getattr(evaluation, "trains", False)


def _tunes(evaluation: Evaluation | Tuned) -> bool:
    return hasattr(evaluation, "tune")


def _what(prefix: str) -> str:
    return prefix.removeprefix("baseline/").rstrip("/") or "backbone"


def refuse(evals: Mapping[Any, Evaluation | Tuned], data: Any, backbone: nn.Module) -> None:
    """Raises ValueError for the first evaluation that cannot run on its data, or the run's.

    Nor on this backbone.
    """
    for name, evaluation in evals.items():
        source = evaluation.data if evaluation.data is not None else data
        if reason := obstacle(evaluation, source) or misfit(evaluation, backbone):
            raise ValueError(f"the evaluation {name!r} cannot run: {reason}")


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
        if not getattr(evaluation, "hears", False) and "crops" not in getattr(
            data, "gives", {"crops"}
        ):
            return "the data have no pictures, only sound"
        if getattr(evaluation, "needs_labels", True) and data.labels(split) is None:
            return f"the images of the {split} split have no labels"
    own = getattr(evaluation, "obstacle", None)
    return own(data) if own else None


def misfit(evaluation: Evaluation | Tuned, backbone: nn.Module) -> str | None:
    """Why an evaluation cannot look at this backbone, if it cannot."""
    own = getattr(evaluation, "misfit", None)
    return own(backbone) if own else None


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
