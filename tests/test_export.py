"""Exported weights load into the plain models of other tools and give the same features."""

import importlib.util
import sys
from pathlib import Path

import pytest
import timm as timm_library
import torch
from torch import nn
from torchvision import models as zoo

from unlabeled.backbones import load
from unlabeled.backbones.alexnet import AlexNet
from unlabeled.backbones.library import timm, torchvision
from unlabeled.backbones.resnet import ResNet

SCRIPT = Path(__file__).parents[1] / "scripts/export.py"


@pytest.fixture(scope="module")
def export():
    spec = importlib.util.spec_from_file_location("export", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_folder(path, backbone):
    for name, x in backbone.named_buffers():
        if name.endswith("running_var"):
            x.uniform_(0.5, 1.5)
    (path / "checkpoints").mkdir(parents=True)
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    content = {"state_dict": state, "backbone_config": backbone.config}
    torch.save(content, path / "checkpoints/last.ckpt")
    backbone.eval()
    return str(path)


def test_torchvision_takes_a_resnet(export, tmp_path, capsys):
    ours = ResNet(depth=18, norm="sync")
    assert export.main([run_folder(tmp_path, ours), "--format", "torchvision"]) == 0
    assert "fits torchvision's resnet18" in capsys.readouterr().out
    state = torch.load(tmp_path / "backbone-torchvision.pth", weights_only=True)
    plain = zoo.resnet18()
    result = plain.load_state_dict(state, strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"]
    assert not result.unexpected_keys
    plain.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain.eval()(x), ours(x))
    again = load.checkpoint(str(tmp_path / "backbone-torchvision.pth"), model=ResNet(depth=18))
    torch.testing.assert_close(again.eval()(x), ours(x))


@pytest.mark.parametrize("make", [lambda: ResNet(depth=18), lambda: timm("resnet18")])
def test_timm_takes_a_resnet(export, tmp_path, make):
    ours, file = make(), tmp_path / "sub/weights.pth"
    run = run_folder(tmp_path / "run", ours)
    assert export.main([run, "--format", "timm", "--output", str(file)]) == 0
    plain = timm_library.create_model("resnet18", num_classes=0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain.eval()(x), ours(x))
    assert [p.name for p in file.parent.iterdir()] == ["weights.pth"]


def test_models_of_a_library_go_back_to_it(export, tmp_path, capsys):
    vit = timm("vit_tiny_patch16_224", image_size=32)
    assert export.main([run_folder(tmp_path / "vit", vit), "--format", "timm"]) == 0
    assert "img_size=32; takes images in that model's own normalisation" in capsys.readouterr().out
    small = timm("vit_tiny_patch16_224", image_size=32, patch_size=4, dynamic=True)
    assert export.main([run_folder(tmp_path / "small", small), "--format", "timm"]) == 0
    said = "made with img_size=32, patch_size=4, dynamic_img_size=True"
    assert said in capsys.readouterr().out
    squeeze = torchvision("squeezenet1_1")
    run = run_folder(tmp_path / "squeeze", squeeze)
    assert export.main([run, "--format", "torchvision"]) == 0
    state = torch.load(tmp_path / "squeeze/backbone-torchvision.pth", weights_only=True)
    missing = zoo.squeezenet1_1().load_state_dict(state, strict=False).missing_keys
    assert missing == ["classifier.1.weight", "classifier.1.bias"]
    assert export.main([run, "--format", "timm"]) == 2
    assert "use --format torchvision" in capsys.readouterr().err


def test_torchvision_takes_an_alexnet_and_timm_has_none(export, tmp_path, capsys):
    run = run_folder(tmp_path, AlexNet())
    assert export.main([run, "--format", "torchvision"]) == 0
    assert "fits torchvision's alexnet" in capsys.readouterr().out
    assert export.main([run, "--format", "timm"]) == 2
    assert "timm has no AlexNet" in capsys.readouterr().err


def test_a_narrow_resnet_says_what_it_does_not_fit(export, tmp_path, capsys):
    ours = ResNet(depth=18, width=8, stem="small", norm="group")
    assert export.main([run_folder(tmp_path, ours), "--format", "torchvision"]) == 0
    said = capsys.readouterr().out
    assert "does not fit its resnet18: width 8 (there 64), stem small (there imagenet)" in said
    assert "norm group (there batch)" in said
    state = torch.load(tmp_path / "backbone-torchvision.pth", weights_only=True)
    assert state.keys() == ours.state_dict().keys() <= zoo.resnet18().state_dict().keys()


def test_safetensors_say_their_architecture(export, tmp_path):
    ours = ResNet(depth=18, width=8, stem="small")
    assert export.main([run_folder(tmp_path, ours), "--format", "safetensors"]) == 0
    again = load.checkpoint(str(tmp_path / "backbone.safetensors")).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), ours(x))


def test_weights_that_give_other_outputs_are_not_written(export, tmp_path, monkeypatch, capsys):
    run = run_folder(tmp_path, ResNet(depth=18))
    monkeypatch.setattr(ResNet, "forward", lambda self, x: self.stages(x)["res5"].amax((2, 3)))
    assert export.main([run, "--format", "torchvision"]) == 2
    assert "gives other outputs" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_onnx_takes_any_batch(export, tmp_path):
    reference = pytest.importorskip("onnx.reference", reason="needs onnx")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    ours = ResNet(depth=18, width=4, stem="small")
    run = run_folder(tmp_path, ours)
    assert export.main([run, "--format", "onnx", "--size", "16"]) == 0
    model = reference.ReferenceEvaluator(str(tmp_path / "backbone.onnx"))
    for rows in (1, 3):
        x = torch.randn(rows, 3, 16, 16)
        (features,) = model.run(["features"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), ours(x), rtol=1e-3, atol=1e-4)


def test_onnx_names_its_extra_when_it_is_not_installed(export, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    run = run_folder(tmp_path, ResNet(depth=18, width=4))
    assert export.main([run, "--format", "onnx"]) == 2
    assert "pip install 'unlabeled[onnx]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["absent", "--format", "timm"],
        ["absent"],
        ["absent", "--format", "keras"],
        ["absent", "--format", "timm", "--size", "32"],
    ],
)
def test_bad_input_exits_with_2(export, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    try:
        code = export.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
