"""A discriminator's turn and a generator's, and the optimizers of both."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from unlabeled import dist
from unlabeled.parts.precision import full_precision

Kind = Literal["minimax", "non_saturating"]


@full_precision
def discriminator_loss(true: Tensor, made: Tensor) -> Tensor:
    """-log D(true) - log(1 - D(made)), the means over logits (B,); 2 log 2 where D is 1/2."""
    return F.softplus(-true).mean() + F.softplus(made).mean()


@full_precision
def generator_loss(made: Tensor, kind: Kind) -> Tensor:
    """log(1 - D(made)) for "minimax", -log D(made) for "non_saturating": means over logits (B,)."""
    if kind not in ("minimax", "non_saturating"):
        raise ValueError(f"adversary must be minimax or non_saturating, got {kind!r}")
    return -F.softplus(made).mean() if kind == "minimax" else F.softplus(-made).mean()


@full_precision
def discriminate(
    discriminator: nn.Module, true: Tensor, made: Tensor, optimizer: Optimizer | None
) -> Tensor:
    """The discriminator's loss, detached; with an optimizer it makes a step against it.

    True and made images are batches of their own: the statistics of a mixed one would tell them
    apart. All is in full precision, so that no gradient needs a scaler; where there are several
    processes, gradients are averaged over them.
    """
    loss = discriminator_loss(discriminator(true), discriminator(made.detach()))
    if optimizer is not None:
        _step(discriminator, loss, optimizer)
    return loss.detach()


def _step(
    discriminator: nn.Module, loss: Tensor, optimizer: Optimizer, keep_graph: bool = False
) -> None:
    optimizer.zero_grad()
    loss.backward(retain_graph=keep_graph, inputs=list(discriminator.parameters()))
    if dist.world_size() > 1:
        grads = [cast(Tensor, p.grad) for p in discriminator.parameters()]
        mean = dist.reduce_sum(torch.cat([g.flatten() for g in grads])) / dist.world_size()
        parts = mean.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [x.view_as(g) for x, g in zip(parts, grads, strict=True)])
    optimizer.step()


@full_precision
def judged(discriminator: nn.Module, made: Tensor, kind: Kind) -> Tensor:
    """The generator's loss; its gradient leaves the discriminator alone."""
    discriminator.requires_grad_(False)
    loss = generator_loss(discriminator(made), kind)
    discriminator.requires_grad_(True)
    return loss


@full_precision
def with_old_outputs(
    discriminator: nn.Module, true: Tensor, made: Tensor, optimizer: Optimizer, kind: Kind
) -> tuple[Tensor, Tensor]:
    """What `discriminate` and `judged` give where D sees made images once (DCGAN's Torch code).

    The generator's loss is of what D said before its step; its gradient goes through the maps of
    that pass and the weights that D has after the step.
    """
    told_true, shown = discriminator(true), made.detach().requires_grad_()
    with saved_tensors_hooks(Tensor.detach, lambda x: x):  # weights may change
        said = discriminator(shown)
    loss, fooled = discriminator_loss(told_true, said), generator_loss(said, kind)
    _step(discriminator, loss, optimizer, keep_graph=True)
    (gradient,) = torch.autograd.grad(fooled, shown)
    return loss.detach(), fooled.detach() + (gradient * (made - shown.detach())).sum()


class Turns:
    """Builds several optimizers, each with its schedule: a module's but for some parts, and theirs.

    Args:
        recipe: builds one, as `unlabeled.optim.Optim`.
        parts: submodules that have their own, and the factors of their learning rates.
        factor: of the learning rate of all else.

    Raises:
        ValueError: a factor is not positive, or the recipe clips gradients, which only a trainer
            that steps one optimizer does.
    """

    def __init__(
        self,
        recipe: Callable[..., dict[str, Any]],
        parts: Mapping[str, float],
        *,
        factor: float = 1.0,
    ) -> None:
        if min(factor, *parts.values()) <= 0:
            raise ValueError(f"generator_lr must be positive, got {factor}")
        if (most := getattr(recipe, "clip_each", None)) is not None:
            raise ValueError(
                f"an adversary steps by itself and clips nothing, got clip_each={most}"
            )
        self.recipe, self.parts, self.factor = recipe, dict(parts), factor

    def __call__(
        self, module: nn.Module, *, batch_size: int, steps: int, steps_per_epoch: int
    ) -> tuple[dict[str, Any], ...]:
        apart = {name: module.get_submodule(name) for name in self.parts}
        trained = [p for m in apart.values() for p in m.parameters() if p.requires_grad]
        sizes = dict(batch_size=batch_size, steps=steps, steps_per_epoch=steps_per_epoch)
        for p in trained:
            p.requires_grad_(False)  # so that the first optimizer leaves them out
        found = [_scaled(self.recipe, self.factor)(module, **sizes)]
        for p in trained:
            p.requires_grad_(True)
        found += [_scaled(self.recipe, self.parts[n])(m, **sizes) for n, m in apart.items()]
        for made in found:
            del made["lr_scheduler"]["interval"]  # who steps by hand says when
        return tuple(found)


def _scaled(recipe: Any, factor: float) -> Any:
    """A recipe with all its learning rates times a factor."""
    other = copy.copy(recipe)
    other.lr *= factor
    if other.norm_bias_lr is not None:
        other.norm_bias_lr *= factor
    return other


def with_tasks(recipe: Any, tasks: Mapping[str, Any]) -> Any:
    """The recipe of a module with these `tasks`: of several optimizers if one has an adversary.

    The adversary's rate keeps its ratio to that of what it judges, which is the module's here. Each
    such task is told which of the trainer's optimizers is its adversary's (`turn`).

    Raises:
        ValueError: a task steps by itself in any other way.
    """
    parts: dict[str, float] = {}
    for name, task in tasks.items():
        if task.automatic_optimization:
            continue
        if not isinstance(task.optim, Turns):
            raise ValueError(f"{name} steps by itself, and a task may have an adversary only")
        ((part, factor),) = task.optim.parts.items()
        task.turn = 1 + len(parts)
        parts[f"tasks.{name}.{part}"] = factor / task.optim.factor
    return Turns(recipe, parts) if parts else recipe


def update(method: Any, total: Tensor) -> Tensor:
    """What the trainer does after a loss where there is one optimizer, by the first of several.

    Args:
        method: the other optimizers made their steps within its loss; in automatic optimisation
            all is left to the trainer.
        total: the loss (), which is returned.
    """
    if not method.automatic_optimization:
        optimizer = method.optimizers()[0]
        optimizer.zero_grad()
        method.manual_backward(total)
        optimizer.step()
        with warnings.catch_warnings():  # of rates that move before their optimizer's first turn
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for schedule in method.lr_schedulers():
                schedule.step()
        method.after_step()
    return total
