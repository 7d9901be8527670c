"""The part of a data module that gives annotations: `unlabeled.truth.Annotated`."""

from abc import ABC, abstractmethod

from torch import Tensor

from unlabeled.data.rgb import UnreadableError
from unlabeled.data.store import Store
from unlabeled.errors import InputError
from unlabeled.truth import Annotation


class Annotations(ABC):
    """What the splits of a data module know besides labels: see `unlabeled.truth`."""

    @abstractmethod
    def _read(self) -> Store: ...

    def kinds(self, split: str) -> frozenset[str]:
        """The annotations of a split; empty where there are none."""
        return frozenset(self._read().split(split).annotations)

    def annotation(self, split: str, kind: str) -> Annotation:
        """One kind of annotation of a split, in the order of `scan`.

        Raises:
            ValueError: the split has it not.
        """
        store = self._read()
        known = store.split(split).annotations
        if kind not in known:
            has = ", ".join(known) or "none"
            raise ValueError(
                f"the {split} images of {store.root} have no annotation {kind!r} (there are: {has})"
            )
        return known[kind]

    def names(self, split: str, kind: str) -> tuple[str, ...]:
        """Names of key-points or factors, in their order; none where they have no names."""
        return self._read().split(split).names.get(kind, ())

    def image(self, split: str, position: int) -> Tensor:
        """The whole image (3, h, w) uint8, in whose pixels annotations are.

        Raises:
            InputError: the file cannot be read: no other has its boxes or maps.
        """
        store = self._read()
        images = store.split(split)
        try:
            return images.image(position).contiguous()
        except UnreadableError as error:
            raise InputError(
                f"cannot read {images.name(position)} under {store.root} ({error}): no other image "
                "has its annotations, so repair it, or take it out of the set"
            ) from error
