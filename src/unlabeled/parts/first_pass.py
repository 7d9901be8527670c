"""What a memory of embeddings holds before the first epoch (DeepCluster-v2)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unlabeled.batch import Batch
from unlabeled.dist import rank, reduce_sum, world_size
from unlabeled.parts.features import ScannedData, evaluating, extract
from unlabeled.parts.views import embed


class CutData(ScannedData, Protocol):
    """What a data module must offer for a pass over augmented crops."""

    batch_size: int
    decode: Any

    def cut(
        self, split: str, parts: Sequence[Sequence[int]], decode: Any, *key: int | str
    ) -> Iterator[Batch]:
        """Batches of the images at given positions, cut as training cuts them."""
        ...


def first_embeddings(
    networks: tuple[nn.Module, nn.Module],
    dim: int,
    data: CutData,
    device: torch.device,
    augmented: Callable[[Batch, int], Batch] | None,
) -> Tensor:
    """Embeddings (2, n, dim) of two crops of every training image, in its order.

    Args:
        networks: backbone and projector.
        dim: width of the embeddings.
        data: gives the images.
        device: where the networks are.
        augmented: gives the views of a batch, whose number fixes what is random: in training mode,
            see `augmented_pass`. None: twice the same deterministic crop, in evaluation mode.
    """
    if augmented is not None:
        return augmented_pass(networks, dim, data, augmented, device)
    with evaluating(network := nn.Sequential(*networks)):
        return extract(network, dim, data, device).expand(2, -1, -1)


@torch.no_grad()
def augmented_pass(
    networks: tuple[nn.Module, nn.Module],
    dim: int,
    data: CutData,
    augmented: Callable[[Batch, int], Batch],
    device: torch.device,
) -> Tensor:
    """Embeddings (2, n, dim) of two augmented crops, in training mode, in batches as in training.

    The last batch is filled up with images from the start, so that its statistics are of as many.
    """
    backbone, projector = networks
    backbone.train()
    projector.train()
    n, here = data.size("train"), data.batch_size // world_size()
    starts = range(rank() * here, n + rank() * here, data.batch_size)
    places = [torch.arange(start, start + here) for start in starts]
    parts = [(place % n).tolist() for place in places]
    found = torch.zeros(2, n, dim, device=device)
    for i, batch in enumerate(data.cut("train", parts, data.decode, "first pass")):
        moved: Any = {**batch, "crops": [crop.to(device) for crop in batch["crops"]]}
        large = augmented(moved, i)["views"][:2]
        z = projector(torch.cat(embed(backbone, large, joint=True))).float().chunk(2)
        new = places[i] < n
        found[:, places[i][new].to(device)] = torch.stack(z)[:, new.to(device)]
    return reduce_sum(found)
