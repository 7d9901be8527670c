"""Backbones: names and outputs of torchvision's, norms, other libraries' models, loading."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torchvision import models as zoo

from unlabeled import batch
from unlabeled.backbones import build, load, wrapped
from unlabeled.backbones.alexnet import AlexNet
from unlabeled.backbones.library import timm, torchvision
from unlabeled.backbones.norm import SplitBatchNorm2d, norm_layer
from unlabeled.backbones.resnet import ResNet
from unlabeled.dist import SyncBatchNorm

CONF = Path(__file__).parents[1] / "conf/backbone"


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)


def tiny(**changes):
    return ResNet(**{"depth": 18, "width": 8, "stem": "small", **changes})


def with_statistics(model):
    """The model with running statistics that differ from layer to layer."""
    for name, x in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            x.uniform_(0.5, 1.5)
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(x, b[key]) for key, x in a.items())


# ResNets and AlexNet


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {"depth": 18}),
        ("resnet50", {"depth": 50}),
        ("resnet101", {"depth": 101}),
        ("wide_resnet50_2", {"depth": 50, "widen": 2}),
    ],
)
def test_resnets_have_torchvisions_names_and_shapes(name, arguments):
    with torch.device("meta"):
        theirs, ours = zoo.get_model(name).state_dict(), ResNet(**arguments).state_dict()
    expected = {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.items()} == expected
    assert list(ours) == list(expected)


def test_resnet161_is_the_one_of_cpc_v2():
    with torch.device("meta"):
        net = ResNet(depth=161, last="res4")
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(305e6, rel=0.01)  # published
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = sum(m.kernel_size == (1, 1) for m in convolutions) - 2 * (3 + 4 + 46)
    assert shortcuts == 3
    assert len(convolutions) - shortcuts == 160  # the classifier is the last of 161 layers
    assert len(net.layer3) == 46
    assert net.layer3[1].conv2.weight.shape == (512, 512, 3, 3)
    assert net.dim == 4096
    small = ResNet(depth=161, width=2, last="res4")
    maps = small.stages(torch.randn(2, 3, 64, 64))
    assert {name: x.shape[1:] for name, x in maps.items()} == {
        "conv1": (2, 32, 32),
        "res2": (8, 16, 16),
        "res3": (16, 8, 8),
        "res4": (128, 4, 4),
    }
    assert small(torch.zeros(2, 3, 64, 64)).shape == (2, small.dim) == (2, 128)
    with pytest.raises(ValueError, match="depth=161 ends with res4"):
        ResNet(depth=161)


@pytest.mark.parametrize("depth", [18, 50])
def test_resnets_give_torchvisions_features(depth):
    theirs = with_statistics(zoo.get_model(f"resnet{depth}")).eval()
    theirs.fc = nn.Identity()
    ours = ResNet(depth=depth).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("stem", "sides"), [("imagenet", (32, 16, 8, 4, 2)), ("small", (64, 64, 32, 16, 8))]
)
def test_resnet_stages(stem, sides):
    model = tiny(stem=stem, depth=50).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = model.stages(x)
    channels = (8, 32, 64, 128, 256)
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        name: (2, c, s, s)
        for name, c, s in zip(
            ("conv1", "res2", "res3", "res4", "res5"), channels, sides, strict=True
        )
    }
    assert model.dim == 256
    torch.testing.assert_close(maps["res5"].mean((2, 3)), model(x))
    torch.testing.assert_close(maps["conv1"], model.bn1(model.conv1(x)).relu())


def test_alexnet_is_torchvisions_up_to_conv5():
    theirs, ours = zoo.alexnet().eval(), AlexNet(features="grid").eval()
    trunk = {k: v for k, v in theirs.state_dict().items() if k.startswith("features.")}
    ours.load_state_dict(trunk)
    x = torch.randn(2, 3, 96, 80)
    theirs.classifier = nn.Identity()
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.dim == ours(x).shape[1] == 9216
    for name, last in {"conv1": 1, "conv2": 4, "conv3": 7, "conv4": 9, "conv5": 11}.items():
        torch.testing.assert_close(ours.stages(x)[name], theirs.features[: last + 1](x))


def test_alexnets_features_are_the_average_of_conv5():
    model = AlexNet(norm="batch").eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), model.stages(x)["conv5"].mean((2, 3)))
    assert model.dim == model(x).shape[1] == 256
    assert {k for k in model.state_dict() if k.startswith("features.")} == {
        f"features.{i}.weight" for i in (0, 3, 6, 8, 10)
    }


def test_alexnet_names_the_smallest_image_that_it_takes():
    assert AlexNet()(torch.zeros(1, 3, 31, 31)).shape == (1, 256)
    assert AlexNet(features="grid")(torch.zeros(1, 3, 63, 63)).shape == (1, 9216)
    with pytest.raises(ValueError, match=r"31 pixels or more, got 30x40"):
        AlexNet()(torch.zeros(1, 3, 30, 40))
    with pytest.raises(ValueError, match="63 pixels"):
        AlexNet(features="grid")(torch.zeros(1, 3, 62, 62))


def test_zero_init_residual_makes_blocks_the_identity():
    for depth in (18, 50):
        model = tiny(depth=depth, zero_init_residual=True)
        x = torch.rand(2, model.layer1[1].conv1.in_channels, 6, 6)
        torch.testing.assert_close(model.layer1[1](x), x)


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 20},
        {"width": 0},
        {"stem": "tiny"},
        {"norm": "instance"},
        {"bn_splits": 0},
        {"bn_splits": 2, "norm": "sync"},
        {"widen": 2},
        {"norm": "none", "zero_init_residual": True},
    ],
)
def test_wrong_resnets_say_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        tiny(**wrong)


# Norms


def test_split_batch_norm_is_separate_batch_norms_of_contiguous_parts():
    split, plain = SplitBatchNorm2d(5, splits=3), [nn.BatchNorm2d(5) for _ in range(3)]
    with torch.no_grad():
        for weight in (split.weight, split.bias):
            weight.uniform_()
    for one in plain:
        one.load_state_dict(split.state_dict())
    for _ in range(2):  # the second batch moves statistics that have already moved
        x = torch.randn(12, 5, 4, 3) * 3 + 1
        x[4:] += 2
        parts = torch.cat([one(part) for one, part in zip(plain, x.chunk(3), strict=True)])
        torch.testing.assert_close(split(x), parts)
        assert not torch.allclose(nn.BatchNorm2d(5)(x), parts, atol=0.1)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(one, name) for one in plain]).mean(0)
        torch.testing.assert_close(getattr(split, name), mean)
    assert split.num_batches_tracked == 2
    reference = nn.BatchNorm2d(5).eval()
    reference.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x), reference(x))


def test_split_batch_norm_gives_the_gradients_of_separate_ones():
    split, plain = SplitBatchNorm2d(3, splits=2), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    w = torch.randn(4, 3, 2, 2)
    (split(x) * w).sum().backward()
    grad, x.grad = x.grad, None
    (torch.cat([plain(x[:2]), plain(x[2:])]) * w).sum().backward()
    torch.testing.assert_close(grad, x.grad)
    torch.testing.assert_close(split.weight.grad, plain.weight.grad)


def test_split_batch_norm_needs_equal_parts():
    with pytest.raises(ValueError, match=r"10 images does not divide into bn_splits=4"):
        tiny(bn_splits=4)(torch.zeros(10, 3, 8, 8))
    with pytest.raises(ValueError, match=r"bn_splits=4 leaves one value per channel"):
        tiny(bn_splits=4)(torch.zeros(4, 3, 8, 8))


def test_sync_is_batch_norm_in_one_process():
    sync, plain = tiny(norm="sync"), tiny()
    sync.load_state_dict(plain.state_dict())
    assert isinstance(sync.bn1, SyncBatchNorm)
    x = torch.randn(6, 3, 16, 16)
    torch.testing.assert_close(sync(x), plain(x))
    assert same(sync, plain)  # running statistics too
    torch.testing.assert_close(sync.eval()(x), plain.eval()(x))


def test_group_and_no_norm_do_not_look_at_other_images():
    assert norm_layer("group")(64).num_groups == 32
    assert norm_layer("group")(24).num_groups == 8
    x = torch.randn(4, 3, 16, 16)
    for norm in ("group", "layer", "none"):
        model = tiny(norm=norm)
        assert not dict(model.named_buffers())
        torch.testing.assert_close(model(x)[:1], model(x[:1]))


# Models of torchvision and timm


@pytest.mark.parametrize(
    ("make", "name", "dim", "stages"),
    [
        (torchvision, "resnet18", 512, ["conv1", "res2", "res3", "res4", "res5"]),
        (torchvision, "regnet_y_400mf", 440, ["conv1", "res2", "res3", "res4", "res5"]),
        (torchvision, "mobilenet_v2", 1280, None),
        (torchvision, "squeezenet1_1", 512, None),
        (timm, "resnet18", 512, ["conv1", "res2", "res3", "res4", "res5"]),
        (timm, "regnetz_005", 1024, [*(f"stage{i}" for i in range(1, 6)), "head"]),
        (timm, "convnext_atto", 320, [*(f"stage{i}" for i in range(1, 5)), "head"]),
    ],
)
def test_library_models_are_backbones(make, name, dim, stages):
    model = make(name)
    assert model.training
    assert not any(isinstance(m, nn.Linear) and m.out_features == 1000 for m in model.modules())
    x = torch.randn(2, 3, 64, 64)
    features = model.eval()(x)
    assert features.shape == (2, dim) == (2, model.dim)
    assert hasattr(model, "stages") == (stages is not None)
    if stages:
        maps = model.stages(x)
        assert list(maps) == stages
        torch.testing.assert_close(list(maps.values())[-1].mean((2, 3)), features)
    assert same(load.fresh(model.config, seed=3), load.fresh(model.config, seed=3))


def test_our_resnet_has_the_stages_of_the_libraries():
    ours, x = with_statistics(ResNet(depth=18)).eval(), torch.randn(2, 3, 48, 48)
    for make in (torchvision, timm):
        theirs = make("resnet18").eval()
        theirs.model.load_state_dict(ours.state_dict())
        for name, value in ours.stages(x).items():
            torch.testing.assert_close(theirs.stages(x)[name], value)


def test_models_get_images_in_their_own_normalisation():
    assert wrapped.IMAGENET == (batch.MEAN, batch.STD)
    model = timm("vit_tiny_patch16_224", image_size=32).eval()
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(batch.normalize(pixels)), model.model((pixels - 0.5) / 0.5))
    assert not torchvision("resnet18").converts
    assert set(model.state_dict()) == {f"model.{k}" for k in model.model.state_dict()}


@pytest.mark.parametrize("ask", [lambda m, x: m(x), lambda m, x: m.stages(x)])
def test_images_that_a_transformer_does_not_take_are_named(ask):
    tiles = timm("vit_tiny_patch16_224", image_size=32, patch_size=4, dynamic=True, depth=1)
    with pytest.raises(ValueError, match=r"no images of 9x9 .* patch size \(4\)"):
        ask(tiles, torch.rand(1, 3, 9, 9))
    fixed = timm("vit_tiny_patch16_224", image_size=64, depth=1)
    with pytest.raises(ValueError, match=r"no images of 32x32 .* or backbone.dynamic=true"):
        ask(fixed, torch.rand(1, 3, 32, 32))


def test_unknown_models_get_near_names():
    with pytest.raises(
        ValueError, match=r"no torchvision model 'resnet5'; did you mean .*resnet50"
    ):
        torchvision("resnet5")
    with pytest.raises(
        ValueError, match=r"no timm model 'vit_tiny_patch16'; did you mean vit_tiny"
    ):
        timm("vit_tiny_patch16")
    with pytest.raises(ValueError, match="IMAGENET1K_V1"):
        torchvision("resnet18", weights="IMAGENET1K_V9")
    with pytest.raises(ValueError, match="leave out image_size"):
        timm("resnet18", image_size=32)


def hub_file(folder, monkeypatch):
    """Where torchvision looks for the weights of a ResNet-18."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    url = zoo.ResNet18_Weights.IMAGENET1K_V1.url
    file = folder / "hub/checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    return file


def test_torchvisions_weights_are_those_of_the_file(tmp_path, monkeypatch):
    file = hub_file(tmp_path, monkeypatch)
    whole = zoo.resnet18()
    torch.save(whole.state_dict(), file)
    model = torchvision("resnet18", weights="IMAGENET1K_V1").model
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[key], rtol=0, atol=0)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_hold_code_are_refused(legacy, tmp_path, monkeypatch):
    file = hub_file(tmp_path, monkeypatch)
    torch.save(
        {"conv1.weight": Code(tmp_path / "ran")},
        file,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(ValueError, match=rf"{file} .*run code.*delete it"):
        torchvision("resnet18", weights="IMAGENET1K_V1")
    assert not (tmp_path / "ran").exists()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{file} .*delete it"):
        torchvision("resnet18", weights="IMAGENET1K_V1")


# Loading


def run_folder(path, backbone):
    """What a run leaves: a trunk among a method's other parameters, and its configuration."""
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    state |= {f"target.0.{k}": v + 1 for k, v in backbone.state_dict().items()}
    state |= {"projector.0.weight": torch.zeros(2, 2)}
    (path / "checkpoints").mkdir(parents=True)
    content = {"epoch": 3, "backbone_config": backbone.config, "state_dict": state}
    torch.save(
        content | {"optimizer_states": [{"state": {0: torch.zeros(1)}}]},
        path / "checkpoints/last.ckpt",
    )
    return path


@pytest.mark.parametrize("make", [tiny, lambda: AlexNet(norm="batch"), lambda: timm("test_resnet")])
def test_a_run_brings_its_backbone_back(tmp_path, capsys, make):
    model = with_statistics(make())
    run = run_folder(tmp_path / "run", model)
    state = torch.random.get_rng_state()
    loaded = load.checkpoint(str(run))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(loaded) is type(model)
    assert same(loaded, model)
    assert loaded.config == model.config
    n = len(model.state_dict())
    assert f"{n} matched" in capsys.readouterr().out
    assert same(load.checkpoint(str(run / "checkpoints/last.ckpt")), model)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "module.encoder_q.", "backbone.", "_model.model."]
)
@pytest.mark.parametrize("nested", [False, True])
def test_prefixes_of_other_tools_are_found(tmp_path, capsys, prefix, nested):
    model = with_statistics(tiny())
    state = {f"{prefix}{k}": v for k, v in model.state_dict().items()}
    state[f"{prefix}fc.weight"] = torch.zeros(10, model.dim)
    state["queue"] = torch.zeros(4, 4)
    torch.save({"state_dict": state, "arch": "resnet18"} if nested else state, tmp_path / "a.pth")
    assert same(load.checkpoint(str(tmp_path / "a.pth"), model=tiny()), model)
    out = capsys.readouterr().out
    assert "120 matched" in out
    assert "1 of a classifier ignored [fc.weight]" in out


def test_a_momentum_encoder_is_not_taken_for_the_encoder(tmp_path):
    model, other = with_statistics(tiny()), with_statistics(tiny())
    state = {f"encoder_k.{k}": v for k, v in other.state_dict().items()}
    state |= {f"encoder_q.{k}": v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "moco.pth")
    assert same(load.checkpoint(str(tmp_path / "moco.pth"), model=tiny()), model)


def test_safetensors_with_and_without_configuration(tmp_path):
    model = with_statistics(tiny())
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    config = {"backbone_config": json.dumps(model.config)}
    save_file(model.state_dict(), tmp_path / "known.safetensors", metadata=config)
    assert same(load.checkpoint(str(tmp_path / "known.safetensors")), model)
    assert same(load.checkpoint(str(tmp_path / "plain.safetensors"), model=tiny()), model)
    with pytest.raises(ValueError, match=r"plain.safetensors does not say which architecture"):
        load.checkpoint(str(tmp_path / "plain.safetensors"))


def test_weights_go_between_libraries(tmp_path):
    theirs = with_statistics(zoo.resnet18())
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    models = [ResNet(depth=18), timm("resnet18"), torchvision("resnet18")]
    x = torch.randn(2, 3, 48, 48)
    theirs.fc = nn.Identity()
    for model in models:
        loaded = load.checkpoint(str(tmp_path / "r18.pth"), model=model).eval()
        torch.testing.assert_close(loaded(x), theirs.eval()(x))


def test_files_older_than_batch_counters_load(tmp_path):
    model = with_statistics(tiny())
    old = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save(old, tmp_path / "old.pth")
    assert same(load.checkpoint(str(tmp_path / "old.pth"), model=tiny()), model)


def broken(change):
    state = tiny().state_dict()
    if change == "zero":
        return {f"something.{k}": v for k, v in state.items()}
    if change == "missing":
        del state["layer3.1.conv2.weight"]
    if change == "shape":
        state["layer2.0.conv1.weight"] = torch.zeros(3, 3)
    if change == "deeper":
        state["layer2.2.conv1.weight"] = torch.zeros(16, 16, 3, 3)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("zero", r"no key matches the 120 .*(?s:.*)something\.conv1\.weight"),
        ("missing", r"1 keys of the backbone are missing: \[layer3\.1\.conv2\.weight\]"),
        ("shape", r"layer2\.0\.conv1\.weight: \(3, 3\) in the file, \(16, 8, 3, 3\)"),
        ("deeper", r"layers that the backbone does not have: \[layer2\.2\.conv1\.weight\]"),
    ],
)
def test_weights_that_do_not_fit_are_errors(tmp_path, change, message):
    torch.save(broken(change), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=message) as error:
        load.checkpoint(str(tmp_path / "bad.pth"), model=tiny())
    assert "bad.pth" in str(error.value)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_unreadable_and_unsafe_files_are_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Evil()}, "evil.pth")
    Path("text.pth").write_text("hello")
    Path("text.safetensors").write_text("hello")
    torch.save([1], "list.pth")
    Path("empty").mkdir()
    for name, message in {
        "evil.pth": "could run code",
        "text.pth": "cannot read text.pth",
        "text.safetensors": "cannot read text.safetensors",
        "list.pth": "holds a list",
        "empty": "a run folder holds one",
        "absent.pth": "no such checkpoint: absent.pth",
    }.items():
        with pytest.raises(ValueError, match=message):
            load.checkpoint(name, model=tiny())
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "unlabeled.backbones.library.zoo.get_model",
        "unlabeled.backbones.load.torch.load",
        "unlabeled.backbones.load.checkpoint",
        "unlabeled.backbones.build.build",
        "unlabeled.backbones.build.import_module",
        "unlabeled.backbones.library._unknown",
        "unlabeled.backbones.library.get_close_matches",
        "unlabeled.backbones.nothing.ResNet",
        "unlabeled.lars.LARS",
        "resnet",
        None,
    ],
)
def test_only_our_backbones_are_built_from_files(target):
    with pytest.raises(ValueError, match="_target_ must be a class or function of unlabeled"):
        build.build({"_target_": target})
    with pytest.raises(ValueError, match="_target_ must be"):  # nested ones too
        build.build({**tiny().config, "width": {"_target_": target}})


def test_an_evil_checkpoint_builds_nothing(tmp_path):
    model = tiny()
    model.config = {"_target_": "os.mkdir", "path": str(tmp_path / "made")}
    run = run_folder(tmp_path / "run", model)
    with pytest.raises(ValueError, match=r"os\.mkdir"):
        load.checkpoint(str(run))
    assert not (tmp_path / "made").exists()


def test_wrong_arguments_of_a_configuration_are_named():
    with pytest.raises(ValueError, match=r"resnet\.ResNet: .*'heads'"):
        build.build({**tiny().config, "heads": 3})


def test_fresh_is_random_fixed_by_the_seed_and_downloads_nothing(tmp_path):
    config = tiny().config
    assert same(load.fresh(config), load.fresh(config))
    assert not torch.equal(load.fresh(config).conv1.weight, load.fresh(config, seed=1).conv1.weight)
    model = with_statistics(tiny(width=12))
    node = {"_target_": "unlabeled.backbones.load.checkpoint", "model": None}
    node["path"] = str(run_folder(tmp_path / "run", model))
    again = load.fresh(node)
    assert again.config == model.config
    assert not torch.equal(again.bn1.running_var, model.bn1.running_var)
    pretrained = timm("test_resnet").config | {"pretrained": True}
    assert load.fresh(pretrained).config["pretrained"] is False
    weights = torchvision("resnet18").config | {"weights": "DEFAULT"}
    assert load.fresh(weights).config["weights"] is None


# Configuration


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_yaml_builds(path, tmp_path):
    node = OmegaConf.load(path)
    defaults = node.pop("defaults", [])
    if path.stem in ("checkpoint", "classifier"):
        node.path = str(run_folder(tmp_path / "run", tiny()))
    if path.stem == "classifier":
        saved = torch.load(node.path + "/checkpoints/last.ckpt", weights_only=True)
        head = {"head.weight": torch.zeros(7, tiny().dim), "head.bias": torch.arange(7.0)}
        torch.save({**saved, "state_dict": saved["state_dict"] | head}, tmp_path / "classifier")
        node.path = str(tmp_path / "classifier")
    for where, inner in (item for d in defaults if d != "_self_" for item in d.items() if item[1]):
        model, key = OmegaConf.load(CONF / f"{inner}.yaml"), where.removeprefix("/backbone@")
        OmegaConf.update(node, key, OmegaConf.merge(model, OmegaConf.select(node, key) or {}))
    if path.stem in ("torchvision", "timm"):
        node.name = "resnet18" if path.stem == "torchvision" else "test_resnet"
    if any(kind in path.stem for kind in ("resnet", "regnet", "alexnet")):
        with torch.device("meta"):
            model = instantiate(node)
        assert model.config == OmegaConf.to_container(node)  # every argument can be overridden
    else:
        model = instantiate(node)
    device = next(model.parameters()).device
    features = model.eval()(torch.zeros(2, 3, 64, 64, device=device))
    assert features.shape == (2, model.dim)


def test_the_tiny_resnet_is_narrow_with_a_small_stem():
    node = OmegaConf.load(CONF / "resnet18_tiny.yaml")
    assert (node.depth, node.stem) == (18, "small")
    assert sum(p.numel() for p in instantiate(node).parameters()) < 3e6


def test_channels_last_and_bf16_reach_the_features():
    model = tiny(bn_splits=2).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    assert model.stages(x)["res5"].is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x).float()
    assert F.cosine_similarity(half, model(x)).min() > 0.98


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_in_bf16_survive_maps_of_one_position(recompute):
    torch.manual_seed(0)
    exact = tiny(width=24, norm="none", stem_stride=2, checkpoint_activations=recompute)
    exact = exact.to(memory_format=torch.channels_last)
    x = torch.randn(64, 3, 8, 8).contiguous(memory_format=torch.channels_last)  # 1x1 from res4 on
    grads = []
    for enabled in (False, True):
        exact.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = exact(x)
        y.float().square().mean().backward()
        grads.append(exact.layer4[0].conv1.weight.grad.clone())
    assert F.cosine_similarity(*(g.flatten() for g in grads), dim=0) > 0.95


NARROW = """
import torch
from torch import nn
from unlabeled.backbones.resnet import Shortcut

torch.manual_seed(0)
for channels, size in ((4, 64), (8, 64), (12, 224), (16, 64)):
    x, plain = torch.randn(8, channels, size, size), nn.Conv2d(channels, 32, 1, 2, bias=False)
    ours = Shortcut(channels, 32, 1, 2, bias=False).to(memory_format=torch.channels_last)
    ours.load_state_dict(plain.state_dict())
    given = x.to(memory_format=torch.channels_last).requires_grad_(), x.clone().requires_grad_()
    for _ in range(3):
        out = ours(given[0]), plain(given[1])
        weigh = torch.randn_like(out[1])
        for y in out:
            (y * weigh).sum().backward()
    torch.testing.assert_close(*out)
    largest = plain.weight.grad.abs().max()
    assert (ours.weight.grad - plain.weight.grad).abs().max() < 1e-4 * largest
    torch.testing.assert_close(given[0].grad, given[1].grad)
print("the same")
"""


def test_narrow_shortcuts_learn_on_every_cpu():
    """In a process of its own, which a wrong kernel kills."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr
