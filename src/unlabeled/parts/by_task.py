"""Several tasks on one backbone: names, weights, augmentations, orders and gradients."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlabeled import dist
from unlabeled.batch import MEAN, STD, Batch
from unlabeled.draws import Draws

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as for grey images elsewhere


class Grey(nn.Module):
    """Normalised images (..., 3, H, W) without colour: their luma in all three channels."""

    def __init__(self) -> None:
        super().__init__()
        mean, std, luma = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD, LUMA))
        self.share: Tensor
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("share", luma * std, persistent=False)
        self.register_buffer("scale", 1 / std, persistent=False)
        self.register_buffer("shift", ((luma * mean).sum() - mean) / std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        grey = (x * self.share).sum(-3, keepdim=True) * self.scale + self.shift
        return torch.empty_like(x).copy_(grey)  # in x's memory format


def weights_of(tasks: Iterable[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """A weight for each task: 1 where nothing is said."""
    names = list(tasks)
    found = dict.fromkeys(names, 1.0) | dict(weights or {})
    if not names or found.keys() != set(names) or min(found.values()) <= 0:
        raise ValueError(f"{weights=} must be positive, for some of tasks={names}")
    return found


def lent(tasks: Mapping[str, Any], backbone: nn.Module) -> nn.ModuleDict:
    """Tasks whose backbone is a part of who lends it, and none of theirs.

    Raises:
        ValueError: one computes something of all images between epochs (clusters).
    """
    for name, task in tasks.items():
        if "begin_epoch" in vars(type(task)) and not task.pretext:
            raise ValueError(
                f"{name} has phases and is no pretext task: it cannot be one of several"
            )
        del task.backbone
        object.__setattr__(task, "backbone", backbone)
    return nn.ModuleDict(tasks)


def check_names(decode: Any, tasks: Iterable[str]) -> None:
    """Raises ValueError if crops are cut for other tasks than these."""
    given, names = [*decode.tasks], [*tasks]
    if {*given} != {*names}:
        raise ValueError(f"decode.tasks={given} and method.tasks={names} must have the same names")


class ByTask(nn.Module):
    """Every task's batch through the task's own augmentation.

    Args:
        augments: by task; they are parts of the tasks, and not of this module.
        last: what all views go through in the end.
    """

    def __init__(self, augments: Mapping[str, nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.augments, self.last = dict(augments), last

    def forward(self, batch: Batch, draws: Draws) -> Batch:
        """A batch with `task`, or with `tasks`, of which the first one's views are the batch's."""
        if "tasks" not in batch:
            return self._of(batch["task"], batch, draws)  # type: ignore[typeddict-item]
        shared = {key: value for key, value in batch.items() if key != "tasks"}
        tasks: dict[str, Batch] = {
            name: self._of(name, {**shared, **part}, draws)  # type: ignore[typeddict-item]
            for name, part in batch["tasks"].items()
        }
        first = next(iter(tasks.values()))
        return {**batch, "tasks": tasks, "views": first["views"]}  # type: ignore

    def _of(self, task: str, batch: Batch, draws: Draws) -> Batch:
        own = Draws(*draws.key, rows=draws.rows, rank=draws.rank, world=draws.world)  # from anew
        batch = self.augments[task](batch, own)
        return {**batch, "views": [self.last(x) for x in batch["views"]]}  # type: ignore


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
    """Averages what gradients there are over processes, by one message, as DDP would.

    All processes must have gradients of the same parameters: of the same task.

    Args:
        parameters: of tasks.
        optimizer: which is to step; who has another one (an adversary) sees to its gradients.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    grads = [p.grad for p in parameters if p.grad is not None and id(p) in held]
    if grads and dist.world_size() > 1:
        mean = dist.reduce_sum(torch.cat([g.flatten() for g in grads])) / dist.world_size()
        parts = mean.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [x.view(g.shape) for x, g in zip(parts, grads, strict=True)])


def the_order(orders: Mapping[str, Tensor | None]) -> Tensor | None:
    """The order of images that one of the tasks wants; None: nobody wants any.

    Raises:
        ValueError: several tasks want one.
    """
    chosen = {name: order for name, order in orders.items() if order is not None}
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} choose the order of images each: leave one")
    return next(iter(chosen.values()), None)
