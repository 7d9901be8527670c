"""Multi-task Self-Supervised Visual Learning.

Doersch and Zisserman, ICCV 2017. https://arxiv.org/abs/1708.07860

    L = sum over tasks t of w_t L_t(head_t(trunk(x_t)))

Tasks share the trunk and have heads, losses and augmentations of their own. Batches take turns
(`decode.schedule=round_robin`: one task each, the heads are swapped; L is then w_t L_t), or every
batch is for all tasks (`decode.schedule=summed`). A head that had no batch keeps its weights and
its optimizer's state: its gradients are None, so that neither momentum nor weight decay moves it.
The learning rate follows the number of updates, of whichever tasks. A task's adversary has an
optimizer of its own and steps within the task's loss: no clipping, no accumulated gradients then.

Not here: exemplar, motion segmentation; the lasso is linear/lasso. From memory: harmonisation.
"""

from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts import adversary, by_task
from unlabeled.parts.task_norm import TaskNorms


class MultiTask(Method):
    """Several methods on one backbone.

    DDP is not told of heads: it would wait for those that rest. A task that trains a part of the
    backbone only needs trainer.strategy=ddp_find_unused_parameters_true.

    Args:
        backbone: the trunk.
        optim: of trunk and heads.
        tasks: methods by name, each waiting for `backbone` and `optim`.
        weights: w_t by name; 1 where nothing is said.
        norm: whether tasks share the trunk's batch norm ("shared") or each has its own
            ("per_task"; the first task's is evaluated).
        grey: harmonisation: all tasks see images without colour.
    """

    pretext = whole_weights = True

    def __init__(
        self,
        backbone: nn.Module,
        optim: Optim,
        *,
        tasks: Mapping[str, Callable[..., Method]],
        weights: Mapping[str, float] | None = None,
        norm: Literal["shared", "per_task"] = "shared",
        grey: bool = False,
    ) -> None:
        super().__init__(backbone, nn.Identity(), optim)
        self.weights = by_task.weights_of(tasks, weights)
        made = {name: task(backbone=backbone, optim=optim) for name, task in tasks.items()}
        self.tasks = by_task.lent(made, backbone)
        self.optim = adversary.with_tasks(optim, made)
        self.automatic_optimization = self.optim is optim
        self.norms = TaskNorms(backbone, list(tasks), norm)
        augments = {name: cast(Method, task).augment for name, task in self.tasks.items()}
        self.augment = by_task.ByTask(augments, by_task.Grey() if grey else nn.Identity())
        self.needs = frozenset({"task"}).union(*(m.needs for m in self.tasks.values()))  # type: ignore
        self.active: set[str] = set()  # tasks with a batch since the last update

    def begin_epoch(self, epoch: int) -> Tensor | None:
        orders = {}
        for name in self.tasks:
            with self.norms.of(name):
                orders[name] = self._lent(name).begin_epoch(epoch)
        return by_task.the_order(orders)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        parts = batch["tasks"] if "tasks" in batch else {batch["task"]: batch}
        return {k: v for name, part in parts.items() for k, v in self._terms(name, part).items()}

    def _terms(self, name: str, batch: Batch) -> dict[str, Tensor]:
        task = self._lent(name)
        task._noted = {}
        with self.norms.of(name):
            found = task.loss(batch)
        for key, value in task._noted.items():
            self.note(f"{name}/{key}", value)
        self.seen = task.seen
        self.active |= {name} if self.training else set()
        return {k if k == name else f"{name}/{k}": self.weights[name] * x for k, x in found.items()}

    def _lent(self, name: str) -> Method:
        """A task that knows what this module knows of the run."""
        task = cast(Method, self.tasks[name])
        task.seed, task.step, task._total_steps = self.seed, self.step, self._total_steps
        return task

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return adversary.update(self, super().training_step(batch, batch_idx))

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        with self.norms.of(name := batch["task"]):
            return {f"{name}: {k}": x for k, x in self._lent(name).pictures(batch).items()}

    def prepare(self, count: int, classes: int) -> None:
        for name in self.tasks:
            self._lent(name).prepare(count, classes)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        by_task.check_names(self.trainer.datamodule.decode, self.tasks)  # type: ignore[attr-defined]
        for name in self.tasks:
            self._lent(name).trainer = self.trainer
        apart, named = {id(p) for p in self._apart()}, self.named_parameters()
        self._ddp_params_and_buffers_to_ignore += [name for name, p in named if id(p) in apart]

    def _apart(self) -> list[nn.Parameter]:
        """What batches of some tasks do not train."""
        return [*self.tasks.parameters(), *self.norms.all_parameters()]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        by_task.average_gradients(self._apart(), optimizer)
        for name in sorted(self.active):
            self._lent(name).on_before_optimizer_step(optimizer)

    def after_step(self) -> None:
        for name in sorted(self.active):
            self._lent(name).after_step()
        self.active = set()
