"""What is taken from one forward of a backbone: its output and pooled maps of its stages.

A backbone that listens (`hear`) has a stage more, `sound`: its features of what is heard beside;
where recordings have no pictures, it has no other.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlabeled.batch import Batch, normalize
from unlabeled.evaluate.contract import FINAL, Data, Request, Shapes
from unlabeled.evaluate.frozen import frozen

SOUND = "sound"  # the stage's name


def images(crops: Tensor, device: torch.device | str) -> Tensor:
    """uint8 crops (B, 3, H, W) or clips (B, T, 3, H, W) as a backbone takes them."""
    x = normalize(crops.to(device, non_blocking=True))
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _stages(backbone: nn.Module, x: Tensor) -> dict[str, Tensor]:
    stages = getattr(backbone, "stages", None)
    maps = stages(x) if callable(stages) else {}
    return dict(maps) if isinstance(maps, Mapping) else {}


def _heard(backbone: nn.Module, batch: Batch, device: torch.device | str) -> Tensor | None:
    """(B, channels, 1, 1), where the backbone listens and there is sound."""
    hear, audio = getattr(backbone, "hear", None), batch.get("audio")
    return None if hear is None or audio is None else hear(audio.to(device))[:, :, None, None]


def shapes_of(backbone: nn.Module, data: Data, device: torch.device | str) -> Shapes:
    """What a backbone makes of the first training image, and of what is heard beside it."""
    batch = next(iter(data.scan("train", 0, 1)))
    crops = batch["crops"]  # type: ignore[typeddict-item]
    with frozen(backbone.to(device)):
        maps, final = {}, torch.zeros(1, 0)
        if crops:
            x = images(crops[0], device)
            maps, final = _stages(backbone, x), backbone(x)
        heard = _heard(backbone, batch, device)
    pooled = False
    if maps:
        mean = list(maps.values())[-1].mean((2, 3))
        pooled = mean.shape == final.shape and torch.allclose(mean, final, rtol=1e-3, atol=1e-5)
    maps = {**({} if heard is None else {SOUND: heard}), **maps}
    sizes = {name: (m.shape[1], m.shape[2], m.shape[3]) for name, m in maps.items()}
    return Shapes(maps=sizes, dim=final.shape[1], pooled=pooled)


def features_of(
    backbone: nn.Module, batch: Batch, requests: Iterable[Request], device: torch.device | str
) -> dict[Request, Tensor]:
    """Each request's (B, channels, grid, grid), in one forward where `forward` calls `stages`."""
    asked = list(requests)
    requests = [r for r in asked if r.stage != SOUND]
    maps: dict[str, Tensor] = {}
    final = None
    if requests:
        x = images(batch["crops"][0], device)  # type: ignore[typeddict-item]
        if FINAL in requests:
            with _overheard(backbone, x, maps):
                final = backbone(x)[:, :, None, None]
        if not maps and any(r != FINAL for r in requests):
            maps = _stages(backbone, x)
    if len(requests) < len(asked) and (heard := _heard(backbone, batch, device)) is not None:
        maps = {**maps, SOUND: heard}
    return {
        r: final if r == FINAL and final is not None else pooled(maps[r.stage].float(), r)
        for r in asked
    }


@contextlib.contextmanager
def _overheard(backbone: nn.Module, x: Tensor, maps: dict[str, Tensor]) -> Iterator[None]:
    """What the backbone's `stages` makes of x while its `forward` works, into `maps`."""
    stages = getattr(backbone, "stages", None)
    if not callable(stages):
        yield
        return

    def listening(given: Tensor) -> Any:
        found = stages(given)
        if given is x and isinstance(found, Mapping):  # not of a part, or an edited image
            maps.update(found)
        return found

    backbone.stages = listening  # type: ignore[assignment]
    try:
        yield
    finally:
        del backbone.stages  # the class's own again


def pooled(maps: Tensor, request: Request) -> Tensor:
    """A stage's maps (B, channels, h, w) as a request has them (B, channels, grid, grid)."""
    if request.window:
        side, stride, padding = request.window
        return F.avg_pool2d(maps, side, stride, padding)
    return F.adaptive_avg_pool2d(maps, request.grid)
