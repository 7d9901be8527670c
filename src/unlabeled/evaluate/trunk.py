"""A backbone taken apart at its stages, to train detectors and segmenters on them.

Nothing here knows any architecture: a trial pass through `backbone.stages` shows which module
makes which map, and automatic differentiation which parameters are behind it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unlabeled.dist import SyncBatchNorm, world_size
from unlabeled.evaluate.pixels import PixelMaps, Pixels
from unlabeled.evaluate.tuning import norm_layers

STAGES = ("res2", "res3", "res4", "res5")
SIDE = 128  # pixels of the trial image


class Stage(NamedTuple):
    """What a stage makes of an image."""

    channels: int
    stride: int  # pixels of the image that one place stands for


class Passed(nn.Sequential):
    """Stands where a stage was taken out: gives what it is given, and keeps it."""

    kept: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        self.kept = input
        return input

    def take(self) -> Tensor:
        """What came by last."""
        kept, self.kept = self.kept, None
        if kept is None:
            raise RuntimeError("the stage before the cut was never run")
        return kept


@contextmanager
def _trial(backbone: nn.Module) -> Iterator[Tensor]:
    """A small image, while the backbone is in evaluation mode."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    device = next((p.device for p in backbone.parameters()), "cpu")  # raw pixels have none
    try:
        yield torch.linspace(-1, 1, 3 * SIDE * SIDE, device=device).view(1, 3, SIDE, SIDE)
    finally:
        for module, mode in modes:
            module.training = mode


def stages_of(backbone: nn.Module) -> dict[str, Stage]:
    """The stages res2 to res5 of a backbone.

    Raises:
        ValueError: it has not all of them.
    """
    with _trial(backbone) as x, torch.no_grad():
        make: Any = getattr(backbone, "stages", None)
        maps: dict[str, Tensor] = make(x) if make else {}  # type: ignore[assignment]
    if missing := [name for name in STAGES if name not in maps]:
        raise ValueError(
            f"the backbone {type(backbone).__name__} has no stages {missing} (it has "
            f"{list(maps)}): detection and segmentation need maps res2 to res5, as of a ResNet "
            "or a RegNet"
        )
    return {s: Stage(maps[s].shape[1], round(SIDE / maps[s].shape[-1])) for s in STAGES}


def with_maps(backbone: nn.Module) -> nn.Module:
    """The backbone; of the raw-pixel baseline, pixels as a detector or a segmenter reads them."""
    return PixelMaps() if isinstance(backbone, Pixels) else backbone


def last_stage(backbone: nn.Module) -> tuple[str, int]:
    """The name and the channels of the last stage that has a map of more than one place.

    Raises:
        ValueError: there is none.
    """
    with _trial(backbone) as x, torch.no_grad():
        make: Any = getattr(backbone, "stages", None)
        maps: dict[str, Tensor] = make(x) if make else {}
    for name, found in reversed(maps.items()):
        if found.ndim == 4 and found.shape[-1] > 1:
            return name, found.shape[1]
    raise ValueError(f"the backbone {type(backbone).__name__} has no stage with a map")


def module_between(backbone: nn.Module, before: str, after: str) -> str:
    """The path of the module that makes one stage's map of another's.

    Raises:
        ValueError: no single module does.
    """
    calls: list[tuple[str, Any, Any]] = []

    def keep(path: str) -> Any:
        return lambda _module, inputs, output: calls.append((path, inputs, output))

    modules = dict(backbone.named_modules())
    hooks = [m.register_forward_hook(keep(path)) for path, m in modules.items() if path]
    try:
        with _trial(backbone) as x, torch.no_grad():
            maps = backbone.stages(x)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    first, last = maps[before], maps[after]
    found = {path for path, given, made in calls if made is last and given and given[0] is first}
    for path in modules:  # the outermost comes first
        if path in found:
            return path
    raise ValueError(
        f"no module of the backbone {type(backbone).__name__} makes {after} of {before}: use a "
        "head that reads stages as they are (head=fpn, or dilate=false)"
    )


def unfit(
    backbone: nn.Module, *cuts: tuple[str, str], needed: Callable[[nn.Module], Any] = stages_of
) -> str | None:
    """Why a backbone cannot be taken apart, or None.

    Args:
        backbone: is looked at only.
        cuts: pairs of stages, the second of which must be one module that makes it of the first.
        needed: what it must have besides.
    """
    try:
        needed(backbone)
        if cuts:
            stages_of(backbone)
        for before, after in cuts:
            module_between(backbone, before, after)
    except (ValueError, AssertionError) as error:  # vision transformers assert an image's size
        return str(error)
    return None


def cut(backbone: nn.Module, before: str, after: str) -> tuple[nn.Module, Passed]:
    """Takes the stage `after` out of a backbone, in place.

    Returns:
        The stage, a module of its own, and what is left in its place: once `backbone.stages` was
        called, its `take` gives the map of `before`.
    """
    path = module_between(backbone, before, after)
    parent, _, name = path.rpartition(".")
    stage, passed = backbone.get_submodule(path), Passed()
    setattr(backbone.get_submodule(parent), name, passed)
    return stage, passed


def freeze_to(backbone: nn.Module, count: int) -> None:
    """Parameters of the first `count` of (stem, res2, ..., res5) learn no more.

    Raises:
        ValueError: there are no so many.
    """
    if not 0 <= count <= 1 + len(STAGES):
        raise ValueError(f"freeze_at must be from 0 to {1 + len(STAGES)}, got {count}")
    named = dict(backbone.named_parameters())
    for p in named.values():
        p.requires_grad_(True)
    if not count or not named:
        return
    with _trial(backbone) as x, torch.enable_grad():
        maps: dict[str, Tensor] = backbone.stages(x)  # type: ignore[operator]
        last = next(iter(maps)) if count == 1 else STAGES[count - 2]
        behind = torch.autograd.grad(maps[last].sum(), [*named.values()], allow_unused=True)
    for p, used in zip(named.values(), behind, strict=True):
        p.requires_grad_(used is None)


def still_norms(module: nn.Module, *, every: bool) -> list[nn.Module]:
    """Norm layers whose statistics stay: all, or those whose parameters are frozen.

    With `every`, their parameters are frozen too. Whoever trains sets these to evaluation mode.
    """
    layers = norm_layers(module)
    if every:
        for layer in layers:
            layer.requires_grad_(False)
        return layers
    return [
        m for m in layers if [*m.parameters()] and not any(p.requires_grad for p in m.parameters())
    ]


def dilate(backbone: nn.Module) -> None:
    """Makes res5 keep the resolution of res4, in place, by kernels with holes.

    What had a stride of 2 gets 1, and kernels after it are dilated by 2, so that every second
    place of the new map has the old one's value (Chen et al., 2015).

    Raises:
        ValueError: it is no module of its own, or shrinks its map by more than convolutions.
    """
    stages_of(backbone)  # raises where there are none
    stage = backbone.get_submodule(module_between(backbone, "res4", "res5"))
    for conv in [m for m in stage.modules() if isinstance(m, nn.Conv2d)]:
        if max(conv.stride) > 1:
            conv.stride = (1, 1)
        elif max(conv.kernel_size) > 1:
            conv.dilation = (2, 2)
            conv.padding = (conv.kernel_size[0] // 2 * 2, conv.kernel_size[1] // 2 * 2)
    made = stages_of(backbone)
    if made["res5"].stride != made["res4"].stride:
        raise ValueError(
            f"res5 of the backbone {type(backbone).__name__} cannot be dilated: set dilate=false"
        )


def synchronised(module: nn.Module) -> nn.Module:
    """The module with batch norm over all processes; as it is if there is only one."""
    if world_size() == 1:
        return module
    for name, child in module.named_children():
        setattr(module, name, synchronised(child))
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        new = SyncBatchNorm(
            module.num_features,
            eps=module.eps,
            momentum=module.momentum,
            affine=module.affine,
            track_running_stats=module.track_running_stats,
        )
        for source in (module._parameters, module._buffers):
            for name, x in source.items():
                setattr(new, name, x)
        return new.train(module.training)
    return module
