"""The one base class: a backbone, an augmentation, an optimizer, and a loss to be written."""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from unlabeled import dist
from unlabeled.batch import Batch, taken_by
from unlabeled.draws import Draws, seed_of
from unlabeled.optim import Optim


class Method(pl.LightningModule):
    """A self-supervised method.

    A subclass writes `loss`, and
      - `prepare` if a part's size depends on the data (memory bank, classifier),
      - `after_step` if the paper updates anything outside the gradient step.
    It inherits from this class only, never from another method.

    Args:
        backbone: maps images (B, 3, H, W), normalised, to features (B, backbone.dim).
        augment: maps (Batch, Draws) to a Batch with `views`, on the device, in batches.
        optim: builds the optimizer and its schedule from this module.
    """

    needs: frozenset[str] = frozenset({"crops", "index"})  # what `data` must give
    whole_weights: ClassVar[bool] = False  # whether it handles them itself: not in shards
    revisits: ClassVar[bool] = False  # keeps something of each image until it is met again
    pretext: ClassVar[bool] = False  # whether `measure` tells something: a task with an answer

    def __init__(self, backbone: nn.Module, augment: nn.Module, optim: Optim) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = int(backbone.dim)  # type: ignore[arg-type]
        self.augment = augment
        self.optim = optim
        self.seed = 0  # the data module's, from `setup` on
        self.step = 0  # batches drawn before this one, from the batch
        self.seen: dict[str, Tensor] = {}  # what callbacks watch: see `watch`
        self.backbone_config: dict[str, Any] | None = None  # kept in checkpoints
        self.run_identity: dict[str, Any] | None = None  # kept there too
        self.started = False  # whether a batch was learned from: before, sizes may not fit
        self._total_steps = 1
        self._prepared = False
        self.sharded = False  # whether weights lie in shards over the processes
        self._noted: dict[str, Tensor] | None = None  # while `measure` listens

    # What a paper fills in.

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of the objective; their sum is minimised, each is logged."""

    def prepare(self, count: int, classes: int) -> None:
        """Builds the parts whose size depends on the data, before any device is set up.

        Args:
            count: images in the training set; indices lie in [0, count).
            classes: number of labels, 0 if there are none.
        """

    def begin_epoch(self, epoch: int) -> Tensor | None:
        """Runs in every process before the first batch of an epoch of the data is read.

        The place for what is computed once per epoch (clusters). It runs again, for the same
        epoch, when a run goes on within it: what was computed must come from the checkpoint then.

        Args:
            epoch: passes over the training set before this one.

        Returns:
            Which images to read, in which order: indices (n,) on the CPU, n at least the images
            of all the epoch's batches. None: each image at most once, in random order.
        """

    def after_step(self) -> None:
        """Runs once after every optimizer update, however many batches it accumulated."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """What the report shows of the pretext task on images that were not learned from.

        Args:
            batch: augmented, with `views`; this module is in eval mode.

        Returns:
            Columns by title, (B, 3, h, w) each, floats in [0, 1]: a row is an image.
        """
        return {}

    # What a paper's file may use.

    @property
    def progress(self) -> float:
        """The share of training done, from 0 to 1."""
        return self.global_step / self._total_steps

    def draws(self, purpose: str, rows: int) -> Draws:
        """Random numbers for this step's `rows` rows of this process."""
        return Draws(
            self.seed, purpose, self.step, rows=rows, rank=dist.rank(), world=dist.world_size()
        )

    def shared_draws(self, purpose: str) -> Draws:
        """Random numbers of this step that are the same in every process (negatives)."""
        return Draws(self.seed, purpose, self.step)

    def note(self, name: str, value: Tensor) -> None:
        """Logs a number of this batch beside its loss: `train/accuracy`, `held_out/accuracy`."""
        if self._noted is None:
            self.log(f"train/{name}", self._everywhere(value))
        else:
            self._noted[name] = value

    def watch(self, *, features: Tensor | None = None, embeddings: Tensor | None = None) -> None:
        """Shows callbacks what this step computed, detached.

        Args:
            features: (B, backbone.dim), one row per image of the batch, in its order.
            embeddings: (B, D) what the loss compares, before any gathering.
        """
        given = {"features": features, "embeddings": embeddings}
        self.seen = {name: x.detach() for name, x in given.items() if x is not None}

    # How callbacks look at images that are not learned from.

    @torch.no_grad()
    def augmented(self, batch: Batch, key: int) -> Batch:
        """A batch of crops with its views and target; `key` fixes what is random."""
        rows = dict(rows=len(batch["index"]), rank=dist.rank(), world=dist.world_size())
        with torch.autocast(self.device.type, enabled=False):
            return self.augment(batch, Draws(self.seed, "held_out", key, **rows))

    @torch.no_grad()
    def measure(self, batch: Batch, key: int) -> dict[str, Tensor]:
        """Terms of the loss, and what it notes, of an augmented batch; nothing is learned.

        Args:
            batch: of `augmented`.
            key: stands for the step in what the loss draws.
        """
        training, step, seen = self.training, self.step, self.seen
        self._noted, self.step = {}, -1 - key  # no step of the training
        self.eval()
        try:
            return {**self.loss(batch), **self._noted}
        finally:
            self._noted, self.step, self.seen = None, step, seen
            self.train(training)

    # Lightning hooks, in the order they run.

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if missing := self.needs - data.gives:
            raise ValueError(
                f"{type(self).__name__} needs {sorted(missing)} in every batch; "
                f"the data gives {sorted(data.gives)}"
            )
        self.seed = data.seed
        if not self._prepared:
            # What was drawn before depends on the strategy: DDP seeds again when it starts.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.seed, "prepare"))
                self.prepare(data.count, len(data.classes))
            self._prepared = True
        self.to(memory_format=torch.channels_last)  # as the views are
        # Memories are equal everywhere already; to broadcast them costs their size every step.
        alike = [name for name, part in self.named_modules() if getattr(part, "alike", False)]
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.rpartition(".")[0] in alike
        ]

    def configure_model(self) -> None:
        if self.device_mesh is None or self.sharded:
            return  # only trainer=fsdp makes a mesh
        alone = type(self).begin_epoch is Method.begin_epoch and self.automatic_optimization
        if self.whole_weights or not alone:
            reason = "looks at images or gradients outside its training steps: use trainer=ddp"
            raise ValueError(f"{type(self).__name__}, unlike what trainer=fsdp trains, {reason}")
        units, mesh = getattr(self.backbone, "units", [self.backbone]), self.device_mesh
        dist.shard(self, units, mesh["data_parallel"], ("training_step", "measure"))
        self.sharded = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, here = checkpoint["state_dict"], dict(self.named_parameters())
        here |= dict(self.named_buffers())
        wrong = [
            f"{key}: {tuple(saved[key].shape)} in the checkpoint, {tuple(here[key].shape)} here"
            for key in sorted(saved.keys() & here.keys())
            if saved[key].shape != here[key].shape
        ]
        if wrong:
            raise ValueError(
                "the checkpoint was made with other sizes (other data, classes or widths):\n  "
                + "\n  ".join(wrong)
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.step = batch["step"]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            batch = self.augment(batch, self.draws("augment", len(batch["index"])))
        terms = taken_by(self.loss, batch)
        total = torch.stack([term.float() for term in terms.values()]).sum()
        for name, term in terms.items():
            self.note(name, term)
        self.log("train/loss", self._everywhere(total), prog_bar=True)
        self.started = True
        return total

    def _everywhere(self, x: Tensor) -> Tensor:
        """The mean of x over processes, at the updates that loggers see: it costs a message."""
        x = x.detach()
        if dist.world_size() == 1:
            return x
        every: int = getattr(self.trainer, "log_every_n_steps", 0)
        if not every or (self.trainer.global_step + 1) % every:
            return x
        return dist.reduce_sum(x) / dist.world_size()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        if (most := self.optim.clip_each) is not None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            norms = torch.stack(torch._foreach_norm(grads))
            factors = (most / norms.clamp(min=1e-12)).clamp(max=1.0)
            torch._foreach_mul_(grads, list(factors.unbind()))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_step()

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("a training must end: give trainer.max_epochs or trainer.max_steps")
        self._total_steps = max(1, int(steps))
        accumulated = self.trainer.accumulate_grad_batches
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batch_size = data.batch_size * accumulated
        per_epoch = max(1, math.ceil(data.count // data.batch_size / accumulated))
        return self.optim(
            self, batch_size=batch_size, steps=self._total_steps, steps_per_epoch=per_epoch
        )
