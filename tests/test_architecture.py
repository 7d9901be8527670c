"""The rules of the layout, so that nobody has to remember them."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src/unlabeled"
FILES = sorted(SRC.rglob("*.py"))
NAMES = [str(f.relative_to(SRC)) for f in FILES]

COMMAND_LINE = {"annotations", "cli", "config", "explain", "help", "overrides", "tree"}

# folder or file -> what it may import from this package; anything else is an error
MAY_IMPORT = {
    "__init__": set(),
    "batch": set(),
    "draws": set(),
    "errors": set(),
    "lab": set(),
    "truth": set(),
    "checkpoints": {"errors"},
    "disk": set(),
    "identity": set(),
    "lock": set(),
    "group": {"dist", "errors"},
    "memory": set(),
    "provenance": set(),
    "redact": set(),
    "shown": set(),
    "spectrogram": set(),
    "scenes": {"draws"},
    "dist": set(),
    "optim": set(),
    "lars": set(),
    "backbones": {"dist", "spectrogram"},
    "parts": {"batch", "dist", "draws", "lab"},
    "method": {"batch", "dist", "draws", "optim"},
    "methods": {"batch", "dist", "draws", "lab", "optim", "parts", "method"},
    "augment": {"batch", "draws", "lab", "spectrogram"},
    "data": {"batch", "draws", "errors", "truth", "scenes", "spectrogram"},
    "evaluate": {
        *("batch", "disk", "dist", "draws", "lars", "optim", "parts", "backbones"),
        *("spectrogram", "truth"),
    },
    "callbacks": {
        *("redact", "backbones", "disk"),
        *("batch", "checkpoints", "dist", "draws", "fsdp", "parts", "evaluate", "shown", "slurm"),
    },
    "report": {"batch", "dist", "parts", "evaluate", "shown"},
    "dashboards": {"callbacks", "report", "shown", "slurm"},
    **{name: COMMAND_LINE | {"errors", "redact"} for name in COMMAND_LINE},
    "slurm": {"errors"},
    "precision": set(),
    "fsdp": {"dist"},
    "folder": {
        *("checkpoints", "disk", "errors", "identity", "lock"),
        "provenance",
        "redact",
        "slurm",
    },
    "sweep": {"annotations", "config", "errors", "redact", "slurm", "report"},
    "train": {
        "checkpoints",
        "cli",
        "config",
        "folder",
        "group",
        "memory",
        "callbacks",
        "dashboards",
        "evaluate",
        "report",
        "backbones",
        "slurm",
        "precision",
    },
}


def unit(path):
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unlabeled"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "unlabeled" and len(parts) > 1}
    return found - {unit(path)}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_downwards(path):
    assert imports(path) <= MAY_IMPORT[unit(path)]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_imports(path):
    importlib.import_module(".".join(path.relative_to(SRC.parent).with_suffix("").parts))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_stay_short(path):
    limit = 130 if unit(path) == "methods" else 250
    assert len(path.read_text().splitlines()) <= limit


def test_methods_do_not_import_one_another():
    for path in (SRC / "methods").glob("*.py"):
        assert "unlabeled.methods" not in path.read_text()


def test_only_dist_talks_to_other_processes():
    for path in FILES:
        if path.name != "dist.py":
            assert "torch.distributed" not in path.read_text(), path


def test_only_the_command_line_knows_hydra():
    for path in FILES:
        if unit(path) not in COMMAND_LINE | {"train", "sweep"}:
            tree = ast.parse(path.read_text())
            modules = {
                name.split(".")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in (
                    [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
            }
            assert "hydra" not in modules, path


def test_no_signature_of_ours_takes_any_keyword():
    # Lightning's hooks are passed on as they come
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                assert node.args.kwarg is None, f"{path}: {node.lineno}"


def test_no_folder_of_odds_and_ends():
    names = {p.stem for p in SRC.rglob("*")}
    assert not names & {"utils", "util", "core", "common", "base", "misc", "helpers"}


def test_a_method_is_one_file_and_has_a_config():
    used = "".join(p.read_text() for p in (ROOT / "conf/method").glob("*.yaml"))
    for path in (SRC / "methods").glob("*.py"):
        if path.stem != "__init__":
            assert f"_target_: unlabeled.methods.{path.stem}." in used, path


def test_every_method_states_its_papers_result():
    for path in (ROOT / "conf/method").glob("*.yaml"):
        if path.stem not in ("none", "demo"):
            text = path.read_text()
            assert "Published:" in text, path
            assert "ull-scale result: not run by us" in text, path
            assert "https://" in text, path
