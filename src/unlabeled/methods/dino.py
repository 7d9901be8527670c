"""Emerging Properties in Self-Supervised Vision Transformers (DINO).

Caron, Touvron, Misra, Jegou, Mairal, Bojanowski and Joulin, ICCV 2021.
https://arxiv.org/abs/2104.14294

    s, t = K logits of student and teacher: backbone, MLP, L2, linear layer with rows of norm 1
    L    = mean over global crops a and other crops v of -sum P_t(a) log P_s(v), 18 of 2 + 8
    P_s  = softmax(s / tau_s), P_t = softmax((t - c) / tau_t), t and c without gradient
    c    <- m_c c + (1 - m_c) mean of t over both global crops of the global batch, after L
    t    <- m t + (1 - m) s, weights, after the update; m goes to 1 along a cosine

From memory: the official code evaluates the teacher, has batch norm in the head with ResNets only,
learns the rows' norms for ViT-S (`norm_last=False`), moves tau_t by epochs (here by steps), and
clips each parameter's gradient alone (`optim.clip_each=3`). Crops of one size are one forward.
Invariants: equal logits give log K, a constant on t and c changes nothing, neither has a gradient.
Traps: c no buffer, or of one process; a crop against itself; positions not resized for small crops.
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import reduce_sum, world_size
from unlabeled.method import Method
from unlabeled.optim import Optim, cosine
from unlabeled.parts import ema
from unlabeled.parts.dino_head import Head
from unlabeled.parts.drop_path import drop_path_in, feed
from unlabeled.parts.precision import full_precision
from unlabeled.parts.views import embed


@full_precision
def dino_loss(
    teacher: Sequence[Tensor], student: Sequence[Tensor], centre: Tensor, tau_t: float, tau_s: float
) -> Tensor:
    """L of logits (B, K): the teacher's of global crops, the student's of these, then others."""
    log_p = [(s / tau_s).log_softmax(1) for s in student]
    codes = [((t.detach() - centre.detach()) / tau_t).softmax(1) for t in teacher]
    pairs = [(q, p) for a, q in enumerate(codes) for v, p in enumerate(log_p) if v != a]
    return torch.stack([-(q * p).sum(1).mean() for q, p in pairs]).mean()


class DINO(Method):
    """DINO with the paper's ImageNet numbers.

    Args:
        backbone: of student and teacher.
        augment: gives two global crops first, then any number of local ones.
        optim: see `Method`.
        outputs: K.
        hidden: width of the head's hidden layers; `bottleneck` is that of what it normalises.
        tau_s: the student's temperature.
        tau_t: the teacher's, which rises linearly from `tau_t_start` in the share `warmup`.
        momentum: m at the start; `centre_momentum` is m_c.
        freeze: share of training during which the head's last layer does not move.
        drop_path: rate of the student's stochastic depth; 0.1 with the paper's ViTs.
        norm: batch norm of the head: "none", "batch", or "sync" over processes.
        norm_last: keep the last layer's rows at norm 1.
        evaluate: which of the two is the run's backbone.
    """

    centre: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        outputs: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        tau_s: float = 0.1,
        tau_t: float = 0.07,
        tau_t_start: float = 0.04,
        warmup: float = 0.0375,
        momentum: float = 0.996,
        centre_momentum: float = 0.9,
        freeze: float = 0.00125,
        drop_path: float = 0.0,
        norm: str = "none",
        norm_last: bool = True,
        evaluate: Literal["teacher", "student"] = "teacher",
    ) -> None:
        super().__init__(backbone, augment, optim)
        if min(tau_s, tau_t, tau_t_start) <= 0:
            raise ValueError(f"must be positive: {tau_s=}, {tau_t=}, {tau_t_start=}")
        if min(momentum, centre_momentum) < 0 or max(momentum, centre_momentum) > 1:
            raise ValueError(f"must lie in [0, 1]: {momentum=}, {centre_momentum=}")
        if evaluate not in ("teacher", "student"):
            raise ValueError(f"evaluate must be teacher or student, got {evaluate!r}")
        self.tau_s, self.tau_t, self.tau_t_start, self.warmup = tau_s, tau_t, tau_t_start, warmup
        self.momentum, self.centre_momentum, self.frozen = momentum, centre_momentum, freeze
        self.twin, self.evaluate = copy.deepcopy(backbone), evaluate  # twin: the other one
        pair = (self.backbone, self.twin)
        self.head = Head(self.feature_dim, hidden, bottleneck, outputs, norm=norm, fixed=norm_last)
        self.networks = pair[::-1] if evaluate == "teacher" else pair  # student, teacher
        drop_path_in(self.networks[0], drop_path)
        self.teacher_head = copy.deepcopy(self.head)
        nn.Sequential(self.networks[1], self.teacher_head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(outputs))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        views, (student, teacher) = batch["views"], self.networks
        feed(student, self.draws("drop_path", len(views[0])))
        z = self.head.embed(torch.cat(h := embed(student, views, joint=True)))
        s = self.head.last(z).chunk(len(views))
        with torch.no_grad():
            t = self.teacher_head(torch.cat(h_t := embed(teacher, views[:2], joint=True)))
        shown = h_t[0] if self.evaluate == "teacher" else h[0]
        self.watch(features=shown, embeddings=z[: len(shown)])
        share = min(1.0, self.progress / self.warmup) if self.warmup else 1.0
        tau_t = self.tau_t_start + share * (self.tau_t - self.tau_t_start)
        loss = dino_loss(t.chunk(2), s, self.centre, tau_t, self.tau_s)
        mean = reduce_sum(t.to(self.centre.dtype).mean(0)) / world_size()
        self.centre.lerp_(mean, 1 - self.centre_momentum)
        return {"distillation": loss}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.progress < self.frozen:
            self.head.last.weight.grad = self.head.last.scale.grad = None

    def after_step(self) -> None:
        (student, teacher), m = self.networks, cosine(self.momentum, 1.0, self.progress)
        ema.update(nn.Sequential(teacher, self.teacher_head), (student, self.head), m)
