"""Other libraries' models behind the interface of a backbone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision import models as zoo

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what backbones are given
STAGES = ("conv1", "res2", "res3", "res4", "res5")
TORCHVISION_STAGES = (
    ("relu", "layer1", "layer2", "layer3", "layer4"),  # ResNets
    ("stem", *(f"trunk_output.block{i}" for i in range(1, 5))),  # RegNets
)
TIMM_STAGES = (
    ("act1", "layer1", "layer2", "layer3", "layer4"),  # ResNets
    ("stem", "s1", "s2", "s3", "s4"),  # RegNets
)


class Library(nn.Module):
    """Another library's model as a backbone: images in, features (B, dim) out.

    Args:
        model: a model without classifier.
        size: side in pixels of an image that it takes.
        mean: RGB mean that the model's images are normalised with.
        std: likewise.
        config: what builds this backbone again.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.model, self.size, self.config = model, size, config
        self.logits = bool(config.get("logits"))  # whether the features are a classifier's
        # x = (pixel - ours) / s, and (pixel - mean) / std = x * s / std + (ours - mean) / std
        ours, s, m, d = (torch.tensor(v).view(3, 1, 1) for v in (*IMAGENET, mean, std))
        self.converts = (tuple(mean), tuple(std)) != IMAGENET
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", s / d, persistent=False)
        self.register_buffer("shift", (ours - m) / d, persistent=False)
        self.dim = self._measure()

    def forward(self, x: Tensor) -> Tensor:
        with self.fitting(x):
            return _vector(self.model(self.to_own(x)))

    def to_own(self, x: Tensor) -> Tensor:
        """ImageNet-normalised images in the model's own normalisation."""
        return x * self.scale + self.shift if self.converts else x

    @contextmanager
    def fitting(self, x: Tensor) -> Iterator[None]:
        """Raises ValueError where a model asserts that it takes no images of x's size."""
        try:
            yield
        except AssertionError as error:
            name, (height, width) = self.config["name"], x.shape[-2:]
            raise ValueError(
                f"{name} takes no images of {height}x{width} pixels: {error} "
                "Choose another size of crops (or tiles), or, for a vision transformer of timm, "
                "backbone.image_size, backbone.patch_size or backbone.dynamic=true"
            ) from error

    def _measure(self) -> int:
        # Shapes only, whatever the size of the model: nothing is computed on `meta`.
        named = chain(self.named_parameters(), self.named_buffers())
        shapes = {name: torch.empty_like(x, device="meta") for name, x in named}
        self.eval()
        with torch.no_grad():
            x = torch.zeros(1, 3, self.size, self.size, device="meta")
            features = functional_call(self, shapes, (x,))
        self.train()
        return features.shape[1]


class Torchvision(Library):
    """A ResNet or RegNet of torchvision: its stages are the outputs of named modules."""

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w): conv1 (the stem, before a max-pool), res2 to res5."""
        maps: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _inputs, output: maps.update({name: output})

        paths = torchvision_stages(self.model) or ()
        named = [(name, self.model.get_submodule(p)) for name, p in zip(STAGES, paths, strict=True)]
        hooks = [module.register_forward_hook(keep(name)) for name, module in named]
        try:
            self.model(self.to_own(x))
        finally:
            for hook in hooks:
                hook.remove()
        return maps


class Timm(Library):
    """A model of timm that gives its intermediate maps."""

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w): conv1, res2 to res5 of ResNets and RegNets; else stage1, stage2, ...

        Where something follows the last stage (a norm, a class token), `head` comes last: the
        features as a map of one position.
        """
        model: Any = self.model
        with self.fitting(x):
            last, maps = model.forward_intermediates(self.to_own(x))
        if timm_stages(model) in TIMM_STAGES and maps[-1].shape[1] == self.dim:
            return dict(zip(STAGES, maps, strict=True))
        features = _vector(model.forward_head(last))
        named = {f"stage{i}": x for i, x in enumerate(maps, 1)}
        return named | {"head": features[:, :, None, None]}


class Transformer(Timm):
    """A vision transformer of timm, which may be shown some of an image's patches only."""

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.model.patch_embed.patch_size  # type: ignore[union-attr, return-value]

    @property
    def prefix(self) -> int:
        """How many tokens (a class token) stand before those of patches."""
        return self.model.num_prefix_tokens  # type: ignore[return-value]

    def visible(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, dim) and tokens (B, prefix + n, D) of some patches, as if alone.

        Args:
            x: images; patches count row by row.
            kept: (B, n) int64, the patches that each image's tokens are made of.
        """
        model: Any = self.model

        def pick(_module: nn.Module, _inputs: Any, tokens: Tensor) -> Tensor:
            rows = kept[..., None].expand(-1, -1, tokens.shape[2])
            return torch.cat(
                [tokens[:, : self.prefix], tokens[:, self.prefix :].gather(1, rows)], 1
            )

        hook = model.patch_drop.register_forward_hook(pick)  # behind the positional embeddings
        try:
            with self.fitting(x):
                tokens = model.forward_features(self.to_own(x))
        finally:
            hook.remove()
        return _vector(model.forward_head(tokens)), tokens

    def fix_positions(self, table: Callable[[int, int, int], Tensor]) -> None:
        """Puts constants in place of the positional embeddings, which learn no more.

        Args:
            table: maps (rows, columns, D) to the embeddings (rows * columns, D) of patches; those
                of other tokens become 0.
        """
        model: Any = self.model
        fixed = torch.zeros_like(model.pos_embed.detach())
        rows, columns = model.patch_embed.grid_size
        values = table(rows, columns, fixed.shape[-1])
        fixed[0, -len(values) :] = values
        del model.pos_embed
        model.register_buffer("pos_embed", fixed)


def torchvision_stages(model: nn.Module) -> tuple[str, ...] | None:
    """The modules of a torchvision model whose outputs are its STAGES, if it has such."""
    if isinstance(model, zoo.ResNet):
        return TORCHVISION_STAGES[0]
    return TORCHVISION_STAGES[1] if isinstance(model, zoo.RegNet) else None


def timm_stages(model: Any) -> tuple[str, ...]:
    """The modules of a timm model that `forward_intermediates` gives."""
    return tuple(str(info["module"]) for info in getattr(model, "feature_info", ()))


def _vector(x: Tensor) -> Tensor:
    """Features (B, D) of maps (B, D, h, w), which some models without classifier give."""
    return x.mean((2, 3)) if x.ndim == 4 else x.flatten(1)
