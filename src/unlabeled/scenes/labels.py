"""The ground truth of scenes: exact, from rays through the centres of pixels."""

import torch
from torch import Tensor

from unlabeled.scenes.render import Hits, hidden, trace
from unlabeled.scenes.solids import key_points
from unlabeled.scenes.world import ZOOM, Scene

LABELS = (*("boxes", "box_labels", "masks", "segmentation", "normals", "keypoints", "factors"),)


def labels(scene: Scene, size: int) -> list[dict[str, Tensor]]:
    """For every scene, the kinds of `LABELS` as `unlabeled.truth` defines them.

    Objects are the solids with at least one visible pixel, boxes hold these pixels. Wall, floor
    and cards have normals and nothing else.

    Args:
        scene: B scenes.
        size: side of the images in pixels.
    """
    hits = trace(scene, size)
    b, m = len(scene.kind), scene.solids
    what = hits.what.view(b, 1, size, size)
    shown = what == torch.arange(m).view(1, m, 1, 1)
    seen = shown.flatten(2).any(2)
    edges, points = boxes(shown), _points(scene, size)
    number = seen.cumsum(1) * seen  # of each object that is seen, from 1
    masks = (shown * number[:, :, None, None]).sum(1).to(torch.uint8)
    segmentation = (shown * (scene.kind[:, :m, None, None] + 1)).sum(1).to(torch.uint8)
    normals = _maps(hits, b)
    return [
        {
            "boxes": edges[i, seen[i]],
            "box_labels": scene.kind[i, :m][seen[i]],
            "masks": masks[i],
            "segmentation": segmentation[i],
            "normals": normals[i],
            "keypoints": points[i, seen[i]],
            "factors": scene.factors[i],
        }
        for i in range(b)
    ]


def normals(scene: Scene, size: int) -> Tensor:
    """Surface normals (B, 3, size, size) alone."""
    return _maps(trace(scene, size), len(scene.kind))


def _maps(hits: Hits, b: int) -> Tensor:
    return hits.normal.view(3, b, hits.size, hits.size).transpose(0, 1).contiguous()


def boxes(shown: Tensor) -> Tensor:
    """Edges (B, M, 4) of the pixels of masks (B, M, H, W); nonsense for empty ones."""
    edges = []
    for inside in (shown.any(2), shown.any(3)):  # columns, rows
        line = inside.to(torch.uint8)
        edges.append((line.argmax(2), inside.shape[2] - line.flip(2).argmax(2)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=-1).float()


def _points(scene: Scene, size: int) -> Tensor:
    """Key-points (B, M, K, 3) of the solids: x, y and visibility."""
    m = scene.solids
    own = key_points()[scene.kind[:, :m]] * scene.size[:, :m, None, None]
    turn, centre = scene.turn[:, :m, None], scene.centre[:, :m, None]
    at = (turn * own[..., None, :]).sum(-1) + centre
    screen = at[..., :2] * torch.tensor([1.0, -1.0]) / (-at[..., 2:] * ZOOM)
    screen = (screen + 1) / 2 * size
    b, _, k = at.shape[:3]
    image = torch.arange(b).repeat_interleave(m * k)
    covered = hidden(scene, image, at.flatten(0, 2).T.contiguous()).view(b, m, k)
    inside = ((screen >= 0) & (screen < size)).all(-1)
    seen = torch.where(covered, 1.0, 2.0) * inside
    return torch.cat([screen, seen[..., None]], dim=-1)
