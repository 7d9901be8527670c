"""LARS, the optimizer of large batches."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


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
