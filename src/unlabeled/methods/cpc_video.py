"""Contrastive Predictive Coding over time: near moments of a recording against far ones.

van den Oord, Li and Vinyals, 2018. https://arxiv.org/abs/1807.03748 (on sound: a GRU, 12 steps)

    z_bt = f(frame t of clip b),  c_bt = g(z_b1, ..., z_bt)
    L    = mean over k = 1..K of L_k
    L_k  = mean over (b, t <= T - k) of -log exp(z_b,t+k . W_k c_bt) / sum_j exp(z_j . W_k c_bt)
    j:     all frames of the global batch, or of the clip, or the right one and drawn `negatives`

Near in time is related, far away or in another recording is not: the lectures' reading. The paper
has no experiment on video; what is followed is its recipe for sound: bilinear scores, nothing of
unit length, no temperature. Ours: W_k starts small, or scores of wide features would be huge.

Invariants: W_k = 0 costs log(candidates); predictions stay the same, bit for bit, when later frames
change (without batch norm, which mixes frames). Traps: a context that sees its target; frames under
crops of their own, which name them; the positive among drawn negatives; a recording drawn twice.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch, denormalize
from unlabeled.dist import gather, rank
from unlabeled.draws import to
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.causal import Memory, Past
from unlabeled.parts.choice import choice, companions
from unlabeled.parts.places import Places
from unlabeled.parts.precision import full_precision


class CPCVideo(Method):
    """Predicts the features of later frames of a clip.

    Args:
        backbone: f, of single frames.
        augment: gives clips (B, T, 3, H, W).
        optim: see `Method`.
        side: see `Places`: z keeps so many places a side; null: the backbone's features.
        widths: of layers with ReLU between these and z.
        context: g: "gru", "conv" or "none" (the frame alone).
        dim: width of the contexts.
        blocks: layers of g.
        steps: K.
        among: "batch", or "clip": only a clip's frames compete, and moments have to be told apart.
        negatives: drawn for each term; 0: all other frames of these.
        chunk: queries whose scores exist at a time, see `choice`; the loss is the same.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"crops", "index", "frames"})
    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        side: int | None = None,
        widths: Sequence[int] = (),
        context: Memory = "gru",
        dim: int = 256,
        blocks: int = 1,
        steps: int = 3,
        among: Literal["batch", "clip"] = "batch",
        negatives: int = 0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if steps < 1 or negatives < 0 or (chunk is not None and chunk < 1):
            raise ValueError(f"need 1 or more, negatives 0, got {steps=}, {chunk=}, {negatives=}")
        if among == "clip" and negatives:
            raise ValueError(f"among=clip takes all frames of a clip: {negatives=} must be 0")
        self.among, self.negatives, self.chunk = among, negatives, chunk
        self.places = Places(self.feature_dim, side=side, widths=widths)
        self.past = Past(self.places.dim, context, dim=dim, blocks=blocks)
        dims = dim, self.places.dim
        self.predict = nn.ModuleList(nn.Linear(*dims, bias=False) for _ in range(steps))
        for weight in self.predict.parameters():
            nn.init.normal_(weight, std=weight.numel() ** -0.5)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        features, z = self._embedded(batch)
        self.watch(features=features.mean(1), embeddings=z.flatten(0, 1))
        c, keys = self.past(z), full_precision(gather)(z)
        place = torch.arange(z.shape[:2].numel(), device=z.device).view(z.shape[:2])
        place, keys = place + rank() * place.numel(), keys.flatten(0, 1)
        found = []
        for k, predict in enumerate(self.predict, 1):
            queries, own = predict(c[:, :-k]).flatten(0, 1), place[:, k:].flatten()
            rivals = self._rivals(k, z, own, len(keys))
            found.append(choice(queries, keys, own, rivals, self.chunk))
        loss, wins = torch.stack(found).mean(0)
        self.note("accuracy", wins.detach())
        return {"prediction": loss}

    def _rivals(self, k: int, z: Tensor, own: Tensor, count: int) -> Tensor | None:
        """(Q, negatives) of `count` frames for each of Q terms, with replacement, never its own."""
        if self.among == "clip" or not self.negatives:
            return companions(own, z.shape[1]) if self.among == "clip" else None
        shape = (len(own) // len(z), self.negatives)
        drawn = self.draws(f"negatives {k}", len(z)).integers(count - 1, *shape)
        drawn = to(drawn, own.device).flatten(0, 1)
        return drawn + (drawn >= own[:, None]).long()

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The last frame that is seen, the last that is predicted, and the one taken for it."""
        steps, (clips,), (_, z) = len(self.predict), batch["views"], self._embedded(batch)
        p = self.predict[-1](self.past(z)[:, -1 - steps])
        shown = denormalize(clips).clamp(0, 1)
        scores = p @ z.flatten(0, 1).T
        if self.among == "clip":
            same = torch.eye(len(z), device=z.device).repeat_interleave(z.shape[1], 1)
            scores = scores.masked_fill(same == 0, -torch.inf)
        answered = shown.flatten(0, 1)[scores.argmax(1)]
        return {"now": shown[:, -1 - steps], f"{steps} later": shown[:, -1], "answer": answered}

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, T, dim) and z (B, T, D) of the frames of clips."""
        (clips,) = batch["views"]  # B T 3 H W
        steps = len(self.predict)
        if clips.ndim != 5 or clips.shape[1] <= steps:
            got = f"got views {tuple(clips.shape)}: choose decode=clip with more decode.frames"
            raise ValueError(f"{steps=} are predicted in clips of more frames, {got}")
        x = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return tuple(h.unflatten(0, clips.shape[:2]) for h in self.places(self.backbone, x))
