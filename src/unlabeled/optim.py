"""Optimizers, schedules and the scaling of learning rates."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Optim:
    """Builds a module's optimizer and schedule once its training's length is known.

    Times are shares of the whole training, so that a recipe holds when the length changes.

    Args:
        optimizer: called with parameter groups, e.g. a partial `torch.optim.SGD`.
        lr: learning rate for a global batch of `reference_batch` images.
        scaling: how lr follows the batch: "linear" (Goyal et al., 2017), "sqrt" or "none".
        reference_batch: the batch that `lr` is given for.
        weight_decay: for all parameters, or only for weights: see `decay_all`.
        weight_decay_end: where weight decay gets to along half a cosine over the whole training
            (DINO); None: it stays.
        decay_all: decay biases and norm layers too; else they are left out of weight decay and
            of LARS's adaptation.
        norm_bias_lr: another learning rate for biases and norm layers (Barlow Twins).
        schedule: "cosine" (to `final`), "step" (times `gamma` at `milestones`) or "constant".
        warmup: share of training over which lr rises linearly from `warmup_start` * lr.
        warmup_start: share of lr that the warm-up starts from.
        final: share of lr that the cosine ends at.
        milestones: shares of training at which a step schedule drops.
        gamma: factor of a drop.
        interval: whether the schedule moves every "step" or only every "epoch".
        constant: names of submodules whose lr stays constant (SimSiam's predictor).
        clip_each: the largest norm of each parameter's own gradient (DINO's code); None: no limit.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer],
        *,
        lr: float,
        scaling: Literal["linear", "sqrt", "none"] = "linear",
        reference_batch: int = 256,
        weight_decay: float = 0.0,
        weight_decay_end: float | None = None,
        decay_all: bool = True,
        norm_bias_lr: float | None = None,
        schedule: Literal["cosine", "step", "constant"] = "cosine",
        warmup: float = 0.0,
        warmup_start: float = 0.0,
        final: float = 0.0,
        milestones: Sequence[float] = (),
        gamma: float = 0.1,
        interval: Literal["step", "epoch"] = "step",
        constant: Sequence[str] = (),
        clip_each: float | None = None,
    ) -> None:
        if clip_each is not None and clip_each <= 0:
            raise ValueError(f"clip_each must be positive, or null for no limit, got {clip_each}")
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        for name, decay in (("weight_decay", weight_decay), ("weight_decay_end", weight_decay_end)):
            if decay is not None and decay < 0:
                raise ValueError(f"{name} must not be negative, got {decay}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the training, in [0, 1), got {warmup}")
        if schedule not in ("cosine", "step", "constant"):
            raise ValueError(f"schedule must be cosine, step or constant, got {schedule!r}")
        if scaling not in ("linear", "sqrt", "none"):
            raise ValueError(f"scaling must be linear, sqrt or none, got {scaling!r}")
        if any(not 0 <= m <= 1 for m in milestones):
            raise ValueError(f"milestones are shares of the training, got {list(milestones)}")
        self.optimizer, self.lr, self.scaling = optimizer, lr, scaling
        self.reference_batch, self.decay_all = reference_batch, decay_all
        self.weight_decay, self.weight_decay_end = weight_decay, weight_decay_end
        self.norm_bias_lr, self.schedule, self.warmup = norm_bias_lr, schedule, warmup
        self.warmup_start, self.final, self.milestones = warmup_start, final, tuple(milestones)
        self.gamma, self.interval, self.constant = gamma, interval, tuple(constant)
        self.clip_each = clip_each  # by `Method`

    def __call__(
        self, module: nn.Module, *, batch_size: int, steps: int, steps_per_epoch: int
    ) -> dict[str, Any]:
        """Lightning's dictionary of an optimizer and its per-step schedule.

        Args:
            module: parameters that require gradients are trained.
            batch_size: images per update over all processes and accumulated batches.
            steps: updates of the whole training.
            steps_per_epoch: updates per epoch.
        """
        ratio = batch_size / self.reference_batch
        scale = {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[self.scaling]
        groups, factors = [], []
        for (small, fixed), params in self._split(module).items():
            lr = self.norm_bias_lr if small and self.norm_bias_lr is not None else self.lr
            spared = small and not self.decay_all
            groups.append(
                {
                    "params": params,
                    "lr": lr * scale,
                    "weight_decay": 0.0 if spared else self.weight_decay,
                    "adapt": not spared,
                }
            )
            factors.append(self._factor_of_step(steps, steps_per_epoch, fixed=fixed))
        if not groups:
            raise ValueError(f"{type(module).__name__} has no parameters to train")
        optimizer = self.optimizer(groups)
        schedule = LambdaLR(optimizer, factors)
        if self.weight_decay_end is not None:
            optimizer.register_step_pre_hook(self._mover(schedule, steps, self.weight_decay_end))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _mover(self, schedule: LambdaLR, steps: int, end: float) -> Callable[..., None]:
        def move(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # A function of what checkpoints hold, as the hook itself is not saved.
            decay = cosine(self.weight_decay, end, schedule.last_epoch / steps)
            for group in optimizer.param_groups:
                group["weight_decay"] = decay if group["adapt"] else 0.0

        return move

    def _split(self, module: nn.Module) -> dict[tuple[bool, bool], list[nn.Parameter]]:
        """Trained parameters by (bias or norm, constant learning rate), in a fixed order."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, p in module.named_parameters():
            if p.requires_grad:
                fixed = any(name == c or name.startswith(c + ".") for c in self.constant)
                groups.setdefault((p.ndim <= 1, fixed), []).append(p)
        return groups

    def _factor_of_step(
        self, steps: int, steps_per_epoch: int, *, fixed: bool
    ) -> Callable[[int], float]:
        # Plain functions: a schedule saves other callables in checkpoints, code and all.
        def factor(step: int) -> float:
            if self.interval == "epoch":
                step = step // steps_per_epoch * steps_per_epoch
            return 1.0 if fixed else self.factor(min(1.0, step / steps))

        return factor

    def factor(self, share: float) -> float:
        """The learning rate at a share of training, as a share of its peak."""
        if share < self.warmup:
            return self.warmup_start + (1 - self.warmup_start) * share / self.warmup
        if self.schedule == "cosine":
            return cosine(1.0, self.final, (share - self.warmup) / (1 - self.warmup))
        if self.schedule == "step":
            return self.gamma ** sum(share >= m - 1e-9 for m in self.milestones)
        return 1.0


def cosine(start: float, end: float, share: float) -> float:
    """From start to end along half a cosine, at a share of the way from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling around SGD with momentum (You et al., 2017).

    For each weight with `adapt`, the gradient g + wd * w is scaled by eta * |w| / |g + wd * w|
    (1 where either norm is 0); groups with `adapt=False` (biases, norm layers) are plain SGD.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: of the velocity.
        weight_decay: added to the gradient before its norm is taken.
        eta: the trust coefficient.
        lr_in_momentum: True multiplies lr into the velocity (SimCLR's code:
            v <- m v + lr r g), False outside it (Barlow Twins, BYOL: w <- w - lr v). They
            differ whenever lr changes between steps.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        lr_in_momentum: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "lr_in_momentum": lr_in_momentum,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, in a number of tensor operations that does not grow with the layers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work: list[_Work] = []
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
            if params and group["weight_decay"]:
                grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            if params:
                work.append(_Work(group, params, grads))
        for eta in dict.fromkeys(w.group["eta"] for w in work):
            self._adapt([w for w in work if w.group["adapt"] and w.group["eta"] == eta], eta)
        for w in work:
            self._move(w.group, w.params, w.grads)
        return loss

    @staticmethod
    def _adapt(work: list["_Work"], eta: float) -> None:
        # The groups together: each of these operations would cost as much for every one.
        params, grads = [p for w in work for p in w.params], [g for w in work for g in w.grads]
        if not params:
            return
        w = torch.stack(torch._foreach_norm(params))
        g = torch.stack(torch._foreach_norm(grads))
        trust = torch.where((w > 0) & (g > 0), eta * w / g, torch.ones_like(w))
        scaled = iter(torch._foreach_mul(grads, list(trust.unbind())))
        for part in work:
            part.grads[:] = itertools.islice(scaled, len(part.grads))

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        if group["lr_in_momentum"]:
            grads = list(torch._foreach_mul(grads, group["lr"]))
        if new := [p for p in params if "momentum_buffer" not in self.state[p]]:
            for p, zero in zip(new, torch._foreach_mul(new, 0.0), strict=True):
                self.state[p]["momentum_buffer"] = zero
        velocity = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(velocity, group["momentum"])
        torch._foreach_add_(velocity, grads)
        scale = 1.0 if group["lr_in_momentum"] else group["lr"]
        torch._foreach_add_(params, velocity, alpha=-scale)


class _Work(NamedTuple):
    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
