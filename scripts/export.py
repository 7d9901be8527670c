"""Writes a run's backbone for other tools: torchvision, timm, safetensors or ONNX.

    python scripts/export.py outputs/demo --format torchvision --output resnet.pth

Files for torchvision and timm are loaded into the library's own model and its outputs compared
before they are written. They have no classifier: load them with `strict=False`.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models as zoo

from unlabeled.backbones import load
from unlabeled.backbones.alexnet import AlexNet
from unlabeled.backbones.build import build
from unlabeled.backbones.library import strip, timm_settings
from unlabeled.backbones.resnet import ResNet
from unlabeled.backbones.wrapped import Library

NAMES = {
    "torchvision": "backbone-torchvision.pth",
    "timm": "backbone-timm.pth",
    "safetensors": "backbone.safetensors",
    "onnx": "backbone.onnx",
}
BOTH = {f"resnet{d}" for d in (18, 34, 50, 101, 152)} | {"wide_resnet50_2", "wide_resnet101_2"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes a run's backbone for other tools.")
    parser.add_argument("run", metavar="RUN", help="a run folder or a checkpoint of one")
    parser.add_argument("--format", required=True, choices=list(NAMES))
    parser.add_argument("--output", type=Path, help="default: e.g. RUN/backbone-timm.pth")
    parser.add_argument("--size", type=int, help="ONNX only: side of the images in pixels (224)")
    args = parser.parse_args(argv)
    if args.size is not None and (args.format != "onnx" or args.size < 1):
        parser.error("--size is a positive number, for --format onnx")
    try:
        backbone = load.checkpoint(args.run).eval()
        output = args.output or _beside(Path(args.run), args.format)
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(f".{output.stem}.unfinished{output.suffix}")
        try:
            note = write(backbone, args.format, unfinished, args.size)
            os.replace(unfinished, output)
        finally:
            unfinished.unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {note}")
    return 0


def write(backbone: nn.Module, format: str, file: Path, size: int | None = None) -> str:
    """Writes the file and says in a sentence what it fits."""
    state = {key: x.detach().cpu().contiguous() for key, x in _inner(backbone).state_dict().items()}
    if format == "onnx":
        return _onnx(backbone, file, size)
    if format == "safetensors":
        save_file(state, file, metadata={"backbone_config": json.dumps(backbone.config)})
        return f"{len(state)} tensors and the backbone's configuration"
    name, differences = standard(backbone, format)
    if not differences:
        _verify(backbone, state, format, name)
    torch.save(state, file)
    if differences:
        return f"{format}'s key names, but it does not fit its {name}: {', '.join(differences)}"
    note = f"fits {format}'s {name}, all but its classifier; same outputs"
    if isinstance(backbone, Library) and (settings := timm_settings(backbone.config)):
        note += "; made with " + ", ".join(f"{key}={value}" for key, value in settings.items())
    if isinstance(backbone, Library) and backbone.converts:
        note += "; takes images in that model's own normalisation"
    return note


def standard(backbone: nn.Module, library: str) -> tuple[str, list[str]]:
    """The library's model that a backbone is, or is nearest to, and how it differs from it."""
    config: dict[str, Any] = backbone.config  # type: ignore[assignment]
    if isinstance(backbone, ResNet):
        depth, widen = config["depth"], config["widen"]
        wide = widen == 2 and depth in (50, 101)
        usual = {"width": [64], "stem": ["imagenet"], "norm": ["batch", "sync"]}
        usual["widen"] = [2 if wide else 1]
        differences = [
            f"{key} {config[key]} (there {values[0]})"
            for key, values in usual.items()
            if config[key] not in values
        ]
        return f"wide_resnet{depth}_2" if wide else f"resnet{depth}", differences
    if isinstance(backbone, AlexNet) and library == "torchvision":
        norm = config["norm"]
        return "alexnet", [] if norm == "none" else [f"norm {norm} (there none)"]
    if isinstance(backbone, Library):
        own = config["_target_"].rpartition(".")[2]
        name = config["name"]
        arch = name.partition(".")[0]  # without the tag of timm's weights
        if own == library:
            return name, []
        if arch in BOTH:
            return arch, []
        raise ValueError(f"{own}'s {name} has other names in {library}: use --format {own}")
    raise ValueError(f"{library} has no {type(backbone).__name__}: use --format safetensors")


@torch.no_grad()
def _verify(backbone: nn.Module, state: dict[str, Tensor], library: str, name: str) -> None:
    """Loads the weights into the library's model as its user would, and compares outputs."""
    size = backbone.size if isinstance(backbone, Library) else 64
    if library == "timm":
        import timm

        config: Any = backbone.config if isinstance(backbone, Library) else {}
        plain: Any = timm.create_model(name, **timm_settings(config))
        result = _fill(plain, state, name)
        plain.reset_classifier(0)
    else:
        slow = name in ("googlenet", "inception_v3")  # to initialise
        plain = zoo.get_model(name, **({"init_weights": False} if slow else {}))
        result = _fill(plain, state, name)
        if isinstance(backbone, AlexNet):
            plain.classifier = nn.Identity()
        else:
            strip(plain)
    trunk = plain.state_dict()
    wrong = [key for key in result.missing_keys if key in trunk] + result.unexpected_keys
    if wrong:
        raise ValueError(f"{library}'s {name} does not take these weights: {wrong}")
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    if isinstance(backbone, AlexNet):  # the plain model's features are the pooled map
        backbone = build(backbone.config | {"features": "grid"}).eval()
        backbone.load_state_dict(state)
    ours = backbone(x)
    theirs = plain.eval()(backbone.to_own(x) if isinstance(backbone, Library) else x)
    theirs = theirs.mean((2, 3)) if theirs.ndim == 4 else theirs.flatten(1)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(ours.abs().max())):
        raise ValueError(
            f"{library}'s {name} with these weights gives other outputs, by up to "
            f"{float((ours - theirs).abs().max()):.3g}: nothing was written"
        )


def _fill(plain: nn.Module, state: dict[str, Tensor], name: str) -> Any:
    try:
        return plain.load_state_dict(state, strict=False)
    except RuntimeError as error:  # weights for other sizes of image have other shapes
        raise ValueError(f"the plain {name} does not take these weights: {error}") from error


def _onnx(backbone: nn.Module, file: Path, size: int | None) -> str:
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'unlabeled[onnx]'") from error
    side = size or (backbone.size if isinstance(backbone, Library) else 224)
    torch.onnx.export(
        backbone,
        (torch.zeros(2, 3, side, side),),
        file,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    onnx.checker.check_model(file)
    return f"images (batch, 3, {side}, {side}), ImageNet-normalised, to features (batch, dim)"


def _inner(backbone: nn.Module) -> nn.Module:
    return backbone.model if isinstance(backbone, Library) else backbone


def _beside(run: Path, format: str) -> Path:
    return (run if run.is_dir() else run.parent) / NAMES[format]


if __name__ == "__main__":
    raise SystemExit(main())
