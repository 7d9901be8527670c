"""RegNets (Radosavovic et al., 2020) whose parameters have torchvision's names."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.regnet import AnyStage, BlockParams, ResBottleneckBlock
from torchvision.ops import Conv2dNormActivation

from unlabeled.backbones.norm import Norm, norm_layer
from unlabeled.backbones.recompute import STAGES, chosen, through


class RegNet(nn.Module):
    """A RegNet without classifier: the features are the global average of its last stage.

    Block j is about w_0 + w_a * j channels wide, rounded to a power of w_m times w_0, which
    makes stages; then to whole groups. The state dict is that of torchvision's without `fc`.

    Args:
        depth: blocks of all stages together.
        w_0: width that the widths start from, a multiple of 8.
        w_a: their slope.
        w_m: their step, as a factor.
        group_width: channels of a group of the 3x3 convolutions.
        se_ratio: squeeze-and-excitation's width as a share of the block's input (RegNetY), or
            none (RegNetX).
        stem_width: channels after the stem.
        stem_stride: 2, or 1 for images of about 32 pixels.
        norm: "batch", "sync" (over processes), "group", "layer" or "none".
        bn_splits: statistics over this many parts of the batch, as on as many devices.
        checkpoint_activations: recompute blocks in the backward pass instead of keeping what
            is inside them: true, or a list of stages (res2, ..., res5).
    """

    def __init__(
        self,
        *,
        depth: int,
        w_0: int,
        w_a: float,
        w_m: float,
        group_width: int,
        se_ratio: float | None = 0.25,
        stem_width: int = 32,
        stem_stride: int = 2,
        norm: Norm = "batch",
        bn_splits: int = 1,
        checkpoint_activations: bool | Sequence[str] = False,
    ) -> None:
        super().__init__()
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride}")
        if min(depth, group_width, stem_width) < 1:
            raise ValueError(
                "depth, group_width and stem_width must be at least 1, got "
                f"{depth}, {group_width} and {stem_width}"
            )
        if w_a < 0 or w_0 < 8 or w_0 % 8 or w_m <= 1:
            raise ValueError(
                "a RegNet needs w_0, a positive multiple of 8, w_a >= 0 and w_m > 1, got "
                f"w_0={w_0}, w_a={w_a} and w_m={w_m}"
            )
        self.recomputed = chosen(checkpoint_activations)
        listed = checkpoint_activations
        self.config: dict[str, Any] = {
            "_target_": "unlabeled.backbones.regnet.RegNet",
            "depth": depth,
            "w_0": w_0,
            "w_a": w_a,
            "w_m": w_m,
            "group_width": group_width,
            "se_ratio": se_ratio,
            "stem_width": stem_width,
            "stem_stride": stem_stride,
            "norm": norm,
            "bn_splits": bn_splits,
            "checkpoint_activations": listed if isinstance(listed, bool) else list(listed),
        }
        with torch.device("cpu"):  # the generator computes with tensors, on `meta` too
            plan = BlockParams.from_init_params(depth, w_0, w_a, w_m, group_width)
        if len(plan.widths) != len(STAGES):
            raise ValueError(
                f"depth={depth}, w_0={w_0}, w_a={w_a} and w_m={w_m} make stages of widths "
                f"{plan.widths}: choose values that make {len(STAGES)}"
            )
        layer = norm_layer(norm, bn_splits)
        self.stem = Conv2dNormActivation(
            3, stem_width, kernel_size=3, stride=stem_stride, norm_layer=layer
        )
        stages, before = {}, stem_width
        for i, (width, count, group) in enumerate(
            zip(plan.widths, plan.depths, plan.group_widths, strict=True), 1
        ):
            stages[f"block{i}"] = AnyStage(
                *(before, width, 2, count, ResBottleneckBlock, layer, nn.ReLU, group, 1.0),
                se_ratio=se_ratio,
                stage_index=i,
            )
            before = width
        self.trunk_output = nn.Sequential()
        for name, stage in stages.items():
            self.trunk_output.add_module(name, stage)
        self.dim = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def units(self) -> list[nn.Module]:
        """What is gathered at a time where weights are sharded: the blocks."""
        return [block for stage in self.trunk_output for block in stage]  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.stages(x)["res5"], 1).flatten(1)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """Maps (B, C, h, w): conv1 (the stem), res2 to res5."""
        x = self.stem(x)
        maps = {"conv1": x}
        for name, stage in zip(STAGES, self.trunk_output, strict=True):
            x = through(stage, x, recompute=name in self.recomputed)  # type: ignore[arg-type]
            maps[name] = x
        return maps
