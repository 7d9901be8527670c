"""What happens when a loss is not a number: training stops, or leaves the batch out."""

import logging
from collections.abc import Iterator
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from unlabeled import dist
from unlabeled.callbacks.metrics import Periodic

log = logging.getLogger(__name__)


class Finite(Periodic):
    """Watches that losses and weights stay finite.

    Everything is computed on the device; the host reads one number at every n-th update and at
    every checkpoint, so that no checkpoint is ever written of a run that has gone wrong: the last
    one stays the last good one.

    By "skip", an update whose loss or new weights are not finite is taken back as a whole:
    weights, buffers (batch norm, memories) and optimizer are what they were before its batches,
    and training goes on with the next. That costs their size in memory, and two copies a step.

    Args:
        policy: "stop" ends the training with an error, "skip" leaves updates out.
        most: updates that "skip" leaves out at most; one more ends the training.
        every_n_steps: updates between two looks of the host.
    """

    def __init__(
        self,
        *,
        policy: Literal["stop", "skip"] = "stop",
        most: int = 10,
        every_n_steps: int = 10,
    ) -> None:
        super().__init__(every_n_steps)
        if policy not in ("stop", "skip"):
            raise ValueError(f"policy must be stop or skip, got {policy!r}")
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        self.policy, self.most = policy, most
        self.skipped = 0  # updates, known to the host
        self._bad: Tensor | None = None  # () updates that went wrong, on the device
        self._loss_bad: Tensor | None = None  # () whether a batch of this update did
        self._kept: list[tuple[Tensor, Tensor]] = []  # what may be taken back, and its copy
        self._open = False  # whether batches of an update were drawn and it was not made
        self._updates = 0

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Becomes the first: others shall see the state that stays."""
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts counting on the device."""
        super().on_train_start(trainer, pl_module)
        self._bad = torch.tensor(float(self.skipped), device=pl_module.device)
        self._loss_bad = torch.zeros_like(self._bad)
        self._updates, self._open, self._kept = trainer.global_step, False, []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Remembers the state before the first batch of an update."""
        if self.policy == "skip" and not self._open:
            self._keep(trainer, pl_module)
        self._open = True

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any
    ) -> None:
        """Notes a loss that is not finite, and takes back the update it led to."""
        assert self._bad is not None
        assert self._loss_bad is not None
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            torch.maximum(self._loss_bad, _not_finite([loss.detach()]), out=self._loss_bad)
        if trainer.global_step == self._updates:
            return  # gradients accumulate
        self._updates, self._open = trainer.global_step, False
        bad = self._loss_bad
        if self.policy == "skip":
            bad = torch.maximum(bad, _not_finite(_weights(pl_module)))
            bad = dist.reduce_sum(bad).clamp(max=1)  # all take it back, or nobody
            self._take_back(trainer, pl_module, bad > 0)
        self._bad = self._bad + bad
        self._loss_bad.zero_()
        if self.due(trainer):
            self._look(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: Any) -> None:
        """Lets nothing be saved that is not finite."""
        if self._bad is None:
            return
        if self.policy == "stop":
            self._bad = self._bad + _not_finite(_weights(pl_module))
        self._look(trainer)

    def state_dict(self) -> dict[str, int]:
        """How many updates were left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on counting."""
        self.skipped = state_dict.get("skipped", 0)

    @torch.no_grad()
    def _keep(self, trainer: pl.Trainer, pl_module: Any) -> None:
        here = list(_state(trainer, pl_module))
        if [id(x) for x in here] != [id(x) for x, _ in self._kept]:  # an optimizer began
            self._kept = [(x, torch.empty_like(dist.local(x))) for x in here]
        for now, before in self._kept:
            before.copy_(dist.local(now))

    def _take_back(self, trainer: pl.Trainer, pl_module: Any, bad: Tensor) -> None:
        kept = {id(now): before for now, before in self._kept}
        for state in _state(trainer, pl_module):
            # The optimizer's of a first update were zero before it, so to say.
            before, now = kept.get(id(state)), dist.local(state)
            now.copy_(torch.where(bad, torch.zeros_like(now) if before is None else before, now))

    def _look(self, trainer: pl.Trainer) -> None:
        assert self._bad is not None
        # One process alone must not stop: the others would wait for it.
        count = int(self._bad if self.policy == "skip" else dist.reduce_sum(self._bad))
        if count > self.skipped:
            step, place = trainer.global_step, f"{trainer.default_root_dir}/checkpoints/last.ckpt"
            if self.policy == "stop" or count > self.most:
                what = (
                    f"{count} updates had to be left out, more than most={self.most}"
                    if self.policy == "skip"
                    else "the loss or a weight is not finite"
                )
                raise FloatingPointError(
                    f"{what} (update {step} or one of the {self.every_n_steps} before): {place} "
                    "holds the state before, if one was saved. Try a lower learning rate or "
                    "trainer.precision=32-true, or leave such updates out by "
                    "callbacks.finite.policy=skip"
                )
            log.warning("up to update %d, %d updates were not finite and left out", step, count)
        self.skipped = count


def _weights(module: torch.nn.Module) -> list[Tensor]:
    return [dist.local(p.detach()) for p in module.parameters()]


def _state(trainer: pl.Trainer, module: Any) -> Iterator[Tensor]:
    """All tensors on the device that an update may change."""
    yield from module.parameters()
    yield from module.buffers()
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (
                x for x in state.values() if isinstance(x, Tensor) and x.device == module.device
            )


def _not_finite(tensors: list[Tensor]) -> Tensor:
    """(): 1.0 if any of the tensors holds an infinity or NaN, else 0.0. The host does not wait."""
    floats = [x for x in tensors if x.is_floating_point()]
    # A norm is as finite as what it is of, but for squares that overflow: the largest magnitude.
    largest = torch.stack([x.float() for x in torch._foreach_norm(floats, ord=float("inf"))])
    return 1.0 - largest.isfinite().all().float()
