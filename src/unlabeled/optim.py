"""Optimizers, schedules and the scaling of learning rates."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
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
        decay_biases: without `decay_all`, decay biases all the same, but no norm layer (VISSL).
        decay_factors: submodule -> what its weight decay is multiplied by.
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
        decay_biases: bool = False,
        decay_factors: Mapping[str, float] | None = None,
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
        if norm_bias_lr is not None and norm_bias_lr <= 0:
            raise ValueError(f"norm_bias_lr must be positive, or null for lr, got {norm_bias_lr}")
        for name, value in (("lr", lr), ("reference_batch", reference_batch), ("gamma", gamma)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, share in (("final", final), ("warmup_start", warmup_start)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share of lr, in [0, 1], got {share}")
        if interval not in ("step", "epoch"):
            raise ValueError(f"interval must be step or epoch, got {interval!r}")
        for name, decay in (("weight_decay", weight_decay), ("weight_decay_end", weight_decay_end)):
            if decay is not None and decay < 0:
                raise ValueError(f"{name} must not be negative, got {decay}")
        self.decay_factors = dict(decay_factors or {})
        if low := {name: f for name, f in self.decay_factors.items() if f < 0}:
            raise ValueError(f"decay_factors must not be negative, got {low}")
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
        self.decay_biases = decay_biases
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
        groups, factors, shares = [], [], []
        for (small, spared, fixed, share), params in self._split(module).items():
            lr = self.norm_bias_lr if small and self.norm_bias_lr is not None else self.lr
            shares.append(0.0 if spared else share)
            groups.append(
                {
                    "params": params,
                    "lr": lr * scale,
                    "weight_decay": self.weight_decay * shares[-1],
                    "adapt": not spared,
                }
            )
            factors.append(self._factor_of_step(steps, steps_per_epoch, fixed=fixed))
        if not groups:
            raise ValueError(f"{type(module).__name__} has no parameters to train")
        optimizer = self.optimizer(groups)
        schedule = LambdaLR(optimizer, factors)
        if self.weight_decay_end is not None:
            mover = self._mover(schedule, steps, self.weight_decay_end, shares)
            optimizer.register_step_pre_hook(mover)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _mover(
        self, schedule: LambdaLR, steps: int, end: float, shares: Sequence[float]
    ) -> Callable[..., None]:
        def move(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # A function of what checkpoints hold, as the hook itself is not saved.
            decay = cosine(self.weight_decay, end, schedule.last_epoch / steps)
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["weight_decay"] = decay * share

        return move

    def _split(self, module: nn.Module) -> dict[tuple[bool, bool, bool, float], list[nn.Parameter]]:
        """Trained parameters in a fixed order, by what becomes of them.

        By (bias or norm, without decay, constant learning rate, factor of the decay).

        Raises:
            ValueError: a part that `decay_factors` names is not there.
        """
        biases = {id(p) for m in module.modules() if (p := _bias(m)) is not None}
        groups: dict[tuple[bool, bool, bool, float], list[nn.Parameter]] = {}
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        if lost := [part for part in self.decay_factors if not any(_in(n, part) for n in names)]:
            parts = sorted({name.split(".")[0] for name in names})
            raise ValueError(f"decay_factors names {lost}, but what is trained are {parts}")
        for name in names:
            p = module.get_parameter(name)
            small, fixed = p.ndim <= 1, any(_in(name, part) for part in self.constant)
            kept = self.decay_all or not small or (self.decay_biases and id(p) in biases)
            share = math.prod(f for part, f in self.decay_factors.items() if _in(name, part))
            groups.setdefault((small, not kept, fixed, float(share)), []).append(p)
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


def _in(name: str, part: str) -> bool:
    """Whether a parameter's name lies in a submodule's."""
    return name == part or name.startswith(part + ".")


def _bias(module: nn.Module) -> nn.Parameter | None:
    """A layer's bias, unless the layer is a norm (whose weights are as many)."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and weight.ndim > 1:
        return bias
    return None
