"""A transformer that fills in the patches which an encoder was not shown."""

import torch
from torch import Tensor, nn

from unlabeled.parts.patchify import sine_positions


class PatchDecoder(nn.Module):
    """From tokens of visible patches to a prediction for every patch of the image.

    Blocks are those of vision transformers: pre-norm, GELU, hidden layers of 4 * dim.

    Args:
        width: of the encoder's tokens.
        prefix: how many of these stand before those of patches (a class token).
        dim: width of the decoder.
        depth: its blocks.
        heads: of its attention.
        outputs: numbers predicted for a patch.
    """

    def __init__(
        self, width: int, prefix: int, *, dim: int, depth: int, heads: int, outputs: int
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.prefix = prefix
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.blocks = nn.Sequential(
            *(
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
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, outputs)

    def forward(self, tokens: Tensor, order: Tensor, rows: int) -> Tensor:
        """Predictions (B, L, outputs).

        Args:
            tokens: (B, prefix + n, width) of the first n patches of each image's order.
            order: (B, L) int64, patches in an order of the image's own.
            rows: of patches in the image.
        """
        x = self.embed(tokens)
        first, seen = x[:, : self.prefix], x[:, self.prefix :]
        masked = self.mask_token.to(x.dtype).expand(len(x), order.shape[1] - seen.shape[1], -1)
        back = order.argsort(1)[..., None].expand(-1, -1, x.shape[2])
        patches = torch.cat([seen, masked], 1).gather(1, back)
        columns = order.shape[1] // rows
        patches = patches + sine_positions(rows, columns, x.shape[2], device=x.device).to(x.dtype)
        return self.head(self.norm(self.blocks(torch.cat([first, patches], 1)))[:, self.prefix :])


def initialize(module: nn.Module) -> None:
    """Glorot's uniform weights for linear layers and for patch embeddings as such, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.data.flatten(1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
