"""What makes a run another one: the part of its config that its weights depend on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Where things lie, what is watched, and how many devices share a batch: `data.batch_size` is
# that of all together. A run may grow longer.
GROUPS = ("method", "backbone", "data")
FREE = {
    *("data.root", "data.workers", "data.max_unreadable", "data.eval_decode", "data.val_share"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.plugins", "trainer.max_epochs", "trainer.max_steps", "trainer.max_time"),
    *("trainer.min_epochs", "trainer.min_steps", "trainer.logger", "trainer.callbacks"),
    *("trainer.log_every_n_steps", "trainer.default_root_dir", "trainer.profiler"),
    *("trainer.enable_model_summary", "trainer.enable_progress_bar", "trainer.barebones"),
    *("trainer.enable_checkpointing", "trainer.num_sanity_val_steps", "trainer.detect_anomaly"),
    *("trainer.limit_val_batches", "trainer.val_check_interval", "trainer.check_val_every_n_epoch"),
    *("trainer.deterministic", "trainer.benchmark", "trainer.inference_mode"),
    *("trainer.use_distributed_sampler", "trainer.enable_autolog_hparams"),
}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of all that a resolved config's weights depend on, sorted.

    A file that a run starts from counts by its contents, so that it may move.
    """
    parts = {name: config[name] for name in (*GROUPS, "trainer")}
    flat: dict[str, Any] = {"seed": config["seed"]}
    todo: list[tuple[str, Any]] = list(parts.items())
    while todo:
        key, value = todo.pop()
        if key in FREE:
            continue
        if isinstance(value, Mapping):
            todo += [(f"{key}.{name}", child) for name, child in value.items()]
        else:
            flat[key] = _contents(value) if key.endswith(".path") else value
    return dict(sorted(flat.items()))


def digest(found: Mapping[str, Any]) -> str:
    """An identity as 16 hexadecimal digits."""
    text = json.dumps(found, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def protocol(config: Mapping[str, Any], evaluation: str) -> str:
    """A digest of all that an evaluation's scores depend on besides the weights.

    Args:
        config: a run's, resolved.
        evaluation: its name among `evals`.
    """
    data = {name: config["data"].get(name) for name in ("eval_decode", "val_share")}
    beside = {name: config.get(name) for name in ("baselines", "baseline", "feature_dtype")}
    return digest({"settings": config["evals"].get(evaluation), **data, **beside})


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, sorted."""
    both = {**one, **other}
    return sorted(k for k in both if k not in one or k not in other or one[k] != other[k])


def _contents(path: Any) -> Any:
    """A digest of what lies at a path to weights, or the path if nothing does."""
    if not isinstance(path, str):
        return path
    file = Path(path).expanduser()
    file = file / "checkpoints/last.ckpt" if file.is_dir() else file
    try:
        with file.open("rb") as opened:
            return f"contents {hashlib.file_digest(opened, 'sha256').hexdigest()[:16]}"
    except OSError:
        return path
