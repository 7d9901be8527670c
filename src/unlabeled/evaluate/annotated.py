"""What trainings on annotated images share: their schedule, what is trained, and on how many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.iterations import Iterations
from unlabeled.evaluate.trunk import STAGES, freeze_to, still_norms

FROZEN = 1 + len(STAGES)  # freeze_at that keeps the whole backbone


@dataclass(frozen=True)
class Poly(Iterations):
    """A learning rate that falls to zero as (1 - step / steps) ** power, as segmenters' do."""

    power: float = 0.9

    def factor(self, step: int) -> float:
        """The learning rate of an update, counted from 0, as a share of its peak."""
        return super().factor(step) * (1 - step / self.steps) ** self.power


@dataclass(frozen=True)
class Counted:
    """Stands for data of which a training needs to know nothing but the number of examples."""

    count: int

    def size(self, split: str) -> int:
        """How many there are."""
        return self.count


def lacks(data: Any, kind: str) -> str | None:
    """Why data have no annotations of a kind, or None."""
    for split in ("train", "test"):
        known = data.kinds(split) if hasattr(data, "kinds") else frozenset()
        if kind not in known:
            return f"the {split} images have no annotation {kind!r}"
    return None


def freeze(backbone: nn.Module, freeze_at: int) -> list[nn.Module]:
    """Parameters of the first (stem, res2, ..., res5) learn no more; FROZEN: none does.

    Returns:
        What must stay in evaluation mode.
    """
    if freeze_at == FROZEN:
        backbone.requires_grad_(False)
        return [backbone]
    freeze_to(backbone, freeze_at)
    return still_norms(backbone, every=False)


def maps_of(backbone: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The stages' maps; of raw pixels, whose stage is one vector, the image itself.

    Raises:
        ValueError: the backbone has none.
    """
    stages: Any = getattr(backbone, "stages", None)
    maps: Any = stages(x) if callable(stages) else {}
    if not maps:
        raise ValueError(
            f"the backbone {type(backbone).__name__} has no stages, whose maps say what is where"
        )
    return {"pixels": x} if "pixels" in maps else dict(maps)


def chosen(maps: Mapping[str, Any], stages: str | Sequence[str]) -> list[str]:
    """The names of the stages that are meant.

    Raises:
        ValueError: the backbone has not all of them.
    """
    if stages == "all" or "pixels" in maps:
        return list(maps)
    if stages == "last":
        return list(maps)[-1:]
    if unknown := [s for s in stages if s not in maps]:
        raise ValueError(f"the backbone has no stages {unknown}; it has {list(maps)}")
    return [s for s in maps if s in stages]


def check_stages(stages: str | Sequence[str]) -> str | tuple[str, ...]:
    """Stages as a setting. Raises ValueError for a word but `all` and `last`, or for none."""
    if isinstance(stages, str):
        if stages not in ("all", "last"):
            raise ValueError(f"stages must be all, last or a list of names, got {stages!r}")
        return stages
    if not stages:
        raise ValueError("stages is empty: name a stage, or say all")
    return tuple(stages)


def resized(image: Tensor, side: int | None) -> Tensor:
    """An image (3, h, w) uint8 whose short side is `side`, as floats in [0, 1]."""
    x = image.float() / 255
    h, w = x.shape[1:]
    if side is None or side == min(h, w):
        return x
    size = [max(1, round(v * side / min(h, w))) for v in (h, w)]
    x = F.interpolate(x[None], size, mode="bilinear", antialias=True, align_corners=False)
    return x[0].clamp(0, 1)


def first(subject: Subject) -> Tensor:
    """The first training image (3, h, w) uint8: to see what a backbone makes of one."""
    return subject.data.image("train", 0)


def gradients(learns: bool) -> Any:
    """A context with gradients or without."""
    return torch.enable_grad() if learns else torch.no_grad()
