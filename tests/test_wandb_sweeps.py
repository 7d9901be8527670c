"""scripts/wandb/*.yaml: the commands that W&B's agent makes of them are command lines of ours."""

import itertools

import pytest
import yaml
from conftest import CONF, ROOT
from hydra import compose, initialize_config_dir

from unlabeled import overrides

FILES = sorted((ROOT / "scripts/wandb").glob("*.yaml"))


def commands(path):
    """Every command of a grid, else one for each end of every parameter."""
    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load(path.read_text())
    values = {}
    for key, node in sweep["parameters"].items():
        values[key] = node.get("values") or [node["min"], node["max"]]
    for chosen in itertools.product(*values.values()):
        given = {key: {"value": v} for key, v in zip(values, chosen, strict=True)}
        macros = agent.create_sweep_command_args({"args": given})
        command = []
        for part in agent.create_sweep_command(list(sweep["command"])):
            name = part.removeprefix("${").removesuffix("}")
            if name == "env":
                command.append("env")
            elif name in macros:
                command += macros[name]
            else:
                command.append(part)
        yield command


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_command_composes_and_has_the_metric(path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    metric = yaml.safe_load(path.read_text())["metric"]
    assert metric["goal"] == "maximize"
    made = list(commands(path))
    assert len(made) >= 4
    for command in made[:: max(1, len(made) // 6)]:
        assert command[:2] == ["env", "unlabeled"]
        assert overrides.mistakes(CONF, "train", command[2:], targets=False) == []
    assert overrides.mistakes(CONF, "train", made[-1][2:]) == []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=made[-1][2:], return_hydra_config=True)
    assert cfg.hydra.run.dir == "outputs/wandb/abc123"
    assert "wandb" in cfg.logger
    kind, name = metric["name"].split("/")[:2]
    assert name in cfg.evals if kind == "eval" else name.split("_")[0] == "knn"
    if kind == "online":
        assert "online_knn" in cfg.callbacks
    for line in made[-1][2:]:
        key = line.partition("=")[0]
        if "@" not in key and key != "hydra.run.dir" and "." in key:
            assert str(_at(cfg, key)).replace(" ", "") == line.partition("=")[2]


def _at(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nothing_is_chosen_by_test_images(path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    metric = yaml.safe_load(path.read_text())["metric"]["name"]
    command = next(commands(path))[2:]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        layout = compose("train", overrides=command).data.layout
    assert metric.startswith("online/") or layout["_target_"].endswith(".HeldOut")
