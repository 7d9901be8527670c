"""Two networks, of clips and of their sound, and projections of both into one space."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from unlabeled.dist import SyncBatchNorm
from unlabeled.spectrogram import LogSpectrogram

NORMS: dict[str, list[Callable[[int], nn.Module]]] = {
    "none": [],
    "batch": [nn.BatchNorm1d],
    "sync": [SyncBatchNorm],
}


class Hearing(nn.Module):
    """A network of sound: what it is given is samples, what its `network` sees a spectrogram.

    Args:
        network: of pictures of one channel.
        window: as in `LogSpectrogram`, with the following.
        hop: from frame to frame.
        floor: the least power.
        scale: what logarithms are divided by.
        range: that is kept below each sound's maximum; None: all.
        centred: to mean 0 and standard deviation 1.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        window: int = 512,
        hop: int = 240,
        floor: float = 1e-12,
        scale: float = 1.0,
        range: float | None = None,
        centred: bool = False,
    ) -> None:
        super().__init__()
        settings: dict[str, Any] = {"window": window, "hop": hop, "floor": floor, "scale": scale}
        settings |= {"range": range, "centred": centred}
        self.spectrogram, self.network = LogSpectrogram(**settings), network
        self.dim = int(network.dim)  # type: ignore[arg-type]
        inner = getattr(network, "config", None)
        target = "unlabeled.backbones.audio_video.Hearing"
        self.config = inner and {"_target_": target, "network": inner, **settings}

    def forward(self, audio: Tensor) -> Tensor:
        """Features (B, dim) of sounds (B, samples)."""
        return self.network(self.spectrogram(audio))

    def stages(self, audio: Tensor) -> dict[str, Tensor]:
        """The network's maps (B, C, h, w), whose rows are frequencies and columns times."""
        return self.network.stages(self.spectrogram(audio))  # type: ignore[operator]


class AudioVideo(nn.Module):
    """A network of clips (the features and stages), one of sound beside it, and projections.

    Args:
        video: of clips (B, T, 3, H, W) or pictures.
        sound: of samples (B, samples).
        hidden: widths of the projections' hidden layers.
        space: width of the space that both are projected into; None: there are no projections.
        norm: of the projections, after every layer: "none", "batch" or "sync". AVID has none, but
            embeddings of a young network all point the same way; a norm centres them, which short
            runs need.
    """

    def __init__(
        self,
        video: nn.Module,
        sound: nn.Module,
        *,
        hidden: Sequence[int] = (),
        space: int | None = 128,
        norm: Literal["none", "batch", "sync"] = "none",
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if (space is not None and space < 1) or min(hidden, default=1) < 1:
            raise ValueError(f"widths must be positive, got hidden={list(hidden)}, space={space}")
        self.video, self.sound, self.space = video, sound, space
        self.dim, heard = int(video.dim), int(sound.dim)  # type: ignore[arg-type]
        if space is not None:
            self.see = _head(self.dim, *hidden, space, norm=norm)
            self.listen = _head(heard, *hidden, space, norm=norm)
        parts = {"video": getattr(video, "config", None), "sound": getattr(sound, "config", None)}
        self.config: dict[str, Any] | None = None
        if all(parts.values()):
            target = "unlabeled.backbones.audio_video.AudioVideo"
            rest = {"hidden": list(hidden), "space": space, "norm": norm}
            self.config = {"_target_": target, **parts, **rest}

    def forward(self, x: Tensor) -> Tensor:
        return self.video(x)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """The maps of the network of clips."""
        return self.video.stages(x)  # type: ignore[operator]

    def hear(self, audio: Tensor) -> Tensor:
        """Features of sounds (B, samples)."""
        return self.sound(audio)

    def hear_stages(self, audio: Tensor) -> dict[str, Tensor]:
        """The maps of the network of sound."""
        return self.sound.stages(audio)  # type: ignore[operator]

    def embed(self, seen: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
        """(B, space) each: projections of features of clips and of sounds, not normalised."""
        return self.see(seen), self.listen(heard)


def _head(*widths: int, norm: str) -> nn.Sequential:
    """Linear layers with ReLU between them, and norms after them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), *(make(b) for make in NORMS[norm]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
