"""Training on whole images of any size for a number of iterations, as detectors are trained."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unlabeled import dist
from unlabeled.draws import seed_of, shuffled
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.tuning import norm_layers, sum_gradients

log = logging.getLogger(__name__)
T = TypeVar("T")
THREADS = 8  # that read images; decoding JPEGs does not hold Python's lock


@dataclass(frozen=True)
class Iterations:
    """SGD with momentum, a linear warm-up and drops.

    Args:
        steps: updates.
        batch_size: images per update, over all processes.
        lr: peak learning rate, of this batch.
        milestones: updates after which it drops.
        gamma: factor of a drop.
        warmup: updates over which it rises linearly.
        warmup_factor: share of lr it rises from.
        momentum: of SGD.
        weight_decay: of all weights but those of norm layers.
        per_pass: images of one forward and backward pass; None: a process's whole share of a
            batch. Fewer need less memory, and batch norm that learns then sees only these.
    """

    steps: int
    batch_size: int = 16
    lr: float = 0.02
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    warmup: int = 0
    warmup_factor: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 1e-4
    per_pass: int | None = None

    def __post_init__(self) -> None:
        for name, value in (
            *(("steps", self.steps), ("batch_size", self.batch_size)),
            ("per_pass", 1 if self.per_pass is None else self.per_pass),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if any(m < 0 for m in self.milestones):
            raise ValueError(f"milestones are iterations, got {[*self.milestones]}")
        if self.warmup < 0 or not 0 <= self.warmup_factor <= 1:
            raise ValueError(
                "warmup must not be negative and warmup_factor in [0, 1], "
                f"got {self.warmup} and {self.warmup_factor}"
            )
        if self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                "weight_decay must not be negative and momentum in [0, 1), "
                f"got {self.weight_decay} and {self.momentum}"
            )

    def factor(self, step: int) -> float:
        """The learning rate of an update, counted from 0, as a share of its peak."""
        share = self.gamma ** sum(step >= m for m in self.milestones)
        if step < self.warmup:
            share *= self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup
        return share

    def optimizer(self, network: nn.Module) -> torch.optim.SGD:
        """SGD over whatever of a network learns."""
        norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
        plain = {
            id(p) for m in network.modules() if isinstance(m, norms) for p in m.parameters(False)
        }
        learned = [p for p in network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learned if id(p) not in plain], "weight_decay": decay}
            if decay is not None
            else {"params": [p for p in learned if id(p) in plain], "weight_decay": 0.0}
            for decay in (self.weight_decay, None)
        ]
        return torch.optim.SGD([g for g in groups if g["params"]], self.lr, self.momentum)

    def said(self) -> dict[str, Any]:
        """The settings, for the details of a score."""
        return {**vars(self), "milestones": list(self.milestones), "optimizer": "sgd"}


@dataclass(frozen=True)
class Place:
    """Which image is drawn for which place of which update: the key of its augmentation."""

    position: int  # in the training set
    step: int
    slot: int


def drawn(n: int, schedule: Iterations, *key: int | str) -> Iterator[list[Place]]:
    """This process's images of every update, for ever: pass after pass over n, each shuffled."""
    size, step = schedule.batch_size, 0
    order, epoch = shuffled(n, *key, "order", 0), 0
    while True:
        batch = []
        for slot in range(size):
            now, at = divmod(step * size + slot, n)
            if now != epoch:
                order, epoch = shuffled(n, *key, "order", now), now
            batch.append(Place(int(order[at]), step, slot))
        yield batch[dist.rank() :: dist.world_size()]
        step += 1


def ahead(load: Callable[[Any], T], items: Iterable[Any], most: int = 4 * THREADS) -> Iterator[T]:
    """`load` of every item in order, computed by threads a little ahead of its use."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(load, item))
                if len(waiting) >= most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def seeded(device: torch.device, *key: int | str) -> Iterator[None]:
    """Global random numbers as a function of a key, and as they were afterwards.

    What libraries draw (which proposals train a detector) can be fixed in no other way.
    """
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device.index or 0] if cuda else []):
        torch.manual_seed(seed_of(*key))
        yield


def train(
    loss: Callable[[list[Any]], Tensor],
    network: nn.Module,
    subject: Subject,
    load: Callable[[Place], Any],
    schedule: Iterations,
    *key: int | str,
    still: Sequence[nn.Module] = (),
    precise: int = 0,
) -> int:
    """Trains a network, and leaves it in evaluation mode.

    Gradients are means over the images of the whole batch, over all processes. Where one is not
    finite, training ends before that update: a backbone at random initialisation whose batch
    norm is frozen may get there, and must not take the others' scores with it.

    Args:
        loss: the mean over some examples.
        network: its parameters that require gradients are trained.
        subject: data and device.
        load: makes an example of a training image; runs in a thread.
        schedule: how long and how fast.
        key: names the draws.
        still: modules that stay in evaluation mode: norm layers whose statistics do not move.
        precise: batches over which running statistics are averaged in the end, with the last
            weights; 0: they are the moving averages of training.

    Returns:
        The number of updates that were made.
    """
    done, optimizer = schedule.steps, schedule.optimizer(network)
    network.train()
    for layer in still:
        layer.eval()
    world, share = dist.world_size(), schedule.batch_size
    if share % world:  # equal shares: processes meet in batch norm and in gradients
        raise ValueError(f"batch_size={share} does not divide among {world} processes")
    per_pass = schedule.per_pass or share
    batches = drawn(subject.data.size("train"), schedule, *key)
    examples = ahead(lambda batch: [load(place) for place in batch], batches, most=THREADS)
    for step in range(schedule.steps):
        batch = next(examples)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * schedule.factor(step)
        optimizer.zero_grad(set_to_none=True)
        for i in range(0, len(batch), per_pass):
            some = batch[i : i + per_pass]
            with seeded(subject.device, *key, "samples", step, dist.rank(), i):
                (loss(some) * (len(some) / share)).backward()
        sum_gradients(optimizer)
        if not _finite(network):
            log.warning("training diverged at update %d of %d", step, schedule.steps)
            done = step
            break
        optimizer.step()
        subject.progress("training", step + 1, schedule.steps)
    if precise and done == schedule.steps:
        layers = [m for m in norm_layers(network) if m.training]
        _precise(layers, lambda: loss(next(examples)[:per_pass]), precise, subject, *key)
    examples.close()  # type: ignore[attr-defined]
    network.eval()
    return done


def _finite(network: nn.Module) -> bool:
    """Whether all gradients are, which are the same in all processes."""
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    return bool(torch.nn.utils.get_total_norm(grads).isfinite())


@torch.no_grad()
def _precise(
    layers: list[nn.Module],
    run: Callable[[], Tensor],
    batches: int,
    subject: Subject,
    *key: int | str,
) -> None:
    """Running statistics as the plain mean over so many batches (Wu and Johnson, 2021)."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()  # type: ignore[operator]
        layer.momentum = None  # type: ignore[assignment]
    for i in range(batches if layers else 0):
        with seeded(subject.device, *key, "precise", i, dist.rank()):
            run()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
