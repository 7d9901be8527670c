"""Probes that watch how useful features become while a method trains, and never touch it."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled import dist
from unlabeled.batch import Batch
from unlabeled.callbacks.metrics import record
from unlabeled.draws import seed_of, subset
from unlabeled.evaluate.accuracy import label_rank
from unlabeled.evaluate.contract import none_to_choose_on
from unlabeled.evaluate.frozen import frozen
from unlabeled.evaluate.knn import search, vote
from unlabeled.evaluate.store import images
from unlabeled.fsdp import FullyShard

BATCH = 256  # images per forward of the kNN probe


class OnlineKNN(pl.Callback):
    """Logs `online/knn_top1`: weighted kNN on the held-out split of the training set.

    Neighbours come from the rest of the training set; the test set is not read.

    Args:
        every_n_epochs: how often.
        k: neighbours, or all images of the bank where it has fewer.
        temperature: t of the weights exp(s / t).
        limit: images of the bank, and queries, at most; balanced over classes.
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        k: int = 20,
        temperature: float = 0.07,
        limit: int = 2000,
    ) -> None:
        if min(every_n_epochs, k, limit) < 1:
            raise ValueError(
                "every_n_epochs, k and limit must be at least 1, "
                f"got {every_n_epochs}, {k} and {limit}"
            )
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.every_n_epochs, self.k, self.temperature = every_n_epochs, k, temperature
        self.limit = limit

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FullyShard):  # the first process would wait for others
            raise ValueError(
                "callbacks=online_knn needs whole weights, and trainer=fsdp has none during "
                "training: leave it out, or use trainer=ddp"
            )
        _need_labels(trainer, pl_module, self)
        if reason := none_to_choose_on(_data(trainer)):
            raise ValueError(f"callbacks=online_knn has no queries: {reason}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0 and dist.rank() == 0:
            top1 = self.score(pl_module.backbone, _data(trainer))  # type: ignore[arg-type]
            record(trainer, {"online/knn_top1": top1})

    def score(self, backbone: nn.Module, data: Any) -> float:
        """Accuracy in [0, 1] of a backbone as it is now, which is left as it is."""
        labels = data.labels("train")
        bank, queries = (
            rows[subset(labels[rows].tolist(), len(rows), self.limit, data.seed, "online_knn")]
            for rows in (part.sort().values for part in data.selection())
        )
        # Loaders may draw from torch's global generator; the method shall not notice.
        with torch.random.fork_rng(devices=[]), frozen(backbone):
            known, asked = (_features(backbone, data, rows) for rows in (bank, queries))
        similarity, near = search(asked, known, min(self.k, len(bank)), device=known.device)
        classes = max(len(data.classes), int(labels.max()) + 1)
        votes = vote(similarity, labels[bank][near], classes, self.temperature)
        return (label_rank(votes, labels[queries]) == 0).double().mean().item()


def _features(backbone: nn.Module, data: Any, rows: Tensor) -> Tensor:
    """What forward makes of the training images at sorted positions."""
    breaks = (rows.diff() != 1).nonzero().flatten() + 1
    device = next(backbone.parameters()).device
    waiting: list[Tensor] = []
    done: list[Tensor] = []
    for run in torch.tensor_split(rows, breaks.tolist()):
        scan = data.scan("train", int(run[0]), int(run[-1]) + 1, batch_size=BATCH)
        waiting += [batch["crops"][0] for batch in scan]
        if run[-1] == rows[-1] or sum(map(len, waiting)) >= BATCH:
            pieces = torch.cat(waiting).split(BATCH)
            done += [backbone(images(piece, device)).float() for piece in pieces]
            waiting = []
    return torch.cat(done)


class OnlineLinear(pl.Callback):
    """Logs `online/linear_top1`: a linear classifier that learns along with the method.

    It has its own optimizer, works on detached features of the training views, normalised per
    batch, and is scored on every batch before it learns from it. Several processes average
    their gradients. It comes back from checkpoints.

    Args:
        lr: of SGD with momentum.
        momentum: of SGD.
    """

    def __init__(self, *, lr: float = 0.1, momentum: float = 0.9) -> None:
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        self.lr, self.momentum = lr, momentum
        self.head: nn.Linear | None = None
        self.optimizer: torch.optim.SGD | None = None
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        labels = _need_labels(trainer, pl_module, self)
        if self.head is None:
            data = _data(trainer)
            classes = max(len(data.classes), int(labels.max()) + 1)
            dim: int = pl_module.backbone.dim  # type: ignore[assignment]
            # An ordinary layer would draw its weights from torch's global generator.
            self.head = nn.Linear(dim, classes, device="meta").to_empty(device="cpu")
            generator = torch.Generator().manual_seed(seed_of(data.seed, "online_linear"))
            nn.init.normal_(self.head.weight, std=0.01, generator=generator)
            nn.init.zeros_(self.head.bias)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.head is not None  # setup ran
        self.head.to(pl_module.device)
        self.optimizer = torch.optim.SGD(self.head.parameters(), lr=self.lr, momentum=self.momentum)
        if self._saved:  # Lightning hands a checkpoint over before parameters have their device
            self.head.load_state_dict(self._saved["head"])
            self.optimizer.load_state_dict(self._saved["optimizer"])
            self._saved = {}

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        method = type(pl_module).__name__
        features: Tensor | None = getattr(pl_module, "seen", {}).get("features")
        if features is None:
            raise ValueError(f"{method} shows no features: it must call watch(features=...)")
        if "label" not in batch:
            raise ValueError(f"the batches of {method} have no labels for the linear probe")
        if len(features) != len(batch["label"]):
            raise ValueError(
                f"{method} shows {len(features)} rows of features for {len(batch['label'])} "
                "images: watch(features=...) takes one row per image"
            )
        top1 = self.learn(features, batch["label"])
        pl_module.log("online/linear_top1", top1, batch_size=len(features))

    def learn(self, features: Tensor, labels: Tensor) -> Tensor:
        """Accuracy in [0, 1] on a batch, and one update on it."""
        assert self.head is not None
        assert self.optimizer is not None
        with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
            logits = self.head(_normalised(features.detach().float()))
            loss = F.cross_entropy(logits, labels)
            grads = torch.autograd.grad(loss, list(self.head.parameters()))
        for p, grad in zip(self.head.parameters(), grads, strict=True):
            p.grad = dist.reduce_sum(grad) / dist.world_size()
        top1 = (label_rank(logits.detach(), labels) == 0).float().mean()
        self.optimizer.step()
        return top1

    def state_dict(self) -> dict[str, Any]:
        if self.head is None or self.optimizer is None:
            return self._saved
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict


def _normalised(x: Tensor) -> Tensor:
    """Zero mean and unit variance of every feature (B, D) over the global batch."""
    count = len(x) * dist.world_size()
    mean = dist.reduce_sum(x.sum(0)) / count
    var = dist.reduce_sum((x - mean).square().sum(0)) / count
    return (x - mean) * (var + 1e-5).rsqrt()


def _data(trainer: pl.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]


def _need_labels(trainer: pl.Trainer, pl_module: pl.LightningModule, probe: pl.Callback) -> Tensor:
    labels = _data(trainer).labels("train")
    if labels is None:
        raise ValueError(
            f"{type(probe).__name__} needs labels to probe {type(pl_module).__name__}, and the "
            "data have none: leave the callback out"
        )
    return labels
