"""Look, Listen and Learn: audio-visual correspondence (AVC, L3-Net; AVE-Net).

Arandjelovic and Zisserman, ICCV 2017. https://arxiv.org/abs/1705.08168
Objects that Sound (AVE-Net), ECCV 2018. https://arxiv.org/abs/1712.06651

    v = f(picture), a = g(log-spectrogram of one second of sound about it)
    positive: both of one recording; negative: the sound of one from another video
    fused:     logits = W2 relu(W1 [v, a])                                      (L3-Net)
    distance:  logits = w ||norm(P v) - norm(Q a)||_2 + b, P and Q two layers to 128  (AVE-Net)
    L = mean over positives and negatives, one to one, of CE(logits, same or not)

A picture's other sound is found by a shift through the global batch that is drawn for each step,
and on from there to the next of another video (`group`, where the data know what clips were cut
from). Where the batch has none, the picture has no negative.

Invariants: equal logits cost log 2; without sound (all zero) the answer depends on the picture
alone; a derangement of the sounds turns every positive into a negative. Traps: a negative from the
same video; volume or codec as a cue (`augment.gain`); silence (see `decode.sound.silence`); the
logarithm of zero; sounds at another rate than the network's.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch, denormalize, sources
from unlabeled.dist import gather, rank, world_size
from unlabeled.draws import to
from unlabeled.method import Method
from unlabeled.optim import Optim
from unlabeled.parts.mlp import mlp
from unlabeled.parts.precision import full_precision
from unlabeled.parts.sounding import Projections, distances, nearness, overlay
from unlabeled.parts.sources import another, several


class AVC(Method):
    """Tells whether a picture and a sound belong together.

    Args:
        backbone: f, of pictures.
        augment: gives a view of pictures and one of spectrograms.
        optim: see `Method`.
        sound: g, of spectrograms (B, 1, bins, frames), with `.dim`; None: what the backbone hears.
        head: "fused" (L3-Net) or "distance" (AVE-Net).
        dim: width of the hidden layer, or of P and Q, if they are not the backbone's (`space`).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"crops", "audio", "index"})
    pretext: ClassVar[bool] = True

    def __init__(
        self,
        backbone: nn.Module,
        augment: nn.Module,
        optim: Optim,
        *,
        sound: nn.Module | None,
        head: Literal["fused", "distance"] = "fused",
        dim: int = 128,
    ) -> None:
        super().__init__(backbone, augment, optim)
        if head not in ("fused", "distance"):
            raise ValueError(f"head must be fused or distance, got {head!r}")
        if sound is None and not hasattr(backbone, "hear"):
            raise ValueError("sound=null needs a backbone that hears: backbone=look_listen_pair")
        self.sound, self.kind = sound, head
        heard: int = (backbone.sound if sound is None else sound).dim  # type: ignore[assignment]
        projects = sound is None and getattr(backbone, "space", None)
        if projects and head == "fused":
            raise ValueError("backbone.space is for method.head=distance: choose null, got fused")
        if head == "fused":
            self.head: nn.Module = mlp(self.feature_dim + heard, dim, 2, norm="none")
        else:
            self.pair = None if projects else Projections(self.feature_dim, heard, dim)
            self.head = nearness()

    def setup(self, stage: str) -> None:
        several(self.trainer, stage)
        super().setup(stage)

    def listen(self, x: Tensor) -> Tensor:
        """(B, E) of spectrograms, or of sounds where the backbone hears."""
        return (self.sound or self.backbone.hear)(x)  # type: ignore[operator]

    def logits(self, v: Tensor, a: Tensor) -> Tensor:
        """(B, 2): other, same; of features (B, D) and (B, E)."""
        if self.kind == "fused":
            return self.head(torch.cat([v, a], dim=1))
        v, a = (self.pair or self.backbone).embed(v, a)  # type: ignore[operator]
        return self.head(distances(v, a)[:, None])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        picture, spectrogram = batch["views"]
        v, a = self.backbone(picture), self.listen(spectrogram)
        self.watch(features=v)
        own, others = sources(batch), gather(a)
        shift = 1 + self.shared_draws("shift").integers(max(1, len(others) - 1))
        start = to(rank() * len(a) + torch.arange(len(a)) + shift, a.device)
        place, found = another(own, gather(own), start)
        logits = torch.cat([self.logits(v, a), self.logits(v, others[place])])
        target = torch.arange(2, device=a.device).flip(0).repeat_interleave(len(a))
        counts = torch.cat([torch.ones_like(found), found]).float()
        right = (logits.argmax(1) == target).float()
        total = gather(counts).sum().clamp(min=1) / world_size()  # of this process's share
        self.note("accuracy", (right * counts).sum() / total)
        each = full_precision(F.cross_entropy)(logits, target, reduction="none")
        return {"correspondence": (each * counts).sum() / total}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Where in the picture the sound might come from: its own, and another's."""
        (picture, spectrogram), own = batch["views"], sources(batch)
        shown, a = denormalize(picture).clamp(0, 1), self.listen(spectrogram)
        place, _ = another(own, own, torch.arange(len(own), device=own.device) + 1)
        heard = {"its sound": a, "another's": a[place]}
        maps = {name: overlay(shown, self.localise(picture, x)) for name, x in heard.items()}
        return {"picture": shown, **maps}

    def localise(self, picture: Tensor, a: Tensor) -> Tensor:
        """(B, h, w): how well each place's features alone go with sounds (B, E)."""
        maps = list(self.backbone.stages(picture).values())[-1]  # type: ignore[operator]
        if maps.shape[1] != self.feature_dim:
            raise ValueError("the last stage's channels are not the backbone's features")
        b, _, h, w = maps.shape
        places = maps.permute(0, 2, 3, 1).flatten(0, 2)
        logits = self.logits(places, a.repeat_interleave(h * w, 0))
        return (logits[:, 1] - logits[:, 0]).view(b, h, w)
