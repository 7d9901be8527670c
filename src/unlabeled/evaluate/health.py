"""Label-free numbers of how features fill their space."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.draws import Draws, subset
from unlabeled.evaluate.contract import FINAL, Data, Request, Result, Shapes, Subject
from unlabeled.evaluate.frozen import frozen
from unlabeled.evaluate.shares import share
from unlabeled.evaluate.store import images

BATCH = 256  # images per forward
GROUPS = 10  # of the jackknife


class Crops(Protocol):
    """Random crops of an image, as `unlabeled.data.decode.Crops`."""

    count: int


class Health:
    """RankMe, uniformity, spread and dead dimensions of test features, alignment of two views.

    - `rankme`: exp of the entropy of the singular values, scaled to sum to 1, of the features as
      they are (Garrido et al., 2023, equation 1): at most the number of dimensions.
    - `alignment`: mean squared distance of unit-length features of two crops of an image, each
      flipped with probability 1/2 (Wang and Isola, 2020, alpha 2): 0 is invariance.
    - `uniformity`: log of the mean of exp(-2 d^2) over pairs of different images, of unit-length
      features (the same, t 2): the lower, the more uniform.
    - `std`: standard deviation over images of unit-length features, mean over dimensions, times
      sqrt(D): 1 isotropic, 0 collapsed.
    - `dead`: share of dimensions whose standard deviation over images is less than `tolerance`
      times the largest.

    Intervals are those of a delete-a-group jackknife with 10 groups.

    Args:
        decode: gives the two crops for the alignment.
        limit: test images that are used, balanced over classes.
        tolerance: of dead dimensions.
        data: another data module than the run's.
    """

    splits = frozenset({"test"})
    needs_labels = False
    reads_pixels = True

    def __init__(
        self,
        *,
        decode: Crops,
        limit: int = 2048,
        tolerance: float = 1e-3,
        data: Data | None = None,
    ) -> None:
        if getattr(decode, "count", 2) != 2:
            raise ValueError(f"decode must give 2 crops of an image, got count={decode.count}")
        if limit < 2 * GROUPS:
            raise ValueError(f"limit must be at least {2 * GROUPS}, got {limit}")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), got {tolerance}")
        self.decode, self.limit, self.tolerance, self.data = decode, limit, tolerance, data

    def obstacle(self, data: Data) -> str | None:
        """Why these data are not enough."""
        n = data.size("test")
        return f"it needs {2 * GROUPS} test images, there are {n}" if n < 2 * GROUPS else None

    def requests(self, shapes: Shapes) -> set[Request]:
        return {FINAL}

    def tune(self, subject: Subject) -> Result:
        """Scores the subject, which is only looked at."""
        data = subject.data
        size, labels = data.size("test"), data.labels("test")
        known = None if labels is None else labels.tolist()
        chosen = subset(known, size, min(self.limit, size), subject.seed, "health")
        with frozen(subject.backbone):
            kept = subject.kept("test", FINAL, chosen)
            plain = self._plain(subject, chosen.tolist()) if kept is None else kept.double()
            first, second = self._views(subject, chosen.tolist())
        groups = torch.arange(len(plain)) % GROUPS
        values: dict[str, tuple[float, tuple[float, float]]] = {
            "rankme": _jackknife(lambda keep: rankme(plain[keep]), groups),
            "alignment": _jackknife(lambda keep: alignment(first[keep], second[keep]), groups),
            "uniformity": _jackknife(lambda keep: uniformity(plain[keep]), groups),
            "std": _jackknife(lambda keep: spread(plain[keep]), groups),
            "dead": _jackknife(lambda keep: dead(plain[keep], self.tolerance), groups),
        }
        shared: dict[str, Any] = {
            "protocol": "features of test images, no labels",
            "stage": "final",
            "hyperparameters": {"limit": self.limit, "tolerance": self.tolerance},
            "selection": "none",
            "n": len(plain),
        }
        details = {name: {**shared, "ci95": list(ci)} for name, (_, ci) in values.items()}
        for name in ("alignment", "uniformity", "dead"):
            details[name]["better"] = "lower"
        for name in values.keys() - {"dead"}:
            details[name]["share"] = False
        return Result({name: value for name, (value, _) in values.items()}, details, {})

    def _plain(self, subject: Subject, chosen: Sequence[int]) -> Tensor:
        """(n, D) of the test crop."""
        parts = _parts(chosen)
        mine = share(len(parts))
        scan = subject.data.cut("test", mine.of(parts), subject.data.eval_decode, "plain")
        crops = (images(batch["crops"][0], subject.device) for batch in scan)
        rows = torch.cat([_vectors(subject.backbone, x) for x in crops])
        return mine.all(rows, subject.device)

    def _views(self, subject: Subject, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(n, D) each, of two random crops."""
        key, parts = ("health", subject.seed), _parts(chosen)
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        mine = share(len(parts))
        scan = subject.data.cut("test", mine.of(parts), self.decode, *key)
        for i, batch in enumerate(scan, mine.start):
            draws = Draws(*key, "flip", i, rows=len(batch["index"]))
            for rows, crop in zip(found, batch["crops"], strict=True):
                x = images(crop, subject.device)
                flipped = draws.chance(0.5).to(x.device)[:, None, None, None]
                rows.append(_vectors(subject.backbone, torch.where(flipped, x.flip(-1), x)))
            subject.progress("health", i + 1, len(parts))
        first, second = (mine.all(torch.cat(rows), subject.device) for rows in found)
        return first, second


def _parts(chosen: Sequence[int]) -> list[Sequence[int]]:
    return [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]


def rankme(z: Tensor) -> float:
    """exp of the entropy of the singular values of z (n, D)."""
    n, dim = z.shape
    gram = z @ z.T if n < dim else z.T @ z
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = sigma / sigma.sum().clamp(min=1e-300)
    return torch.special.entr(p).sum().exp().item()


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean squared distance of unit-length rows of a and b (n, D)."""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean().item()


def uniformity(z: Tensor) -> float:
    """log mean exp(-2 d^2) over pairs of different unit-length rows of z (n, D)."""
    u, n = F.normalize(z, dim=1), len(z)
    square = u.square().sum(1)  # 1, but 0 of features that are all 0
    parts = zip(u.split(512), square.split(512), strict=True)
    total = sum(
        float((4 * (rows @ u.T) - 2 * (own[:, None] + square)).exp().sum()) for rows, own in parts
    )
    return math.log(max(total - n, 1e-300) / (n * (n - 1)))  # n: each with itself


def spread(z: Tensor) -> float:
    """Standard deviation of unit-length rows, mean over dimensions, times sqrt(D)."""
    return F.normalize(z, dim=1).std(0, correction=0).mean().item() * math.sqrt(z.shape[1])


def dead(z: Tensor, tolerance: float) -> float:
    """Share of dimensions that hardly vary, next to the one that varies most."""
    std = z.std(0, correction=0)
    return (std <= tolerance * std.max()).double().mean().item()


def _vectors(backbone: nn.Module, x: Tensor) -> Tensor:
    return backbone(x).flatten(1).double().cpu()


def _jackknife(
    statistic: Callable[[Tensor], float], groups: Tensor
) -> tuple[float, tuple[float, float]]:
    """The statistic of all rows and its interval, from leaving out one group at a time."""
    value = statistic(torch.ones_like(groups, dtype=torch.bool))
    without = torch.tensor([statistic(groups != g) for g in range(GROUPS)], dtype=torch.float64)
    variance = (GROUPS - 1) / GROUPS * (without - without.mean()).square().sum().item()
    half = 1.96 * math.sqrt(variance)
    return value, (value - half, value + half)
