"""Training on labels inside an evaluation: crops of chosen images, one loop for all protocols."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlabeled import dist
from unlabeled.draws import Draws, shuffled, to
from unlabeled.evaluate.contract import Subject
from unlabeled.evaluate.shares import Share, share
from unlabeled.evaluate.store import images
from unlabeled.lars import LARS
from unlabeled.optim import cosine


class Decode(Protocol):
    """Cuts one crop of an image, as `unlabeled.data.decode.Crops`."""

    count: int


@dataclass(frozen=True)
class Schedule:
    """Length, batch and learning-rate schedule of a supervised training.

    Args:
        epochs: passes over the images.
        batch_size: images per update, over all processes.
        kind: "cosine" to zero, or "step": times `gamma` at `milestones`.
        milestones: shares of the training.
        gamma: factor of a drop.
    """

    epochs: int
    batch_size: int
    kind: Literal["cosine", "step"] = "cosine"
    milestones: Sequence[float] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1:
            raise ValueError(
                f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}"
            )
        if self.kind not in ("cosine", "step"):
            raise ValueError(f"schedule must be cosine or step, got {self.kind!r}")
        if any(not 0 <= m <= 1 for m in self.milestones):
            raise ValueError(f"milestones are shares of the training, got {list(self.milestones)}")

    def factor(self, share: float) -> float:
        """The learning rate at a share of training, as a share of its peak."""
        if self.kind == "cosine":
            return cosine(1.0, 0.0, share)
        return self.gamma ** sum(share >= m - 1e-9 for m in self.milestones)


def optimizer(
    name: str, groups: list[dict[str, Any]], *, momentum: float, nesterov: bool
) -> Optimizer:
    """SGD, LARS or AdamW over parameter groups with their own `lr` and `weight_decay`.

    Raises:
        ValueError: for another name.
    """
    if name == "sgd":
        return torch.optim.SGD(groups, 0.0, momentum=momentum, nesterov=nesterov and momentum > 0)
    if name == "lars":
        return LARS(groups, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups)
    raise ValueError(f"optimizer must be sgd, lars or adamw, got {name!r}")


class Dropout(nn.Module):
    """Dropout whose masks are those of the whole batch, for any number of processes.

    Args:
        share: of the features that are zero in training; the others grow by 1 / (1 - share).
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(f"dropout must be in [0, 1), got {share}")
        self.share, self.draws = share, Draws(0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) of (B, D)."""
        if not self.training or not self.share:
            return x
        u = self.draws.uniform(x.shape[1]).tensor_split(dist.world_size())[dist.rank()]
        return x * to((u >= self.share).float() / (1 - self.share), x.device)


def fit(
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    subject: Subject,
    rows: Tensor,
    schedule: Schedule,
    decode: Decode,
    *key: int | str,
    bf16: bool = False,
    dropout: Dropout | None = None,
) -> None:
    """Trains what the optimizer holds on random crops, each flipped with probability 1/2.

    Every process takes its share of a batch, and gradients are those of the whole batch. Images
    that would make a last incomplete batch are left out of an epoch, unless there is no other.

    Args:
        loss: of normalised images (B, 3, h, w), or clips (B, T, 3, h, w), and labels (B,), the
            *sum* over them.
        optimizer: its groups' learning rates are the peaks; those with a `warmup` keep their
            weights until that share of the training is over.
        subject: data and device.
        rows: positions of the training images.
        schedule: how long.
        decode: gives one crop.
        key: names the draws.
        bf16: compute in bfloat16 where autocast does.
        dropout: a layer of what is trained.

    Raises:
        ValueError: a process would have no image of a batch.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    labels = subject.data.labels("train")
    size = min(schedule.batch_size, len(rows))
    if size < dist.world_size():
        raise ValueError(
            f"a batch of {size} of the {len(rows)} images to learn from is too small for "
            f"{dist.world_size()} processes: use fewer, a larger batch_size or more labels"
        )
    per_epoch = len(rows) // size
    steps, step = schedule.epochs * per_epoch, 0
    for epoch in range(schedule.epochs):
        order = rows[shuffled(len(rows), *key, "order", epoch)][: per_epoch * size]
        batches = order.view(per_epoch, size)
        mine = [batch.tensor_split(dist.world_size())[dist.rank()].tolist() for batch in batches]
        scan = subject.data.cut("train", mine, decode, *key, "crops", epoch)
        for number, batch in enumerate(scan):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                waits = step < group.get("warmup", 0.0) * steps
                group["lr"] = 0.0 if waits else peak * schedule.factor(step / steps)
            if dropout is not None:
                dropout.draws = Draws(*key, "dropout", epoch, number, rows=size)
            flip = Draws(*key, "flip", epoch, number, rows=size).chance(0.5)
            flip = flip.tensor_split(dist.world_size())[dist.rank()].to(subject.device)
            x = images(batch["crops"][0], subject.device)
            x = torch.where(flip.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)  # clips as one
            y = labels[batch["index"]].to(subject.device)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(subject.device.type, torch.bfloat16, enabled=bf16):
                total = loss(x, y)
            (total.float() / size).backward()
            sum_gradients(optimizer)
            optimizer.step()
            step += 1
            subject.progress("training", step, steps)


def predictions(
    network: Callable[[Tensor], Tensor], subject: Subject, split: str, rows: Tensor | None = None
) -> Tensor:
    """What a network makes of whole images, in the order of `rows` (or of the split), on the CPU.

    Processes share the images: the network must be the same in all of them, which all call.

    Args:
        network: normalised images (B, 3, h, w) to (B, ...).
        subject: data and device.
        split: "train" or "test".
        rows: positions, or None for all.
    """
    mine = share(subject.data.size(split) if rows is None else len(rows))
    with torch.no_grad():
        found = [
            network(images(batch["crops"][0], subject.device)).float().cpu()
            for batch in _whole(subject.data, split, rows, mine)
        ]
    return mine.all(torch.cat(found), subject.device)


def _whole(data: Any, split: str, rows: Tensor | None, mine: Share) -> Iterator[Any]:
    if rows is None:
        return data.scan(split, mine.start, mine.stop)
    parts = [part.tolist() for part in rows[mine.start : mine.stop].split(256)]
    return data.cut(split, parts, data.eval_decode, "plain")


def sum_gradients(optimizer: Optimizer) -> None:
    """Gradients of the whole batch: each process divided by all of its images."""
    if dist.world_size() > 1:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = dist.reduce_sum(p.grad)


def norm_layers(module: nn.Module) -> list[nn.Module]:
    """Layers with running statistics."""
    return [m for m in module.modules() if getattr(m, "running_mean", None) is not None]
