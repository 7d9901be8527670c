"""Images as rows of patches, and where these lie."""

import torch
from torch import Tensor


def patchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patches (B, rows * columns, height * width * C) of images (B, C, H, W), row by row.

    Raises:
        ValueError: patches do not fill the image.
    """
    (height, width), (tall, wide) = x.shape[-2:], patch
    if height % tall or width % wide:
        raise ValueError(
            f"patches of {tall}x{wide} pixels do not fill an image of {height}x{width}: "
            "choose another decode.size"
        )
    rows = x.unflatten(3, (-1, wide)).unflatten(2, (-1, tall))  # B C r h c w
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: tuple[int, int], rows: int) -> Tensor:
    """The inverse of `patchify` for images with so many rows of patches."""
    x = patches.unflatten(2, (*patch, -1)).unflatten(1, (rows, -1))  # B r c h w C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sine_positions(
    rows: int, columns: int, dim: int, *, device: torch.device | str | None = None
) -> Tensor:
    """(rows * columns, dim): sines and cosines of the row, then those of the column.

    A quarter of the dimensions each, at angular frequencies from 1 down to almost 1 / 10000.
    """
    if dim % 4:
        raise ValueError(f"sines and cosines of two coordinates need a multiple of 4, got {dim}")
    quarter = torch.arange(dim // 4, device=device, dtype=torch.float32)
    omega = 10000 ** (-quarter / (dim // 4))
    found = [torch.arange(n, device=device)[:, None] * omega for n in (rows, columns)]
    down, across = (torch.cat([angle.sin(), angle.cos()], 1) for angle in found)
    down = down[:, None].expand(-1, columns, -1)
    return torch.cat([down, across.expand(rows, -1, -1)], 2).flatten(0, 1)
