"""Backbones from files: run folders, Lightning checkpoints, plain state dicts of any origin."""

import json
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from unlabeled import dist
from unlabeled.backbones.build import PACKAGE, build
from unlabeled.backbones.classifier import Classifier
from unlabeled.backbones.wrapped import Library

HEADS = ("fc", "classifier", "heads", "head", "last_linear")
# What others wrap a trunk in. A momentum or teacher encoder is never among them.
WRAPPERS = {"state_dict", "model_state_dict", "classy_state_dict", "base_model", "model", "_model"}
WRAPPERS |= {"module", "_orig_mod", "net", "backbone", "trunk", "_feature_blocks", "student"}
WRAPPERS |= {"encoder", "encoder_q", "base_encoder", "online_encoder"}
SHOWN = 6  # names printed of a long list


def checkpoint(path: str, *, model: nn.Module | None = None) -> nn.Module:
    """A backbone with the weights of a file, every one of them.

    Prints which keys of the file matched. Prefixes that other tools put before the names
    (`module.`, `encoder_q.`, `backbone.`, ...) are found; classifier heads are left out.

    Args:
        path: a run folder, a Lightning checkpoint, or a state dict (torch or safetensors) with
            torchvision's, timm's or our names.
        model: a backbone to fill; none: the one that the file says it was made with.

    Raises:
        ValueError: no key matches, one is missing or has another shape, or the file does not
            say its architecture and no model is given.
    """
    file = find(path)
    content, config = read(file)
    if model is None:
        if config is None:
            raise ValueError(
                f"{file} does not say which architecture its weights are for: name one with "
                "backbone@backbone.model=resnet50 (any of conf/backbone)"
            )
        model = fresh(config)
    _fill(model, content, file)
    model.path = str(file)  # type: ignore[assignment]
    return model


def classifier(path: str) -> nn.Module:
    """The backbone of a supervised run with its linear classifier: the features are its logits.

    Args:
        path: a run folder or a checkpoint whose method has a linear `head` on its backbone.

    Raises:
        ValueError: as `checkpoint`, or there is no such head.
    """
    model = checkpoint(path)
    content, _ = read(find(path))
    weight, bias = (content.get(f"state_dict.head.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None or weight.ndim != 2 or weight.shape[1] != model.dim:
        raise ValueError(
            f"{path} holds no linear classifier of its backbone's features: give a run of "
            "method=supervised"
        )
    with torch.random.fork_rng(devices=[]):  # what is built next is as random as without it
        whole = Classifier(model=model, classes=len(weight))
    whole.head.load_state_dict({"weight": weight, "bias": bias})
    whole.path = model.path
    return whole


def fresh(config: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """The architecture of a backbone node at random initialisation, the same for a seed.

    Nothing is downloaded: pretrained weights are left out, and of a checkpoint only the
    architecture is read. The global random state stays as it was.
    """
    config = dict(config)
    while config.get("_target_") == f"{PACKAGE}.load.checkpoint":
        inner = config.get("model") or read(find(config["path"]))[1]
        if inner is None:
            raise ValueError(f"{config['path']} does not say its architecture: give `model`")
        config = dict(inner)
    config = _without_weights(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build(config)


def _without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = {k: _without_weights(v) for k, v in config.items() if isinstance(v, Mapping)}
    weights: dict[str, Any] = {"weights": None} if config.get("weights") else {}
    weights |= {"pretrained": False} if config.get("pretrained") else {}
    return {**config, **inner, **weights}


def ended(path: str | None) -> dict[str, Tensor] | None:
    """All parameters and buffers that a run's method ended with, by name; None without a path.

    Raises:
        ValueError: there is no such run.
    """
    if path is None:
        return None
    file, prefix = find(path), "state_dict."
    content, _ = read(file)
    found = {k.removeprefix(prefix): x for k, x in content.items() if k.startswith(prefix)}
    if not found:
        raise ValueError(f"{file} is no checkpoint of a run: it has no state_dict")
    return found


def find(path: str | Path) -> Path:
    """The file of weights that a path means: a file, or the last checkpoint of a run folder."""
    given = Path(path).expanduser()
    file = given / "checkpoints" / "last.ckpt" if given.is_dir() else given
    if not file.is_file():
        hint = " (a run folder holds one)" if given.is_dir() else ""
        raise ValueError(f"no such checkpoint: {file}{hint}")
    return file


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file under dotted names, and the backbone's config where it has one."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as store:
                config = (store.metadata() or {}).get("backbone_config")
                content = {key: store.get_tensor(key) for key in store.keys()}  # noqa: SIM118
                return content, json.loads(config) if config else None
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is no checkpoint, or holds more than tensors and plain values, which could "
            f"run code; save its state dict alone. {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # a damaged file, or another kind, fails in any way
        raise ValueError(f"cannot read {file}: {type(error).__name__}: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
    config = content.get("backbone_config")
    return _flat(content), dict(config) if isinstance(config, Mapping) else None


def _fill(model: nn.Module, content: dict[str, Tensor], file: Path) -> None:
    """Loads the one group of keys in `content` that fits the model, or says why none does."""
    inner = model.model if isinstance(model, Library) else model
    wanted = inner.state_dict()
    prefix = _prefix(content, wanted)
    if prefix is None:
        raise ValueError(
            f"{file}: no key matches the {len(wanted)} of the backbone\n"
            f"  the file has {_short(list(content))}\n  the backbone has {_short(list(wanted))}"
        )
    found = {key.removeprefix(prefix): x for key, x in content.items() if key.startswith(prefix)}
    matched = {key: found[key] for key in wanted if key in found}
    # Files from before torch 0.4.1 do not count batches, and nothing needs the count.
    counters = [k for k in wanted if k not in found and k.endswith(".num_batches_tracked")]
    missing = [key for key in wanted if key not in found and key not in counters]
    extra = [key for key in found if key not in wanted]
    heads = [key for key in extra if key.split(".")[0] in HEADS]
    extra = [key for key in extra if key not in heads]
    parts = {key.split(".")[0] for key in matched}
    deeper = [key for key in extra if key.split(".")[0] in parts]
    shapes = [
        f"{key}: {tuple(x.shape)} in the file, {tuple(wanted[key].shape)} in the backbone"
        for key, x in matched.items()
        if x.shape != wanted[key].shape
    ]
    if dist.rank() == 0:
        print(
            f"{file} (keys {prefix}*): {len(matched)} matched {_short(list(matched))}, "
            f"{len(missing)} missing {_short(missing)}, {len(extra)} unexpected {_short(extra)}, "
            f"{len(heads)} of a classifier ignored {_short(heads)}, "
            f"{len(content) - len(found)} elsewhere in the file"
        )
    for problem, names in (
        ("keys of the backbone are missing", missing),
        ("keys have another shape", shapes),
        ("keys are of layers that the backbone does not have", deeper),
    ):
        if names:
            raise ValueError(f"{file}: {len(names)} {problem}: {_short(names)}")
    inner.load_state_dict({**{key: wanted[key] for key in counters}, **matched})


def _prefix(content: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """What stands before the backbone's keys in a file: the wrappers that match most of them."""
    count: Counter[str] = Counter()
    for key in content:
        words = key.split(".")
        for i in range(len(words)):
            if ".".join(words[i:]) in wanted:
                count["".join(f"{word}." for word in words[:i])] += 1
            if words[i] not in WRAPPERS:
                break
    return max(count, key=lambda prefix: count[prefix]) if count else None


def _flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, x in content.items():
        if isinstance(x, Tensor):
            flat[f"{prefix}{key}"] = x
        elif isinstance(x, Mapping):
            flat |= _flat(x, f"{prefix}{key}.")
    return flat


def _short(names: list[str]) -> str:
    more = f", ... {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "[" + ", ".join(names[:SHOWN]) + more + "]"
