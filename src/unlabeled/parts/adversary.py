"""A discriminator's turn and a generator's, and the optimizers of both."""

import copy
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
    if optimizer is None:
        return loss.detach()
    optimizer.zero_grad()
    loss.backward()
    if dist.world_size() > 1:
        grads = [cast(Tensor, p.grad) for p in discriminator.parameters()]
        mean = dist.reduce_sum(torch.cat([g.flatten() for g in grads])) / dist.world_size()
        parts = mean.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [x.view_as(g) for x, g in zip(parts, grads, strict=True)])
    optimizer.step()
    return loss.detach()


@full_precision
def judged(discriminator: nn.Module, made: Tensor, kind: Kind) -> Tensor:
    """The generator's loss; its gradient leaves the discriminator alone."""
    discriminator.requires_grad_(False)
    loss = generator_loss(discriminator(made), kind)
    discriminator.requires_grad_(True)
    return loss


class Turns:
    """Builds two optimizers, each with its schedule: a module's but for a part, and the part's.

    Args:
        recipe: builds one, as `unlabeled.optim.Optim`.
        part: name of the submodule that has its own.
        factor: of the learning rate of all else.
    """

    def __init__(self, recipe: Callable[..., dict[str, Any]], part: str, factor: float) -> None:
        if factor <= 0:
            raise ValueError(f"generator_lr must be positive, got {factor}")
        self.part, self.second = part, recipe
        self.first: Any = copy.copy(recipe)
        self.first.lr *= factor
        if self.first.norm_bias_lr is not None:
            self.first.norm_bias_lr *= factor

    def __call__(
        self, module: nn.Module, *, batch_size: int, steps: int, steps_per_epoch: int
    ) -> tuple[dict[str, Any], ...]:
        rest = nn.ModuleDict({n: m for n, m in module.named_children() if n != self.part})
        found = []
        for recipe, network in ((self.first, rest), (self.second, getattr(module, self.part))):
            made = recipe(
                network, batch_size=batch_size, steps=steps, steps_per_epoch=steps_per_epoch
            )
            del made["lr_scheduler"]["interval"]  # who steps by hand says when
            found.append(made)
        return tuple(found)
