"""Pictures of what features hold, as arrays: neighbours, and a map of all images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.disk import replace_arrays
from unlabeled.draws import seed_of, subset
from unlabeled.evaluate.contract import FINAL, Data
from unlabeled.evaluate.store import FeatureStore

SAME = 1e-6  # by which features of unit length differ from rounding alone
Arrays = dict[str, np.ndarray[Any, Any]]


def write(folder: Path, store: FeatureStore, backbone: nn.Module, data: Any, *, seed: int) -> None:
    """`neighbours.npz` and `embedding.npz` of the test images, where evaluations kept features."""
    features = final(store, backbone, data)
    if features is None or len(features) < 3:  # fewer make no picture
        return
    folder.mkdir(exist_ok=True)
    near = neighbours(features, data, seed=seed)
    dots = embedding(features, data.labels("test"), classes=data.classes, seed=seed)
    for name, arrays in (("neighbours", near), ("embedding", dots)):
        replace_arrays(folder / f"{name}.npz", arrays)


def final(store: FeatureStore, backbone: nn.Module, data: Any) -> Tensor | None:
    """The backbone's output (n, dim, 1, 1) on the test images, if evaluations kept it."""
    return store.find(backbone, data, "test", FINAL) if data.has("test") else None


def neighbours(
    features: Tensor, data: Data, *, queries: int = 8, k: int = 8, seed: int = 0
) -> Arrays:
    """Test images and their nearest test images by cosine similarity, for `neighbours.npz`.

    Queries are balanced over classes and drawn by the seed. The query itself and its
    duplicates (the same pixels at a similarity of 1) are not among its neighbours; where an
    image runs out of neighbours there are fewer than k for all.

    Args:
        features: (n, ...) of the test split, in its order.
        data: gives thumbnails and labels.
        queries: Q.
        k: neighbours of each.
        seed: of the choice of queries.

    Returns:
        `queries` uint8 (Q, h, w, 3), `neighbours` uint8 (Q, k, h, w, 3), `query_labels` (Q,),
        `neighbour_labels` (Q, k), -1 without labels, `similarity` (Q, k), `classes` (C,).
    """
    z = F.normalize(features.flatten(1).float(), dim=1)
    labels = data.labels("test")
    known = None if labels is None else labels.tolist()
    chosen = subset(known, len(z), min(queries, len(z)), seed, "queries").tolist()
    similarity = z[chosen] @ z.T
    order = similarity.argsort(dim=1, descending=True, stable=True)
    picture = {q: _picture(data, q) for q in chosen}
    near: list[list[int]] = []
    for row, query in enumerate(chosen):
        kept: list[int] = []
        for j in order[row].tolist():
            if len(kept) == k:
                break
            if j == query:
                continue
            same = similarity[row, j] > 1 - 1e-6
            if same and np.array_equal(_picture(data, j), picture[query]):
                continue
            kept.append(j)
        near.append(kept)
    k = min(len(kept) for kept in near)
    if k == 0:
        raise ValueError(f"{len(z)} test images are too few to show neighbours")
    table = np.array([kept[:k] for kept in near])
    y = np.full(len(z), -1) if labels is None else labels.numpy()
    return {
        "queries": np.stack([picture[q] for q in chosen]),
        "neighbours": np.stack([np.stack([_picture(data, j) for j in kept]) for kept in table]),
        "query_labels": y[chosen],
        "neighbour_labels": y[table],
        "similarity": similarity.gather(1, torch.from_numpy(table)).numpy(),
        "classes": np.array(list(data.classes), dtype=np.str_),
    }


def _picture(data: Data, position: int) -> np.ndarray[Any, Any]:
    return data.thumbnail("test", position).permute(1, 2, 0).numpy()


def embedding(
    features: Tensor,
    labels: Tensor | None,
    *,
    classes: Sequence[str] = (),
    limit: int = 2000,
    seed: int = 0,
) -> Arrays:
    """A 2-D map of at most `limit` images by t-SNE, for `embedding.npz`.

    Features are normalised to unit length and reduced to 50 principal components first. Those of
    a collapsed backbone, which are all the same, make one point: t-SNE would die of them.

    Args:
        features: (n, ...).
        labels: (n,); the chosen images are balanced over them.
        classes: names of the labels.
        limit: images on the map.
        seed: of the choice of images and of t-SNE.

    Returns:
        `xy` float32 (N, 2), `label` (N,), -1 without labels, `classes` (C,), `method` "t-SNE".
    """
    from sklearn.decomposition import PCA  # slow to import
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(features) < 3:
        raise ValueError(f"a map needs at least 3 images, got {len(features)}")
    known = None if labels is None else labels.tolist()
    chosen = subset(known, len(features), limit, seed, "embedding")
    z = F.normalize(features[chosen].flatten(1).float(), dim=1).numpy()
    state = seed_of(seed, "t-SNE") % 2**32
    parts = min(50, *z.shape)
    perplexity = min(30.0, (len(z) - 1) / 3)
    tsne = TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=state)
    xy = np.zeros((len(z), 2))
    # One thread: the same map for any number of cores, and where others want the cores too, several
    # wait for one another eight times longer than they work.
    with threadpool_limits(1):
        if np.ptp(z, axis=0).max() > SAME:
            z = PCA(parts, svd_solver="randomized", random_state=state).fit_transform(z)
            xy = tsne.fit_transform(z)
    y = np.full(len(chosen), -1) if labels is None else labels[chosen].numpy()
    return {
        "xy": xy.astype(np.float32),
        "label": y,
        "classes": np.array(list(classes), dtype=np.str_),
        "method": np.array("t-SNE"),
    }
