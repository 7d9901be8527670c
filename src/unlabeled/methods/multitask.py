"""Multi-task Self-Supervised Visual Learning.

Doersch and Zisserman, ICCV 2017. https://arxiv.org/abs/1708.07860

    L = sum over tasks t of w_t L_t(head_t(trunk(x_t)))

Tasks share the trunk and have heads, losses and augmentations of their own. Batches take turns
(`decode.schedule=round_robin`: one task each, the heads are swapped; L is then w_t L_t), or every
batch is for all tasks (`decode.schedule=summed`). A head that had no batch keeps its weights and
its optimizer's state: its gradients are None, so that neither momentum nor weight decay moves it.
The learning rate follows the number of updates, of whichever tasks.

Not here: exemplar, motion segmentation; the lasso is linear/lasso. From memory: harmonisation.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.by_task import ByTask, Grey, average_gradients
from unlabeled.parts.task_norm import TaskNorms


class MultiTask(Method):
    """Several methods on one backbone.

    DDP is not told of heads: it would wait for those that rest. If a task trains a part of the
    backbone only, it needs trainer.strategy=ddp_find_unused_parameters_true.

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
        self.weights = dict.fromkeys(tasks, 1.0) | dict(weights or {})
        if not tasks or self.weights.keys() != set(tasks) or min(self.weights.values()) <= 0:
            raise ValueError(f"{weights=} must be positive, for some of tasks={list(tasks)}")
        if norm not in ("shared", "per_task"):
            raise ValueError(f"norm must be shared or per_task, got {norm!r}")
        self.tasks = nn.ModuleDict()
        for name, task in tasks.items():
            made = self.tasks[name] = task(backbone=backbone, optim=optim)
            if not made.automatic_optimization or type(made).begin_epoch is not Method.begin_epoch:
                raise ValueError(f"{name} has an optimizer or an order of images of its own")
            del made.backbone  # a part of this module, not of theirs
            object.__setattr__(made, "backbone", backbone)
        self.norms = TaskNorms(backbone, list(tasks) if norm == "per_task" else [])
        augments = {name: cast(Method, task).augment for name, task in self.tasks.items()}
        self.augment = ByTask(augments, Grey() if grey else nn.Identity())
        self.needs = frozenset({"task"}).union(*(m.needs for m in self.tasks.values()))  # type: ignore
        self.active: set[str] = set()  # tasks with a batch since the last update

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
        named = {key if key == name else f"{name}/{key}": x for key, x in found.items()}
        return {key: self.weights[name] * x for key, x in named.items()}

    def _lent(self, name: str) -> Method:
        """A task that knows what this module knows of the run."""
        task = cast(Method, self.tasks[name])
        task.seed, task.step, task._total_steps = self.seed, self.step, self._total_steps
        return task

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        with self.norms.of(name := batch["task"]):
            shown = self._lent(name).pictures(batch)
        return {f"{name}: {title}": x for title, x in shown.items()}

    def prepare(self, count: int, classes: int) -> None:
        for name in self.tasks:
            self._lent(name).prepare(count, classes)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if {*data.decode.tasks} != {*self.tasks}:
            both = f"decode.tasks={[*data.decode.tasks]} and method.tasks={[*self.tasks]}"
            raise ValueError(f"{both} must have the same names")
        for name in self.tasks:
            self._lent(name).trainer = self.trainer
        apart, named = {id(p) for p in self._apart()}, self.named_parameters()
        self._ddp_params_and_buffers_to_ignore += [name for name, p in named if id(p) in apart]

    def _apart(self) -> list[nn.Parameter]:
        """What batches of some tasks do not train."""
        return [*self.tasks.parameters(), *self.norms.all_parameters()]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        average_gradients(self._apart())
        for name in sorted(self.active):
            self._lent(name).on_before_optimizer_step(optimizer)

    def after_step(self) -> None:
        for name in sorted(self.active):
            self._lent(name).after_step()
        self.active = set()
