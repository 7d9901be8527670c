"""One pass of a backbone over each split, for all evaluations that look at it."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unlabeled.evaluate.contract import (
    Evaluation,
    Features,
    Progress,
    Request,
    Subject,
    Tuned,
)
from unlabeled.evaluate.forward import shapes_of
from unlabeled.evaluate.store import FeatureStore


class Pass:
    """What every evaluation is given of one backbone.

    Args:
        trunk: the backbone.
        name: of it, for the progress.
        store: keeps the features.
        seed: of heads and of what is drawn.
        device: where the backbone runs.
        progress: called with a text, what is done, of how much.
    """

    def __init__(
        self,
        trunk: nn.Module,
        name: str,
        store: FeatureStore,
        *,
        seed: int,
        device: torch.device | str,
        progress: Progress | None,
    ) -> None:
        self.trunk, self.name, self.store, self.seed = trunk, name, store, seed
        self.device, self._progress = torch.device(device), progress
        self._kept: dict[int, Mapping[str, Mapping[Request, Tensor]]] = {}

    def progress(self, text: str, done: int, of: int) -> None:
        """Says whose features or heads these are."""
        if self._progress:
            self._progress(f"{text} of {self.name}", done, of)

    def features(
        self,
        chosen: Mapping[str, Evaluation],
        tuned: Mapping[str, Tuned],
        sources: Mapping[str, Any],
    ) -> dict[str, Features]:
        """What each evaluation of frozen features asked for.

        The splits that these look at are also looked at for those of `tuned` that say what they
        need of whole images.

        Args:
            chosen: evaluations of frozen features by name.
            tuned: other evaluations by name.
            sources: the data module of each by name.
        """
        given: dict[str, Features] = {}
        for data in {id(sources[name]): sources[name] for name in chosen}.values():
            names = [name for name in chosen if sources[name] is data]
            shapes = shapes_of(self.trunk, data, self.device)
            wanted: dict[str, set[Request]] = {}
            for name in names:
                for split in chosen[name].splits:
                    wanted.setdefault(split, set()).update(chosen[name].requests(shapes))
            for name, evaluation in tuned.items():
                if sources[name] is data and hasattr(evaluation, "requests"):
                    for split in evaluation.splits & wanted.keys():
                        wanted[split] |= evaluation.requests(shapes)  # type: ignore[attr-defined]
            splits, labels = {}, {}
            for split in sorted(wanted, reverse=True):  # in one order in all processes
                splits[split] = self.store.extract(
                    self.trunk,
                    data,
                    split,
                    wanted[split],
                    shapes=shapes,
                    device=self.device,
                    progress=self.progress,
                )
                if (known := data.labels(split)) is not None:
                    labels[split] = known
            self._kept[id(data)] = splits
            most = max((int(y.max()) + 1 for y in labels.values()), default=0)
            together = Features(
                splits=splits,
                labels=labels,
                classes=max(len(data.classes), most),
                selection=data.selection(),
                shapes=shapes,
                seed=self.seed,
                device=self.device,
                progress=self.progress,
                data=data,
            )
            given |= dict.fromkeys(names, together)
        return {name: given[name] for name in chosen}

    def subject(self, data: Any) -> Subject:
        """A copy of the backbone, with what the pass over these data left."""
        own = copy.deepcopy(self.trunk).to(self.device)
        # Half the digits do not do for small distances and small singular values.
        kept = self._kept.get(id(data), {}) if self.store.dtype == "float32" else {}
        return Subject(own, data, self.seed, self.device, self.progress, kept)
