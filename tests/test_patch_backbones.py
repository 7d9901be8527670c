"""Every kind of backbone on the tiles and patches of pretext tasks: stages and features."""

import pytest
import torch

from unlabeled.backbones.alexnet import AlexNet
from unlabeled.backbones.library import timm
from unlabeled.backbones.regnet import RegNet
from unlabeled.backbones.resnet import ResNet

STAGES = ["conv1", "res2", "res3", "res4", "res5"]
CONVS = [f"conv{i}" for i in range(1, 6)]
SMALL_REGNET = dict(depth=8, w_0=32, w_a=20.0, w_m=1.8, group_width=16, stem_width=24)


def vit():
    return timm("vit_tiny_patch16_224", image_size=32, patch_size=4, dynamic=True)


MAKE = {
    "alexnet": (lambda: AlexNet(norm="batch"), CONVS),
    "alexnet stride 2": (lambda: AlexNet(norm="batch", stride=2), CONVS),
    "resnet18": (lambda: ResNet(depth=18, width=16), STAGES),
    "resnet50": (lambda: ResNet(depth=50, width=16), STAGES),
    "resnet18 small": (lambda: ResNet(depth=18, width=16, stem="small", stem_stride=2), STAGES),
    "regnet": (lambda: RegNet(**SMALL_REGNET, stem_stride=2), STAGES),
    "regnet small": (lambda: RegNet(**SMALL_REGNET, stem_stride=1), STAGES),
    "vit": (vit, None),
}
TAKES_TILES_OF = {name: 31 if name == "alexnet" else 8 for name in MAKE} | {"alexnet stride 2": 19}


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


@pytest.mark.parametrize("side", [96, 64, 16, 8])
@pytest.mark.parametrize("name", MAKE)
def test_stages_of_patches(name, side):
    make, names = MAKE[name]
    net = make().eval()
    x = torch.randn(2, 3, side, side)
    if side < TAKES_TILES_OF[name]:
        with pytest.raises(ValueError, match=f"{TAKES_TILES_OF[name]} pixels or more, got {side}"):
            net(x)
        return
    with torch.no_grad():
        features, maps = net(x), net.stages(x)
        assert features.shape == (2, net.dim)
        assert names is None or list(maps) == names
        last = list(maps.values())[-1]
        torch.testing.assert_close(last.mean((2, 3)), features, atol=1e-5, rtol=1e-4)
        sides = [m.shape[-1] for m in maps.values()]
        assert sides == sorted(sides, reverse=True)
        assert sides[-1] >= 1
        assert all(m.isfinite().all() and m.std() > 0 for m in maps.values())
        for key, one in net.stages(x[1:]).items():  # a patch does not look at the others
            torch.testing.assert_close(one, maps[key][1:], atol=1e-4, rtol=1e-3)


def test_the_smallest_image_of_alexnet_depends_on_the_stride():
    assert AlexNet(stride=2)(torch.zeros(1, 3, 19, 19)).shape == (1, 256)
    assert AlexNet(stride=2, features="grid", side=1)(torch.zeros(1, 3, 35, 35)).shape == (1, 256)
    with pytest.raises(ValueError, match="35 pixels or more, got 34x34"):
        AlexNet(stride=2, features="grid")(torch.zeros(1, 3, 34, 34))


def test_alexnets_hidden_layers_are_torchvisions():
    from torchvision.models import alexnet

    theirs = alexnet().eval()
    ours = AlexNet(features="grid", hidden=[4096, 4096]).eval()
    kept = {k: v for k, v in theirs.state_dict().items() if not k.startswith("classifier.6")}
    ours.load_state_dict(kept)
    theirs.classifier = theirs.classifier[:-1]
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("norm", ["batch", "sync", "group"])
def test_alexnet_takes_norms_from_a_layer_on_with_or_without_scale(norm):
    x = torch.randn(8, 3, 64, 64) * 3
    net = AlexNet(norm=norm, features="grid", side=1, hidden=[32, 32], normed=4, affine=False)
    assert not any(n.startswith("norms") for n, _ in net.named_parameters())
    biased = {n for n, _ in net.named_parameters() if n.endswith("bias")}
    assert biased == {"features.0.bias", "features.3.bias", "features.6.bias"}
    assert net(x).shape == (8, 32)
    scaled = AlexNet(norm=norm, features="grid", side=1, hidden=[32, 32], normed=4)
    scaled.load_state_dict(net.state_dict(), strict=False)  # scale 1, shift 0
    torch.testing.assert_close(net(x), scaled(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 0}, "stride and side must be at least 1, got 0"),
        ({"side": 0}, "stride and side must be at least 1, got 4 and 0"),
        ({"normed": 6}, "normed is one of the convolutions 1 to 5, got 6"),
        ({"hidden": [8]}, "features=grid, not average"),
        ({"features": "grid", "hidden": [8, 8, 8]}, "fc6 and fc7 at most"),
        ({"features": "grid", "hidden": [0]}, "fc6 and fc7 at most"),
    ],
)
def test_bad_values_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        AlexNet(**options)
