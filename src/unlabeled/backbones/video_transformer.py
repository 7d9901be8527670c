"""Vision transformers over cubes of space and time (Tong et al., 2022; Arnab et al., 2021)."""

from typing import Any

import torch
from torch import Tensor, nn


class VideoTransformer(nn.Module):
    """A plain transformer whose tokens are cubes of a clip; all of them attend to one another.

    Positions are sines and cosines of a token's number, which counts through columns, rows and
    time in this order. Pre-norm blocks with GELU and hidden layers of 4 * dim. A picture is a clip
    that stands still for the length of one cube. The features are the mean of the tokens, normed.

    Args:
        patch: side of a cube in pixels.
        tubelet: frames of a cube.
        dim: width.
        depth: blocks.
        heads: of attention.
    """

    def __init__(
        self, *, patch: int = 16, tubelet: int = 2, dim: int = 768, depth: int = 12, heads: int = 12
    ) -> None:
        super().__init__()
        if min(patch, tubelet, dim, depth, heads) < 1:
            raise ValueError(f"sizes must be at least 1: {patch=} {tubelet=} {dim=} {depth=}")
        if dim % heads or dim % 2:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads} and of 2")
        self.config: dict[str, Any] = {
            "_target_": "unlabeled.backbones.video_transformer.VideoTransformer",
            **{"patch": patch, "tubelet": tubelet, "dim": dim, "depth": depth, "heads": heads},
        }
        self.patch, self.tubelet, self.dim = patch, tubelet, dim
        self.embed = nn.Conv2d(3 * tubelet, dim, patch, patch)  # frames of a cube as channels
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                *(dim, heads, 4 * dim),
                dropout=0.0,
                activation="gelu",
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    @property
    def units(self) -> list[nn.Module]:
        """What is gathered at a time where weights are sharded: the blocks."""
        return list(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, dim) of clips (B, T, 3, H, W) or pictures (B, 3, H, W)."""
        return self.stages(x)["head"].flatten(1)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, dim, h, w) behind every block, averaged over time, and `head`, the features."""
        if x.ndim == 4:
            x = x[:, None].expand(-1, self.tubelet, -1, -1, -1)
        tokens, maps = self._embedded(x), {}
        rows = x.shape[3] // self.patch
        for i, block in enumerate(self.blocks, 1):
            tokens = block(tokens)
            grid = tokens.unflatten(1, (x.shape[1] // self.tubelet, rows, -1)).mean(1)
            maps[f"block{i}"] = grid.permute(0, 3, 1, 2)
        return maps | {"head": self.norm(tokens).mean(1)[:, :, None, None]}

    def visible(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, dim) and tokens (B, n, dim) of some cubes, as if alone.

        Args:
            x: clips (B, T, 3, H, W).
            kept: (B, n) int64, the cubes that each clip's tokens are made of.
        """
        tokens = self._embedded(x)
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, self.dim))
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return tokens.mean(1), tokens

    def _embedded(self, x: Tensor) -> Tensor:
        frames, (height, width) = x.shape[1], x.shape[3:]
        if frames % self.tubelet or height % self.patch or width % self.patch:
            raise ValueError(
                f"cubes of {self.tubelet} frames and {self.patch}x{self.patch} pixels do not fill "
                f"a clip of {frames} frames of {height}x{width}: choose another decode.frames or "
                "decode.crop.size"
            )
        times = frames // self.tubelet
        maps = self.embed(x.reshape(len(x) * times, -1, height, width))  # Bt D h w
        tokens = maps.unflatten(0, (-1, times)).flatten(3).transpose(2, 3).flatten(1, 2)
        return tokens + numbered(tokens.shape[1], self.dim, x.device).to(tokens.dtype)


def numbered(count: int, dim: int, device: torch.device | str) -> Tensor:
    """(count, dim): sines, then cosines of numbers at frequencies from 1 to almost 1 / 10000."""
    omega = 10000 ** (-torch.arange(dim // 2, device=device, dtype=torch.float32) / (dim // 2))
    angle = torch.arange(count, device=device)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1)
