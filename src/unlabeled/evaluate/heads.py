"""Linear classifiers with different settings, trained side by side on the same features."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from unlabeled.draws import seed_of, shuffled
from unlabeled.evaluate.accuracy import label_rank

T = TypeVar("T")
CHUNK = 1024  # rows at a time where nothing is trained


class Setting(NamedTuple):
    """What one head is trained with."""

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Norm:
    """Batch norm without parameters (D,), from the statistics of the images it was made of."""

    scale: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.scale.device).flatten(1).float()
        return torch.addcmul(self.shift, x, self.scale)


@dataclass(frozen=True)
class Heads:
    """H linear classifiers behind one norm."""

    norm: Norm
    weight: Tensor  # D, H * C
    bias: Tensor  # H * C
    count: int  # H

    def logits(self, x: Tensor) -> Tensor:
        """(B, H, C) of features (B, ...)."""
        return torch.addmm(self.bias, self.norm(x), self.weight).view(len(x), self.count, -1)

    def ranks(self, features: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
        """How many classes each head puts before the right one (H, n) int64, on the CPU."""
        rows = torch.arange(len(features)) if rows is None else rows
        parts = [
            label_rank(
                self.logits(features[part]).transpose(0, 1), labels[part].to(self.bias.device)
            )
            for part in rows.split(CHUNK)
        ]
        return torch.cat(parts, dim=1).cpu()


@dataclass(frozen=True)
class Recipe:
    """How all heads are trained: SGD with momentum.

    Args:
        epochs: passes over the images.
        batch_size: images per update.
        momentum: of the velocity.
        factor: learning rate at a share of the training, as a share of its peak.
        nesterov: whether the momentum is Nesterov's.
        trust: LARS's coefficient (You et al., 2017): a head's weight, and its bias, has its
            gradient g (decay included) scaled by trust * |w| / |g|; None: plain SGD.
        standardized: whether features pass a batch norm without parameters first.
    """

    epochs: int
    batch_size: int
    momentum: float
    factor: Callable[[float], float]
    nesterov: bool = True
    trust: float | None = None
    standardized: bool = True


def side_by_side(jobs: Sequence[Callable[[], T]], device: torch.device | str) -> list[T]:
    """Runs jobs that train heads; on a CPU at once, its threads shared out between them.

    The products of a step are too small for many threads: most of the time goes into waiting
    for one another, all the more where other programs want the cores too.
    """
    threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or threads == 1:
        return [job() for job in jobs]
    workers = min(threads, len(jobs))
    share = threads // workers
    try:
        with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(share)) as pool:
            return list(pool.map(lambda job: job(), jobs))
    finally:
        torch.set_num_threads(threads)  # what threads of later inherit


def resident(features: Tensor, device: torch.device | str) -> Tensor:
    """The features on a GPU that has twice the room for them, else where they are."""
    device = torch.device(device)
    if device.type != "cuda" or 2 * features.nbytes > torch.cuda.mem_get_info(device)[0]:
        return features
    return features.to(device)


def norm_of(features: Tensor, rows: Tensor, device: torch.device | str) -> Norm:
    """Statistics per channel over the images `rows` and the cells of the grid.

    Args:
        features: (n, channels, grid, grid).
        rows: positions of the images that may be seen.
        device: where the norm will work.
    """
    channels, cells = features.shape[1], features[0, 0].numel()
    total = torch.zeros(2, channels, dtype=torch.float64, device=features.device)
    # Moments about a first mean, so that large offsets lose no digits.
    origin = features[rows[:CHUNK]].double().mean((0, 2, 3)).view(-1, 1, 1)
    for part in rows.split(CHUNK):
        x = features[part].double() - origin
        total += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
    mean, square = total / (len(rows) * cells)
    scale = (square - mean.square() + 1e-5).rsqrt()  # the eps of torch's batch norm
    shift = -(mean + origin.flatten()) * scale
    return Norm(*(v.float().repeat_interleave(cells).to(device) for v in (scale, shift)))


def identity(dim: int, device: torch.device | str) -> Norm:
    """The norm that leaves D features as they are."""
    return Norm(torch.ones(dim, device=device), torch.zeros(dim, device=device))


def _trust_ratio(p: Tensor, g: Tensor, heads: int, trust: float) -> Tensor:
    """LARS's factor of every column (H * C,), the same for all columns of a head."""
    classes = p.shape[-1] // heads
    w, d = (x.reshape(-1, heads, classes).norm(dim=(0, 2)) for x in (p, g))
    ratio = torch.where((w > 0) & (d > 0), trust * w / d, torch.ones_like(w))
    return ratio.repeat_interleave(classes)


@torch.no_grad()
def train(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    settings: Sequence[Setting],
    recipe: Recipe,
    *,
    classes: int,
    key: tuple[int | str, ...],
    device: torch.device | str = "cpu",
    progress: Callable[[], None] = lambda: None,
) -> Heads:
    """One head per setting, by softmax cross-entropy on the images `rows`.

    All heads start from the same weights, N(0, 0.01), and see the same batches, so a head does
    not depend on the others that are trained with it.

    Args:
        features: (n, channels, grid, grid).
        labels: (n,) int64.
        rows: positions of the images to train on.
        settings: learning rate (at this batch size, not scaled) and weight decay of each head.
        recipe: what they have in common.
        classes: C.
        key: names the draws.
        device: where the heads are.
        progress: called after every epoch.
    """
    heads, dim = len(settings), features[0].numel()
    norm = norm_of(features, rows, device) if recipe.standardized else identity(dim, device)
    generator = torch.Generator().manual_seed(seed_of(*key, "weights"))
    weight = 0.01 * torch.randn(dim, classes, generator=generator)
    weight = weight.to(device).repeat(1, heads)  # D, H * C
    bias = torch.zeros(heads * classes, device=device)
    lr, decay = (
        torch.tensor(values, device=device).repeat_interleave(classes)
        for values in zip(*settings, strict=True)
    )
    decayed = bool((decay > 0).any())
    velocities = torch.zeros_like(weight), torch.zeros_like(bias)
    model = Heads(norm, weight, bias, heads)
    steps, step = recipe.epochs * -(-len(rows) // recipe.batch_size), 0
    for epoch in range(recipe.epochs):
        order = rows[shuffled(len(rows), *key, "order", epoch)]
        for batch in order.split(recipe.batch_size):
            x, y = norm(features[batch]), labels[batch].to(device)
            logits = torch.addmm(bias, x, weight).view(len(x), heads, classes)
            # The gradient of the cross-entropy by hand: softmax minus one-hot.
            grad = logits.softmax(-1)
            grad[torch.arange(len(x), device=device), :, y] -= 1
            grad = (grad / len(x)).flatten(1)
            rate = lr * recipe.factor(step / steps)
            for p, g, v in zip((weight, bias), (x.T @ grad, grad.sum(0)), velocities, strict=True):
                if decayed:
                    g.add_(decay * p)
                if recipe.trust is not None:
                    g.mul_(_trust_ratio(p, g, heads, recipe.trust))
                v.mul_(recipe.momentum).add_(g)
                p.sub_(rate * (g.add_(v, alpha=recipe.momentum) if recipe.nesterov else v))
            step += 1
        progress()
    return model
