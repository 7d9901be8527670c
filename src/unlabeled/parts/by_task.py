"""Batches that belong to one of several tasks, or to all of them: augmentation, gradients."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

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
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages what gradients there are over processes, by one message, as DDP would.

    All processes must have gradients of the same parameters: of the same task.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads and dist.world_size() > 1:
        mean = dist.reduce_sum(torch.cat([g.flatten() for g in grads])) / dist.world_size()
        parts = mean.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [x.view(g.shape) for x, g in zip(parts, grads, strict=True)])
