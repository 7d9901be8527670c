"""Monitors of collapse: what every joint-embedding method fears."""

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from unlabeled.callbacks.metrics import Periodic, record


class Health(Periodic):
    """Logs how well the embeddings that the loss compares fill their space.

    See `health` for the numbers. They are of this batch's rows of the first process, before
    any gathering. Methods that show no embeddings (pretext tasks) are left in peace.

    Args:
        every_n_steps: optimizer updates between two measurements.
        rows: at most this many rows are measured, to bound the cost.
    """

    def __init__(self, *, every_n_steps: int = 50, rows: int = 512) -> None:
        if rows < 2:
            raise ValueError(f"rows must be at least 2, got {rows}")
        super().__init__(every_n_steps)
        self.rows = rows

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        """Measures and logs."""
        if not self.due(trainer) or not trainer.is_global_zero:
            return
        z = pl_module.seen.get("embeddings")
        if z is not None and len(z) > 1:
            values = health(z[: self.rows])
            record(trainer, {f"health/{name}": value for name, value in values.items()})


@torch.no_grad()
def health(z: Tensor) -> dict[str, float]:
    """Numbers of embeddings (B, D), each row first scaled to unit length.

    - `std`: the mean over dimensions of the standard deviation over rows, times sqrt(D):
      1 where directions are isotropic, 0 where all rows are equal.
    - `effective_rank`: exp of the entropy of the singular values, scaled to sum to 1 (Roy and
      Vetterli, 2007): from 1 (one direction) to min(B, D). The rows are not centred.
    - `mean_cosine`: the mean over pairs of different rows.

    All are NaN where an embedding is not finite.
    """
    z = F.normalize(z.float().flatten(1), dim=1).cpu()
    n, dim = z.shape
    if not z.isfinite().all():
        return dict.fromkeys(("std", "effective_rank", "mean_cosine"), math.nan)
    # In float64, as the Gram matrix squares the singular values: in float32 the noise of a
    # collapsed batch's vanishing ones would count as rank.
    wide = z.double()
    gram = wide @ wide.T if n <= dim else wide.T @ wide
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = sigma / sigma.sum().clamp(min=1e-12)
    return {
        "std": z.std(0, correction=0).mean().item() * math.sqrt(dim),
        "effective_rank": torch.special.entr(share).sum().exp().item(),
        "mean_cosine": ((wide.sum(0).square().sum() - wide.square().sum()) / (n * (n - 1))).item(),
    }
