"""Any model of torchvision or timm by name, without its classifier."""

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from torch import hub, nn
from torchvision import models as zoo

from unlabeled.backbones.wrapped import (
    IMAGENET,
    Library,
    Timm,
    Torchvision,
    Transformer,
    timm_stages,
    torchvision_stages,
)

Pool = Literal["token", "avg"]
HEADS = ("fc", "classifier", "heads", "head")  # where torchvision's models keep the classifier


def torchvision(name: str, *, weights: str | None = None, logits: bool = False) -> Library:
    """A classification model of torchvision without its last linear layer.

    Args:
        name: e.g. "resnet50"; see `torchvision.models.list_models`.
        weights: pretrained weights by name, e.g. "DEFAULT" or "IMAGENET1K_V2"; none: random.
        logits: keep that layer: the features are logits of ImageNet's classes.

    Raises:
        ValueError: no such model or weights, or their file holds more than tensors.
    """
    names = zoo.list_models(module=zoo)
    if name not in names:
        raise ValueError(_unknown("torchvision model", name, names))
    settings: dict[str, Any] = {}
    size, (mean, std) = 224, IMAGENET
    if weights is not None:
        known = zoo.get_model_weights(name).__members__
        if weights not in known:
            raise ValueError(_unknown(f"weights of {name}", weights, list(known)))
        settings["weights"] = known[weights]
        preset = known[weights].transforms()
        size, mean, std = preset.crop_size[0], tuple(preset.mean), tuple(preset.std)
    elif name in ("googlenet", "inception_v3"):
        settings = {"aux_logits": False, "init_weights": True}
    try:
        with _tensors_alone():
            model = zoo.get_model(name, **settings)
    except OSError as error:
        raise ValueError(_offline(f"{name} weights={weights}", error)) from error
    except Exception as error:  # a damaged file, or another kind, fails in any way
        if weights is None:
            raise
        raise ValueError(_refused(settings["weights"].url, error)) from error
    model = model if logits else strip(model)
    kind = Library if torchvision_stages(model) is None else Torchvision
    config = {"_target_": f"{__name__}.torchvision", "name": name, "weights": weights}
    config |= {"logits": True} if logits else {}
    return kind(model, size=size, mean=mean, std=std, config=config)


def timm(
    name: str,
    *,
    pretrained: bool = False,
    image_size: int | None = None,
    patch_size: int | None = None,
    dynamic: bool = False,
    dim: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    pool: Pool | None = None,
    logits: bool = False,
) -> Library:
    """A model of timm without its classifier.

    Args:
        name: e.g. "resnet50" or, with the tag of its weights, "resnet50.a1_in1k"; see
            `timm.list_models`.
        pretrained: downloads its weights.
        image_size: side in pixels, for models of a fixed image size (vision transformers);
            none: the model's own.
        patch_size: side of a vision transformer's patches in pixels; none: the model's own.
        dynamic: a vision transformer that takes images of any multiple of its patch size, with
            its positional embeddings interpolated to them (multi-crop).
        dim: width of a vision transformer's tokens; none: the model's own, as for those below.
        depth: its blocks.
        heads: of its attention.
        pool: its features, "token" (the class token) or "avg" (the mean of the patches' tokens).
        logits: keep the classifier: the features are logits of the classes it was trained for.
    """
    import timm as library  # slow, and only models of timm need it

    for key, value in (("dim", dim), ("depth", depth), ("heads", heads)):
        if value is not None and value < 1:
            raise ValueError(f"backbone.{key} must be at least 1, got {value}")
    if pool not in (None, "token", "avg"):
        raise ValueError(f"backbone.pool must be token, avg or null, got {pool!r}")
    if not library.is_model(name):
        raise ValueError(_unknown("timm model", name, library.list_models()))
    given: dict[str, Any] = {} if logits else {"num_classes": 0}
    sized = {"image_size": image_size, "patch_size": patch_size, "dynamic": dynamic or None}
    sized |= {"dim": dim, "depth": depth, "heads": heads, "pool": pool}
    sized = {key: value for key, value in sized.items() if value is not None}
    given |= timm_settings(sized)
    try:
        model: Any = library.create_model(name, pretrained=pretrained, **given)
    except TypeError as error:
        names = {key: timm_settings({key: sized[key]}) for key in sized}
        odd = [key for key in sized if any(f"'{name}'" in str(error) for name in names[key])]
        if not odd:
            raise
        raise ValueError(
            f"{name} is no vision transformer, whose size can be chosen: leave out {odd[0]}"
        ) from error
    except AssertionError as error:  # a width that is no multiple of the heads
        raise ValueError(f"timm model {name!r} with {sized}: {error}") from error
    except OSError as error:
        raise ValueError(_offline(f"{name} pretrained=true", error)) from error
    except RuntimeError as error:  # a tag or weights that timm does not have
        raise ValueError(f"timm model {name!r}: {error}") from error
    own = model.pretrained_cfg
    config = {"_target_": f"{__name__}.timm", "name": name, "pretrained": pretrained}
    config |= {"logits": True} if logits else {}
    kind = Timm if timm_stages(model) and hasattr(model, "forward_intermediates") else Library
    if all(hasattr(model, part) for part in ("patch_embed", "patch_drop", "pos_embed", "blocks")):
        kind = Transformer
    return kind(
        model,
        size=image_size or own["input_size"][-1],
        mean=tuple(own["mean"]),
        std=tuple(own["std"]),
        config={**config, "image_size": image_size, **sized},
    )


def timm_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `timm.create_model` calls the settings of a vision transformer."""
    names = {"image_size": "img_size", "patch_size": "patch_size", "dynamic": "dynamic_img_size"}
    names |= {"dim": "embed_dim", "depth": "depth", "heads": "num_heads", "pool": "global_pool"}
    given = {names[k]: v for k, v in config.items() if k in names and v is not None}
    # timm would norm the mean of tokens instead of the tokens, which MAE's decoder reads
    return given | ({"fc_norm": False} if given.get("global_pool") == "avg" else {})


def strip(model: nn.Module) -> nn.Module:
    """A torchvision model without its last linear layer and the dropout around it, in place."""
    if getattr(model, "aux_logits", False):
        model.aux_logits = False  # type: ignore[assignment]
        for auxiliary in ("AuxLogits", "aux1", "aux2"):
            setattr(model, auxiliary, None)
    if isinstance(getattr(model, "dropout", None), nn.Dropout):
        model.dropout = nn.Identity()
    name = next(name for name in HEADS if isinstance(getattr(model, name, None), nn.Module))
    head = getattr(model, name)
    if not isinstance(head, nn.Sequential):
        setattr(model, name, nn.Identity())
        return model
    layers = list(head.named_children())
    last = [child for child, x in layers if isinstance(x, (nn.Linear, nn.Conv2d))][-1]
    for child, layer in layers:
        if child == last or isinstance(layer, nn.Dropout):
            setattr(head, child, nn.Identity())
    return model


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Lets files hold tensors alone meanwhile: torchvision would run the code in a pickle."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _refused(url: str, error: Exception) -> str:
    file = Path(hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    said = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, pickle.UnpicklingError):
        why = f"is no file of weights, or holds more than tensors, which could run code: {said}"
    else:
        why = f"cannot be read: {type(error).__name__}: {said}"
    return f"{file} {why}; delete it, and it is downloaded again from {url}"


def _unknown(what: str, name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=5, cutoff=0.5)
    return f"no {what} {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")


def _offline(what: str, error: OSError) -> str:
    return (
        f"cannot download {what}: {error}. Download the file elsewhere and use "
        "backbone=checkpoint backbone.path=FILE"
    )
