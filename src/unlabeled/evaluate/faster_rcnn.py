"""Faster R-CNN (Ren et al., 2015) around any backbone with stages res2 to res5.

C4 proposes regions on res4 and classifies each with res5 as its head, as the papers do that
compare unsupervised with supervised backbones (He et al., 2020; Misra & van der Maaten, 2020).
FPN (Lin et al., 2017) proposes and classifies on a pyramid of all four. The parts are
torchvision's. Against Detectron2's, in which those papers trained, box losses are smooth L1 with
beta 1/9, not L1, and batches are not grouped by the images' shapes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from unlabeled.batch import MEAN, STD
from unlabeled.evaluate.trunk import STAGES, Passed, Stage, cut, synchronised

RATIOS = (0.5, 1.0, 2.0)  # height over width of anchors
PYRAMID = 256  # channels
HIDDEN = 1024  # of the pyramid's box head


class Sides(NamedTuple):
    """Lengths in pixels that images are resized to."""

    train: tuple[int, ...]  # of the shorter side, one drawn for each image
    test: int
    longest: int  # of the longer side


class Detector(NamedTuple):
    """What makes a Faster R-CNN besides its backbone.

    Args:
        head: "c4" or "fpn".
        classes: without the background.
        sides: of images.
        anchors: sides in pixels; of C4's every place, of FPN's one for each of five levels.
        pre_nms: proposals before suppression, in training and in testing (FPN: of each level).
        post_nms: those that are left.
        rois: of one image that train the box head.
        extra_norm: batch norm after res5 (C4), or after the pyramid's convolutions (FPN).
        bf16: the backbone and res5 compute in bfloat16 where autocast does.
    """

    head: Literal["c4", "fpn"]
    classes: int
    sides: Sides
    anchors: Sequence[int]
    pre_nms: tuple[int, int]
    post_nms: tuple[int, int]
    rois: int
    extra_norm: bool
    bf16: bool


def faster_rcnn(backbone: nn.Module, stages: dict[str, Stage], plan: Detector) -> FasterRCNN:
    """The detector; new layers are drawn from the global random state.

    Args:
        backbone: taken over, and for C4 cut before res5.
        stages: of the whole backbone, see `trunk.stages_of`.
        plan: the rest.

    Raises:
        ValueError: C4, and no module of the backbone makes res5 of res4.
    """
    trunk: nn.Module
    if plan.head == "c4":
        stage, passed = cut(backbone, "res4", "res5")
        trunk = _UpToRes4(backbone, passed, stages["res4"].channels, plan.bf16)
        channels = stages["res5"].channels
        head: nn.Module = _Res5(stage, channels if plan.extra_norm else 0, plan.bf16)
        anchors = AnchorGenerator((tuple(plan.anchors),), (RATIOS,))
        side = 7 * max(1, stages["res5"].stride // stages["res4"].stride)
        pool = MultiScaleRoIAlign(["0"], side, sampling_ratio=0)
    else:
        trunk = _Pyramid(backbone, stages, norm=plan.extra_norm, bf16=plan.bf16)
        channels = HIDDEN
        head = TwoMLPHead(PYRAMID * 7 * 7, HIDDEN)
        anchors = AnchorGenerator(tuple((a,) for a in plan.anchors), (RATIOS,) * len(plan.anchors))
        pool = MultiScaleRoIAlign(list(STAGES), 7, sampling_ratio=0)
    predictor = FastRCNNPredictor(channels, plan.classes + 1)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    model = FasterRCNN(
        trunk,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=plan.pre_nms[0],
        rpn_pre_nms_top_n_test=plan.pre_nms[1],
        rpn_post_nms_top_n_train=plan.post_nms[0],
        rpn_post_nms_top_n_test=plan.post_nms[1],
        box_roi_pool=pool,
        box_head=head,
        box_predictor=predictor,
        box_batch_size_per_image=plan.rois,
    )
    model.transform = _Resize(plan.sides)
    return synchronised(model)  # type: ignore[return-value]


class _Resize(GeneralizedRCNNTransform):
    """Normalises images in [0, 1] and resizes them, without aliasing where they get smaller."""

    def __init__(self, sides: Sides) -> None:
        super().__init__(min(sides.train), sides.longest, list(MEAN), list(STD))
        self.sides = sides

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        before, sides = image.shape[-2:], self.sides
        short = sides.test
        if self.training:
            short = sides.train[int(torch.randint(len(sides.train), ()))]
        scale = min(short / min(before), sides.longest / max(before))
        after = [max(1, round(scale * side)) for side in before]
        image = F.interpolate(image[None], after, mode="bilinear", antialias=True)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], list(before), after)
        return image, target


class _UpToRes4(nn.Module):
    def __init__(self, backbone: nn.Module, passed: Passed, channels: int, bf16: bool) -> None:
        super().__init__()
        self.backbone, self.passed, self.bf16 = backbone, passed, bf16
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            self.backbone.stages(_laid_out(x))  # type: ignore[operator]
        return self.passed.take().float()


class _Res5(nn.Module):
    """The stage as a head: regions (N, C, 14, 14) to features (N, D)."""

    def __init__(self, stage: nn.Module, extra: int, bf16: bool) -> None:
        super().__init__()
        self.stage, self.bf16 = stage, bf16
        self.norm = nn.BatchNorm2d(extra) if extra else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.stage(_laid_out(x))
        return self.norm(x.float()).mean((2, 3))


class _Pyramid(nn.Module):
    def __init__(
        self, backbone: nn.Module, stages: dict[str, Stage], *, norm: bool, bf16: bool
    ) -> None:
        super().__init__()
        self.backbone, self.out_channels, self.bf16 = backbone, PYRAMID, bf16
        self.fpn = FeaturePyramidNetwork(
            [stages[name].channels for name in STAGES],
            PYRAMID,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=nn.BatchNorm2d if norm else None,
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            maps = self.backbone.stages(_laid_out(x))  # type: ignore[operator]
        return self.fpn(OrderedDict((name, maps[name].float()) for name in STAGES))


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x
