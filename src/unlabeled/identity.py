"""What makes a run another one: the part of its config that its weights depend on."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Where things lie, what is watched, and how many devices share a batch: `data.batch_size` is
# that of all together.
GROUPS = ("method", "backbone", "data")
FREE = {
    *("data.root", "data.workers", "data.max_unreadable", "data.eval_decode", "data.val_share"),
    *("data.layout.cache", "data.layout.cache_gb"),  # where copies of remote shards lie
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.plugins", "trainer.max_time"),
    *("trainer.min_epochs", "trainer.min_steps", "trainer.logger", "trainer.callbacks"),
    *("trainer.log_every_n_steps", "trainer.default_root_dir", "trainer.profiler"),
    *("trainer.enable_model_summary", "trainer.enable_progress_bar", "trainer.barebones"),
    *("trainer.enable_checkpointing", "trainer.num_sanity_val_steps", "trainer.detect_anomaly"),
    *("trainer.limit_val_batches", "trainer.val_check_interval", "trainer.check_val_every_n_epoch"),
    *("trainer.deterministic", "trainer.benchmark", "trainer.inference_mode"),
    *("trainer.use_distributed_sampler", "trainer.enable_autolog_hparams"),
}

# Files that count by their contents, so that they may move: sources, tracks, colours, permutations.
FILES = (".path", "data.tracks", "method.prior", ".permutations")
INSIDE = ("checkpoints/last.ckpt", "train.npz")  # of a run's folder, of one of tracks

# Where training would end says which share of it an update is: learning rates, momenta and the
# like depend on it, unless all of them are constant. Only then may a run grow longer.
LENGTH = ("trainer.max_epochs", "trainer.max_steps")
PACED = ("dino", "diverse_colorization", "swav", "tracking")  # methods/ that ask for `progress`
# Callbacks that watch, or write down. Any other is taken for one that changes weights.
WATCHING = {
    *("checkpoint", "health", "held_out", "metrics", "online", "progress", "throughput", "views"),
}
SKIPS = "callbacks.finite.policy"  # stays out of the identity unless updates may be left out


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of all that a resolved config's weights depend on, sorted.

    A file that a run starts from counts by its contents, so that it may move.
    """
    parts = {name: config[name] for name in (*GROUPS, "trainer")}
    parts["callbacks"] = dict(_changing(config.get("callbacks") or {}))
    flat: dict[str, Any] = {"seed": config["seed"]}
    todo: list[tuple[str, Any]] = list(parts.items())
    while todo:
        key, value = todo.pop()
        if key in FREE:
            continue
        if isinstance(value, Mapping):
            todo += [(f"{key}.{name}", child) for name, child in value.items()]
        else:
            flat[key] = _contents(value) if key.endswith(FILES) else value
    if not _paced(flat):
        flat = {key: value for key, value in flat.items() if key not in LENGTH}
    return dict(sorted(flat.items()))


def _changing(callbacks: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those, with their settings, that weights depend on."""
    for name, node in callbacks.items():
        place = str((node or {}).get("_target_", "")).rpartition(".")[0]
        kind = place.removeprefix("unlabeled.callbacks.")
        if node is None or kind in WATCHING:
            continue
        if kind != "finite":
            yield name, node
        elif node.get("policy") == "skip":
            yield "finite", {"policy": "skip"}


def _paced(flat: Mapping[str, Any]) -> bool:
    """Whether what a run does at an update depends on how many there will be."""
    moving = {"schedule": "constant", "warmup": 0, "weight_decay_end": None}  # what does not
    for key, value in flat.items():
        name = key.rpartition(".")[2]
        if key.startswith("method.") and name in moving and value != moving[name]:
            return True
        if name == "_target_" and str(value).startswith(
            tuple(f"unlabeled.methods.{m}." for m in PACED)
        ):
            return True
    return False


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


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ, sorted.

    What stopped at a loss that is not finite may go on by skipping it: up to there both do the
    same.
    """
    both = {**before, **now}
    found = {k for k in both if k not in before or k not in now or before[k] != now[k]}
    return sorted(found - FREE - ({SKIPS} if SKIPS in now else set()))


def holds_results(folder: Path) -> bool:
    """Whether scores or curves lie in a folder, which another run there would replace."""
    curves = folder / "metrics.csv"
    if (folder / "scores.json").exists():
        return True
    return curves.exists() and curves.read_bytes().count(b"\n") > 1


def refusal(folder: Path, keys: Sequence[str]) -> str:
    """Why a run with other values of these keys cannot go on in a folder, and what to do."""
    longer = (
        f"; to train longer from where it ended, write resume={folder} beside another folder"
        if set(keys) <= set(LENGTH)
        else ""
    )
    return (
        f"{folder} holds another run, which differs in {', '.join(keys)}: choose "
        f"another hydra.run.dir, or write resume=none to begin anew there{longer}"
    )


def _contents(path: Any) -> Any:
    """A digest of what lies at a path, or the path if nothing does."""
    if not isinstance(path, str):
        return path
    file = Path(path).expanduser()
    file = next((file / name for name in INSIDE if (file / name).is_file()), file)
    try:
        with file.open("rb") as opened:
            return f"contents {hashlib.file_digest(opened, 'sha256').hexdigest()[:16]}"
    except OSError:
        return path
