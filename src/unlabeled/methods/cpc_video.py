"""Contrastive Predictive Coding over time: near moments of a recording against far ones.

van den Oord, Li and Vinyals, 2018. https://arxiv.org/abs/1807.03748 (on sound: a GRU, 12 steps)

    z_bt = f(frame t of clip b),  c_bt = g(z_b1, ..., z_bt)
    L    = mean over k = 1..K of L_k
    L_k  = mean over (b, t <= T - k) of -log exp(z_b,t+k . W_k c_bt) / sum_j exp(z_j . W_k c_bt)
    j:     all frames of all clips of the global batch, or the right one and `negatives` drawn ones

What is near in time is related and what is far, or in another recording, is not: the lectures'
reading of CPC. The paper has no experiment on video; its recipe for sound is what is followed here:
bilinear scores, nothing of unit length, no temperature. Ours: W_k starts small, as scores of wide
features would be huge; `side` lets frames keep places, in which motion shows.

Invariants: W_k = 0 costs log(candidates); c_bt and what is predicted from it stay the same, bit for
bit, when later frames change (in eval mode: batch norm of f mixes frames, `backbone.norm=group`
does not); step k has B (T - k) terms. Traps: a context that sees its target; frames of a clip under
crops of their own, which name the frame (one draw holds for a clip); the positive among the drawn
negatives; the same recording twice in a batch.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch, denormalize
from unlabeled.dist import gather, rank
from unlabeled.draws import to
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.causal import Memory, Past
from unlabeled.parts.choice import choice
from unlabeled.parts.places import Places
from unlabeled.parts.precision import full_precision


class CPCVideo(Method):
    """Predicts the features of later frames of a clip.

    Args:
        backbone: f, of single frames.
        augment: gives clips (B, T, 3, H, W).
        optim: see `Method`.
        side: see `Places`: z keeps places, this many a side; null: the backbone's features.
        widths: of layers with ReLU between these and z; none: they are z.
        context: g: "gru", "conv" or "none" (the frame alone).
        dim: width of the contexts.
        blocks: layers of g.
        steps: K.
        negatives: drawn for each term; 0: all other frames of the global batch.
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
        negatives: int = 0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if steps < 1 or negatives < 0 or (chunk is not None and chunk < 1):
            least = "steps and chunk must be at least 1, negatives 0"
            raise ValueError(f"{least}, got {steps=}, {chunk=}, {negatives=}")
        self.negatives, self.chunk = negatives, chunk
        self.places = Places(self.feature_dim, side=side, widths=widths)
        self.past = Past(self.places.dim, context, dim=dim, blocks=blocks)
        width = self.places.dim
        self.predict = nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(steps))
        for layer in self.predict:
            nn.init.normal_(layer.weight, std=(dim * width) ** -0.5)  # type: ignore[arg-type]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        features, z = self._embedded(batch)
        self.watch(features=features.mean(1), embeddings=z.flatten(0, 1))
        c, keys = self.past(z), full_precision(gather)(z)
        place = torch.arange(keys.shape[:2].numel(), device=z.device).view(keys.shape[:2])
        place, keys = place[rank() * len(z) : (rank() + 1) * len(z)], keys.flatten(0, 1)
        found = []
        for k, predict in enumerate(self.predict, 1):
            queries, own = predict(c[:, :-k]).flatten(0, 1), place[:, k:].flatten()
            others = self._drawn(k, len(z), own, len(keys))
            found.append(choice(queries, keys, own, others, self.chunk))
        loss, right = torch.stack(found).mean(0)
        self.note("accuracy", right.detach())
        return {"prediction": loss}

    def _drawn(self, k: int, rows: int, own: Tensor, count: int) -> Tensor | None:
        """(Q, negatives) of `count` frames for each of Q terms, with replacement, never its own."""
        if not self.negatives:
            return None
        shape = (len(own) // rows, self.negatives)
        drawn = self.draws(f"negatives {k}", rows).integers(count - 1, *shape)
        drawn = to(drawn, own.device).flatten(0, 1)
        return drawn + (drawn >= own[:, None]).long()

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The last frame that is seen, the last that is predicted, and the one taken for it."""
        steps, (clips,) = len(self.predict), batch["views"]
        _, z = self._embedded(batch)
        p = self.predict[-1](self.past(z)[:, -1 - steps])
        answer = (p @ z.flatten(0, 1).T).argmax(1)
        shown = denormalize(clips).clamp(0, 1)
        columns = {"now": shown[:, -1 - steps], f"{steps} later": shown[:, -1]}
        return {**columns, "the answer": shown.flatten(0, 1)[answer]}

    def _embedded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (B, T, dim) and z (B, T, D) of the frames of clips."""
        (clips,) = batch["views"]  # B T 3 H W
        if clips.ndim != 5 or clips.shape[1] <= len(self.predict):
            raise ValueError(
                f"steps={len(self.predict)} are predicted in clips of more frames than that, got "
                f"views {tuple(clips.shape)}: choose decode=clip with more decode.frames"
            )
        x = clips.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features, z = self.places(self.backbone, x)
        return features.unflatten(0, clips.shape[:2]), z.unflatten(0, clips.shape[:2])
