"""Clips as rows of cubes of space and time, and which of them lie behind one another."""

import torch
from torch import Tensor

from unlabeled.draws import Draws


def cubes(x: Tensor, patch: int, tubelet: int) -> Tensor:
    """Cubes (B, t * h * w, tubelet * patch * patch * 3) of clips (B, T, 3, H, W).

    Raises:
        ValueError: cubes do not fill the clip.
    """
    frames, (height, width) = x.shape[1], x.shape[3:]
    if frames % tubelet or height % patch or width % patch:
        raise ValueError(
            f"cubes of {tubelet} frames and {patch}x{patch} pixels do not fill a clip of {frames} "
            f"frames and {height}x{width}: choose another decode.frames or decode.crop.size"
        )
    x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(1, (-1, tubelet))
    return x.permute(0, 1, 4, 6, 2, 5, 7, 3).flatten(4).flatten(1, 3)  # B t h w (f p q c)


def whole(tokens: Tensor, patch: int, tubelet: int, rows: int, columns: int) -> Tensor:
    """The inverse of `cubes` for clips of so many rows and columns of cubes."""
    x = tokens.unflatten(2, (tubelet, patch, patch, 3)).unflatten(1, (-1, rows, columns))
    return x.permute(0, 1, 4, 7, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(1, 2)


def tubes(draws: Draws, times: int, places: int, masked: int) -> Tensor:
    """(B, times * places): cubes in a random order, those that are masked last.

    The same places are masked at all times. The order of the places that are not is random too.

    Args:
        draws: a row for each clip.
        times: cubes behind one another.
        places: cubes beside one another.
        masked: places, of each clip its own.
    """
    order = draws.permutations(places)[:, None] + places * torch.arange(times)[:, None]  # B t p
    kept, hidden = order.split([places - masked, masked], 2)
    return torch.cat([kept.flatten(1), hidden.flatten(1)], 1)
