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
    Shapes,
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
        need of whole images. Data modules of equal fingerprints show the same images, which
        pass once for all of them; selection, labels and annotations are each one's own.

        Args:
            chosen: evaluations of frozen features by name.
            tuned: other evaluations by name.
            sources: the data module of each by name.
        """
        asks = {n: e for n, e in tuned.items() if hasattr(e, "requests")}
        every = {id(sources[name]): sources[name] for name in [*chosen, *asks]}
        splits: dict[int, dict[str, str]] = {key: {} for key in every}  # -> fingerprint
        for name, evaluation in [*chosen.items(), *asks.items()]:
            data, own = sources[name], splits[id(sources[name])]
            own |= {s: data.fingerprint(s) for s in evaluation.splits if s not in own}
        looked = {splits[id(sources[n])][s] for n, e in chosen.items() for s in e.splits}
        shapes = {
            key: shapes_of(self.trunk, every[key], self.device)
            for key, own in splits.items()
            if looked & {*own.values()}
        }
        wanted: dict[str, tuple[set[Request], set[Request]]] = {m: (set(), set()) for m in looked}
        for name, evaluation in [*chosen.items(), *asks.items()]:
            key = id(sources[name])
            for split in evaluation.splits:
                if (mark := splits[key][split]) in wanted:
                    requests = evaluation.requests(shapes[key])  # type: ignore[attr-defined]
                    wanted[mark][name in asks].update(requests)
        given: dict[int, Features] = {}
        for key in shapes:
            own = {split: wanted[mark] for split, mark in splits[key].items() if mark in wanted}
            given[key], exact = self._extracted(every[key], own, shapes[key])
            also = given[key].splits if self.store.dtype == "float32" else {}
            self._kept[key] = {s: {**also.get(s, {}), **found} for s, found in exact.items()}
        return {name: given[id(sources[name])] for name in chosen}

    def _extracted(
        self, data: Any, wanted: Mapping[str, tuple[set[Request], set[Request]]], shapes: Shapes
    ) -> tuple[Features, Mapping[str, Mapping[Request, Tensor]]]:
        """The wanted features of each split: the store's, and those that are to be in float32.

        Half the digits do not do for small distances and small singular values.
        """
        splits, exact, labels = {}, {}, {}
        for split in sorted(wanted, reverse=True):  # in one order in all processes
            splits[split], exact[split] = self.store.extract_with(
                self.trunk,
                data,
                split,
                *wanted[split],
                shapes=shapes,
                device=self.device,
                progress=self.progress,
            )
            if (known := data.labels(split)) is not None:
                labels[split] = known
        most = max((int(y.max()) + 1 for y in labels.values()), default=0)
        features = Features(
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
        return features, exact

    def subject(self, data: Any) -> Subject:
        """A copy of the backbone, with what the pass over these data left."""
        own = copy.deepcopy(self.trunk).to(self.device)
        kept = self._kept.get(id(data), {})
        return Subject(own, data, self.seed, self.device, self.progress, kept)
