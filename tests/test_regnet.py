"""RegNets, wide ResNets, their stages on tiles, and activation checkpointing."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torchvision import models as zoo
from torchvision.models.regnet import BlockParams

from unlabeled.backbones import load
from unlabeled.backbones.library import timm, torchvision
from unlabeled.backbones.regnet import RegNet
from unlabeled.backbones.resnet import ResNet

CONF = Path(__file__).parents[1] / "conf/backbone"
STAGES = ["conv1", "res2", "res3", "res4", "res5"]
Y400 = {"depth": 16, "w_0": 48, "w_a": 27.89, "w_m": 2.09, "group_width": 8}
TINY = {"depth": 6, "w_0": 8, "w_a": 8.0, "w_m": 1.7, "group_width": 4, "stem_width": 8}


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def resnet(**changes):
    return ResNet(**{"depth": 18, "width": 8, "stem": "small", **changes})


def bottlenecks(**changes):
    return resnet(depth=50, **changes)


def imagenet_stem(**changes):
    return resnet(stem="imagenet", **changes)


def regnet(**changes):
    return RegNet(**{**TINY, **changes})


def built(name):
    with torch.device("meta"):
        return instantiate(OmegaConf.load(CONF / f"{name}.yaml"))


# Sizes


@pytest.fixture
def on_meta(monkeypatch):
    """A function: a name of torchvision's -> shapes of its state dict, without memory."""
    generate = BlockParams.from_init_params

    def on_cpu(*args, **kwargs):
        with torch.device("cpu"):
            return generate(*args, **kwargs)

    def shapes(name):
        monkeypatch.setattr(BlockParams, "from_init_params", on_cpu)
        with torch.device("meta"):
            state = zoo.get_model(name).state_dict()
        return {k: v.shape for k, v in state.items() if not k.startswith("fc.")}

    return shapes


@pytest.mark.parametrize("name", ["8gf", "16gf", "32gf", "128gf"])
def test_regnets_have_torchvisions_names_and_shapes(name, on_meta):
    ours = built(f"regnet_y_{name}").state_dict()
    assert {k: v.shape for k, v in ours.items()} == on_meta(f"regnet_y_{name}")


def test_regnets_give_torchvisions_features(tmp_path):
    theirs, ours = zoo.regnet_y_400mf(), RegNet(**Y400)
    for name, x in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            x.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    load.checkpoint(str(tmp_path / "theirs.pth"), model=ours)
    theirs.fc, x = nn.Identity(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    wrapped = torchvision("regnet_y_400mf").eval()
    wrapped.model.load_state_dict(ours.state_dict())
    for name, value in ours.stages(x).items():
        torch.testing.assert_close(wrapped.stages(x)[name], value)


def test_initial_weights_are_distributed_as_torchvisions():
    theirs, ours = zoo.regnet_y_400mf().state_dict(), RegNet(**Y400).state_dict()
    for name, x in ours.items():
        if x.ndim == 4 and x.numel() > 1000:
            assert x.std().item() == pytest.approx(theirs[name].std().item(), rel=0.15), name


@pytest.mark.parametrize(
    ("name", "widths", "depths", "millions"),
    [
        ("regnet_y_64gf", [328, 984, 1968, 4920], [2, 5, 12, 1], 276.5),
        ("regnet_y_128gf", [528, 1056, 2904, 7392], [2, 7, 17, 1], 637.4),
        ("regnet_y_256gf", [746, 1492, 4103, 10444], [2, 7, 17, 1], 1272.2),
    ],
)
def test_seers_largest_trunks(name, widths, depths, millions):
    model = built(name)
    maps = model.stages(torch.zeros(1, 3, 224, 224, device="meta"))
    assert list(maps) == STAGES
    assert [m.shape[1] for m in maps.values()] == [32, *widths]
    assert [m.shape[2] for m in maps.values()] == [112, 56, 28, 14, 7]
    assert [len(stage) for stage in model.trunk_output] == depths
    assert model.dim == widths[-1]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_timm_knows_seers_trunk_too():
    with torch.device("meta"):
        theirs = timm("regnety_2560")
    ours = built("regnet_y_256gf")
    assert theirs.dim == ours.dim == 10444
    counts = [sum(p.numel() for p in m.parameters()) for m in (theirs, ours)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("name", "dim", "millions"),
    [
        ("resnet50", 2048, 23.5),
        ("resnet101", 2048, 42.5),
        ("resnet50w2", 4096, 93.9),
        ("resnet50w4", 8192, 375.4),
        ("resnet50w5", 10240, 586.5),
    ],
)
def test_wide_resnets_have_the_papers_sizes(name, dim, millions):
    model, plain = built(name), built("resnet50")
    factor = dim // 2048
    maps = model.stages(torch.zeros(1, 3, 64, 64, device="meta"))
    narrow = plain.stages(torch.zeros(1, 3, 64, 64, device="meta"))
    assert {k: m.shape[1] for k, m in maps.items()} == {
        k: m.shape[1] * factor for k, m in narrow.items()
    }
    assert model.dim == dim
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"w_0": 12}, "w_0=12"),
        ({"w_m": 1.0}, "w_m=1.0"),
        ({"depth": 0}, "depth"),
        ({"depth": 2}, "make 4"),
        ({"stem_stride": 3}, "stem_stride must be 1 or 2, got 3"),
        ({"norm": "instance"}, "instance"),
        ({"checkpoint_activations": ["conv1"]}, r"\['conv1'\]"),
        ({"checkpoint_activations": "res2"}, "'res2'"),
    ],
)
def test_wrong_regnets_say_what_is_wrong(wrong, said):
    with pytest.raises(ValueError, match=said):
        regnet(**wrong)


# Stages on tiles


@pytest.mark.parametrize("make", [resnet, bottlenecks, imagenet_stem, regnet])
@pytest.mark.parametrize(("tiles", "side"), [(9, 64), (100, 10), (9, 9)])
def test_every_stage_takes_tiles(make, tiles, side):
    model = make().eval()
    x = torch.randn(2, tiles, 3, side, side)
    maps = model.stages(x.flatten(0, 1))
    assert list(maps) == STAGES
    sides = [m.shape[-1] for m in maps.values()]
    assert all(len(m) == 2 * tiles for m in maps.values())
    assert sides == sorted(sides, reverse=True)
    assert sides[-1] >= 1
    last = model.stages(x[1])["res5"]  # each tile for itself
    torch.testing.assert_close(maps["res5"][tiles:], last, rtol=1e-3, atol=1e-3)
    features = model(x.flatten(0, 1)).unflatten(0, (2, tiles))
    torch.testing.assert_close(features[1], last.mean((2, 3)), rtol=1e-3, atol=1e-3)


# Activation checkpointing


def step(model, x):
    """Features, gradients and buffers of one training step."""
    features = model(x)
    features.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return features.detach(), grads, {name: b.clone() for name, b in model.named_buffers()}


def twins(make, **changes):
    plain, again = make(**changes), make(**changes, checkpoint_activations=True)
    again.load_state_dict(plain.state_dict())
    return plain, again


@pytest.mark.parametrize("make", [resnet, bottlenecks, regnet])
@pytest.mark.parametrize(
    "changes", [{}, {"norm": "sync"}, {"bn_splits": 2}, {"norm": "group"}], ids=str
)
def test_recomputing_changes_neither_features_nor_gradients_nor_statistics(make, changes):
    plain, again = twins(make, **changes)
    x = torch.randn(4, 3, 32, 32)
    for _ in range(2):
        expected, got = step(plain, x), step(again, x)
        torch.testing.assert_close(got[0], expected[0])
        for a, b in zip(got[1:], expected[1:], strict=True):
            assert a.keys() == b.keys()
            for name, value in b.items():
                torch.testing.assert_close(a[name], value, msg=name)
        plain.zero_grad()
        again.zero_grad()
    counts = [b for name, b in again.named_buffers() if "num_batches" in name]
    assert all(b == 2 for b in counts)
    assert len(counts) > 10 or changes == {"norm": "group"}


@pytest.mark.parametrize("make", [resnet, regnet])
def test_crops_of_two_sizes_move_statistics_twice(make):
    plain, again = twins(make)
    for model in (plain, again):
        torch.manual_seed(1)
        large, small = torch.randn(4, 3, 32, 32), torch.randn(8, 3, 16, 16)
        (model(large).mean() + model(small).square().mean()).backward()
    for (name, a), b in zip(again.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, a), b in zip(again.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def passes(model, x, module):
    """How often a module runs in one training step."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    model(x).sum().backward()
    return len(calls)


@pytest.mark.parametrize("make", [resnet, regnet])
def test_only_the_named_stages_are_recomputed(make):
    x = torch.randn(2, 3, 32, 32)
    for which, counts in ((["res3", "res5"], [1, 2, 1, 2]), (True, [2] * 4), (False, [1] * 4)):
        for i, count in enumerate(counts):
            model = make(checkpoint_activations=which)
            stages = (
                list(model.trunk_output)
                if make is regnet
                else [getattr(model, f"layer{j}") for j in range(1, 5)]
            )
            first = next(m for m in stages[i].modules() if isinstance(m, nn.Conv2d))
            assert passes(model, x, first) == count
        assert model.config["checkpoint_activations"] == which
        assert type(load.fresh(model.config)) is type(model)


def test_evaluation_keeps_nothing_and_recomputes_nothing(monkeypatch):
    model = regnet(checkpoint_activations=True).eval()
    monkeypatch.setattr("unlabeled.backbones.recompute.checkpoint", None)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.dim)


def test_recomputing_keeps_less_for_the_backward_pass():
    def kept(**changes):
        torch.manual_seed(0)
        model, bytes_ = bottlenecks(**changes), {}

        def pack(t):
            bytes_[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(torch.randn(8, 3, 32, 32))
        del out
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(n for p, n in bytes_.items() if p not in own)

    assert kept(checkpoint_activations=True) < 0.5 * kept()


@pytest.mark.parametrize("make", [resnet, regnet])
def test_recomputing_works_in_bf16(make):
    plain, again = twins(make)
    x = torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = plain(x), again(x)
    for out in (expected, got):
        out.float().square().mean().backward()
    assert torch.equal(expected, got)
    assert any(p.grad.abs().max() > 1e-3 for p in plain.parameters())
    for (name, a), b in zip(again.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(again.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
