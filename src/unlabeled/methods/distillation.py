"""Distilling the Knowledge in a Neural Network.

Hinton, Vinyals and Dean, NeurIPS Deep Learning Workshop 2014. https://arxiv.org/abs/1503.02531

    p = softmax(s / T) of the student, q = softmax(t / T) of a frozen teacher, on the same view
    L = (1 - alpha) T^2 KL(q || p) + alpha CE(s, y)
    dL/ds = (1 - alpha) T (p - q) for each image, where alpha = 0

T^2 keeps the size of gradients when T changes. Without a teacher, q is uniform: label smoothing,
the simplest form. Then L = (1 - smoothing) CE(s, y) + smoothing CE(s, q), which is PyTorch's
cross-entropy with `label_smoothing`; it is no KL, and so larger by a constant.

ClusterFit's second control (https://arxiv.org/abs/1912.03330): the same student on the same images
learns the distribution over the teacher's classes; ClusterFit does not care for its label space.
T and alpha are not known there; Hinton's T lies between 1 and 20 (from memory). Traps: a teacher
in training mode, no T^2, gradients into the teacher.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.frozen import Frozen
from unlabeled.parts.precision import full_precision


@full_precision
def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the mean KL(softmax(t / T) || softmax(s / T)) of logits (B, C)."""
    p, q = ((x / temperature).log_softmax(1) for x in (student, teacher))
    return temperature**2 * (q.exp() * (q - p)).sum(1).mean()


@full_precision
def smoothing_loss(student: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C) with the uniform distribution."""
    return -student.log_softmax(1).mean()


class Distillation(Method):
    """Knowledge distillation of a classifier.

    Args:
        backbone: the student's, at random initialisation.
        augment: gives one view.
        optim: see `Method`.
        teacher: a backbone whose features are logits; null for a uniform one.
        temperature: T.
        alpha: weight of the true labels, from 0, which needs none, to 1.
        smoothing: without a teacher, the share of the uniform distribution, in place of alpha.
    """

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        teacher: nn.Module | None,
        temperature: float = 4.0,
        alpha: float = 0.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        for name, share in (("alpha", alpha), ("smoothing", smoothing)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        if (teacher is not None and smoothing) or (teacher is None and alpha):
            raise ValueError(
                f"smoothing={smoothing} takes the place of alpha={alpha} where there is no "
                "teacher: set the other to 0"
            )
        if teacher is not None and not getattr(teacher, "logits", False):
            name = type(teacher).__name__
            raise ValueError(f"{name} gives features, not logits: set method.teacher.logits=true")
        self.teacher = None if teacher is None else Frozen(teacher)
        self.classes = 0 if teacher is None else int(teacher.dim)  # type: ignore[arg-type]
        self.temperature, self.smoothing = temperature, smoothing
        self.alpha = alpha if teacher is not None else 1 - smoothing
        self.head: nn.Module = nn.Identity()  # until the number of classes is known

    def prepare(self, count: int, classes: int) -> None:
        if self.alpha and not classes:
            raise ValueError(f"alpha={self.alpha:g} needs labels, the data have none: set it to 0")
        if self.alpha and self.classes not in (0, classes):
            raise ValueError(
                f"the teacher knows {self.classes} classes and the data have {classes}: "
                "learn from the teacher alone, alpha=0"
            )
        self.head = nn.Linear(self.feature_dim, self.classes or classes)

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.on(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved, here = checkpoint["teacher"], self._record()
        if saved["checksum"] != here["checksum"]:
            raise ValueError(f"the run had another teacher: {saved} in the checkpoint, {here} here")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["teacher"] = self._record()

    def _record(self) -> dict[str, Any]:
        return {"checksum": None} if self.teacher is None else self.teacher.record()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (x,) = batch["views"]
        h = self.backbone(x)
        s = self.head(h)
        self.watch(features=h)
        if self.teacher is None:
            soft, answer = smoothing_loss(s), batch["label"]
        else:
            with torch.no_grad():
                t = self.teacher.network(x)
            soft, answer = distillation_loss(s, t, self.temperature), t.argmax(1)
        self.note("accuracy", (s.argmax(1) == answer).float().mean())
        terms = {"soft": (1 - self.alpha) * soft}
        if self.alpha:
            terms["hard"] = self.alpha * F.cross_entropy(s.float(), batch["label"])
        return terms
