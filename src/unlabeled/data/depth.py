"""Surface normals from depth."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Camera(NamedTuple):
    """Focal lengths and principal point of a pinhole camera, in pixels.

    The top left corner of the top left pixel is (0, 0), so that pixels have their centres at
    halves.
    """

    fx: float
    fy: float
    cx: float
    cy: float


def points_of(depth: Tensor, camera: Camera) -> Tensor:
    """Points (3, h, w) float64, x right, y down, z forward, of depths (h, w) along z."""
    h, w = depth.shape
    z = depth.double()
    x = (torch.arange(w, dtype=torch.float64) + 0.5 - camera.cx) / camera.fx
    y = (torch.arange(h, dtype=torch.float64) + 0.5 - camera.cy) / camera.fy
    return torch.stack([x.expand(h, w) * z, y[:, None].expand(h, w) * z, z])


def normals_of(
    depth: Tensor, camera: Camera, *, window: int = 9, tolerance: float = 0.05
) -> Tensor:
    """Unit normals (3, h, w) float32: x right, y up, z to the viewer; 0 where unknown.

    A plane n . p = 1 is fitted by least squares to the points in a square around each pixel
    whose depth differs from its own by no more than a share: n solves (sum p p^T) n = sum p. It
    is exact for planes.

    Args:
        depth: (h, w) in any unit; 0 or less where unknown.
        camera: that took it.
        window: odd side of the square in pixels.
        tolerance: share of a pixel's depth.
    """
    points = points_of(depth, camera)
    known = depth > 0
    r = window // 2
    h, w = depth.shape
    wide = F.pad(points, (r, r, r, r))
    seen = F.pad(known, (r, r, r, r))
    products = torch.zeros(3, 3, h, w, dtype=torch.float64)
    sums = torch.zeros(3, h, w, dtype=torch.float64)
    count = torch.zeros(h, w)
    for i, j in itertools.product(range(window), repeat=2):
        p = wide[:, i : i + h, j : j + w]
        near = (p[2] - points[2]).abs() <= tolerance * points[2].abs()
        near &= seen[i : i + h, j : j + w] & known
        p = p * near
        products += p[:, None] * p[None]
        sums += p
        count += near
    rows = products.unbind(0)
    # The inverse is the adjugate over the determinant, and length is lost anyway.
    adjugate = [
        torch.linalg.cross(rows[1], rows[2], dim=0),
        torch.linalg.cross(rows[2], rows[0], dim=0),
        torch.linalg.cross(rows[0], rows[1], dim=0),
    ]
    normal = sum(a * s for a, s in zip(adjugate, sums, strict=True))
    length = normal.norm(dim=0)  # type: ignore[union-attr]
    # Three points in a line, or fewer, make no plane: their products are singular.
    scale = products.diagonal(dim1=0, dim2=1).sum(-1).square() * sums.norm(dim=0)
    good = known & (count >= 3) & (length > 1e-14 * scale)
    normal = normal / torch.where(good, length, torch.ones_like(length))
    away = (normal * points).sum(0) > 0  # it must look at the camera
    normal = torch.where(away, -normal, normal) * good
    return (normal * normal.new_tensor([1.0, -1.0, -1.0]).view(3, 1, 1)).float()


def axes_between(given: Tensor, wanted: Tensor) -> Tensor:
    """The signed permutation (3, 3) of axes that brings directions closest to others.

    Files of normals name their axes in different ways. Angles between normals do not change.

    Args:
        given: (N, 3).
        wanted: (N, 3); both 0 where unknown.
    """
    product = wanted.double().T @ given.double()
    best, most = torch.eye(3), -float("inf")
    for order in itertools.permutations(range(3)):
        axes = torch.zeros(3, 3, dtype=torch.float64)
        for row, column in enumerate(order):
            axes[row, column] = 1.0 if product[row, column] >= 0 else -1.0
        if (value := float((axes * product).sum())) > most:
            best, most = axes.float(), value
    return best
