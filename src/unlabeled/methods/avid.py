"""Audio-Visual Instance Discrimination with Cross-Modal Agreement (AVID, AVID + CMA).

Morgado, Vasconcelos and Misra, CVPR 2021. https://arxiv.org/abs/2004.12943

    v_i = norm(g_v(f_v(clip))), a_i = norm(g_a(f_a(its sound))); V_i, A_i their memories
    N(x; M, i) = -log h(M_i.x) - sum_{j=1..K} log(1 - h(M_j.x)),  j uniform on the n - 1 others
    h(s) = exp(s / t) / (exp(s / t) + K E),  E = mean of exp(M_j.x / t) of the first batch, frozen
    cross:  L = 1/2 [N(v_i; A, i) + N(a_i; V, i)]
    within: L = 1/2 [N(v_i; V, i) + N(a_i; A, i)];  joint: the mean of both
    V_i <- norm(momentum V_i + (1 - momentum) v_i), A_i likewise

Cross-modal agreement (`agreement`), every few epochs on the whole bank:
    S_ij = min(V_i.V_j, A_i.A_j), P_i = the 32 others of highest S_ij (also max, V alone, A alone)
    N(x; M, P) = mean_{p in P} -log h(M_p.x) - sum_j log(1 - h(M_j.x))
    L = 1/2 L of AVID + 1/4 [N(v_i; V, P_i) + N(a_i; A, P_i)]
It starts from an AVID run (`source`), or after `agreement.alone` epochs of AVID by itself.

Official code (facebookresearch/AVID-CMA): agreement takes the first 64 of K negatives; these leave
out P_i but not i (here both); a row is believed its own nearest (here masked); CMA loses within's
terms (not here); one E for all terms (from memory; here one each: modalities may be exchanged).

Invariants: E = exp(s / t) for all s gives log(K + 1) + K log(1 + 1 / K), NPID's with Z = n E; S is
symmetric, with diagonal 1; P_i has neither i nor negatives; no gradient reaches a bank. Traps: clip
and sound of different times; banks not in checkpoints; E is frozen before the networks warm up, so
the scale of the loss says nothing.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.draws import Draws
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.agreement import Agreement, Bank, others
from unlabeled.parts.bank_nce import BankNCE
from unlabeled.parts.continued import continue_from
from unlabeled.parts.memory import MemoryBank
from unlabeled.parts.nce import unit_rows

CROSS, WITHIN = ("video_audio", "audio_video"), ("video_video", "audio_audio")
VARIANTS = {"cross": CROSS, "within": WITHIN, "joint": (*CROSS, *WITHIN)}  # who with whose memory


class AVID(Method):
    """AVID, and AVID + CMA, with the papers' numbers.

    Args:
        backbone: f and g of clips and sound: `backbone=audio_video`.
        augment: gives a view of clips, and sounds.
        optim: see `Method`.
        variant: "cross", "within" or "joint".
        negatives: K.
        temperature: t.
        momentum: of the banks, which `bank` makes: see `memory_bank`.
        agreement: its settings; null: AVID alone.
        source: what an AVID run ended with (networks, banks, E); null: nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"crops", "audio", "index"})
    revisits: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        variant: Literal["cross", "within", "joint"] = "cross",
        negatives: int = 1024,
        temperature: float = 0.07,
        momentum: float = 0.5,
        bank: Callable[[int, int, float], Bank] = MemoryBank,
        agreement: Agreement | None = None,
        source: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if not getattr(backbone, "space", None):
            raise ValueError("AVID needs projections of clips and of sound: backbone=audio_video")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if negatives < (least := 1 if agreement is None else agreement.negatives):
            raise ValueError(f"negatives must be at least {least}, got {negatives}")
        self.negatives, self.momentum, self.bank = negatives, momentum, bank
        self.agreement, self.source, self.agrees = agreement, source, False
        self.pairs = VARIANTS[variant]
        terms = [*self.pairs, *(() if agreement is None else ("video", "audio"))]
        self.nce = nn.ModuleDict({name: BankNCE(temperature) for name in terms})

    def prepare(self, count: int, classes: int) -> None:
        size = count, self.backbone.space, self.momentum
        self.video, self.audio = self.bank(*size), self.bank(*size)  # type: ignore[arg-type]
        self.video.fill(Draws(self.seed, "video memory"))
        self.audio.fill(Draws(self.seed, "audio memory"))
        if self.agreement is not None:
            self.agreement.prepare(count)
        if self.source is not None:
            continue_from(self.source, self, new=("agreement.", "nce.video.", "nce.audio."))

    def begin_epoch(self, epoch: int) -> None:
        if self.agreement is not None:
            first = self.agreement.alone if self.source is None else 0
            self.agrees = self.agreement.find(self.video, self.audio, epoch, first)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        (clip, sound), index, net = batch["views"], batch["index"], self.backbone
        h = net(clip)
        v, a = map(unit_rows, net.embed(h, net.hear(sound)))  # type: ignore[operator]
        x: dict[str, Tensor] = {"video": v, "audio": a}
        self.watch(features=h, embeddings=v)
        banks: dict[str, Bank] = {"video": self.video, "audio": self.audio}
        left_out, agreed = index[:, None], None
        if self.agreement is not None and self.agrees:
            agreed = self.agreement[index]
            left_out = torch.cat([left_out, agreed], 1)
        rows = others(self.draws("negatives", len(v)), self.video.size, self.negatives, left_out)
        negatives = {side: bank[rows] for side, bank in banks.items()}  # B K D
        terms: dict[str, Tensor] = {}
        for name, (one, other) in {pair: pair.split("_") for pair in self.pairs}.items():
            found = self.nce[name](x[one], banks[other][index[:, None]], negatives[other])
            terms[name] = found / len(self.pairs) / (1 if agreed is None else 2)
        for side, bank in banks.items():
            if self.agreement is not None and agreed is not None:
                some = negatives[side][:, : self.agreement.negatives]
                terms[f"agreement_{side}"] = self.nce[side](x[side], bank[agreed], some) / 4
            bank.update(index, x[side].detach())
        return terms
