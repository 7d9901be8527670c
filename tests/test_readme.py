"""Every command of the README composes, passes the check and, made small, runs.

Those that need GPUs or ImageNet are not started. Inline code that is nothing but overrides is
checked like a command.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import CONF, RECORDINGS, ROOT
from PIL import Image
from test_runs import unlabeled
from track_file import with_tracks

from unlabeled import cli, overrides

README = ROOT / "README.md"
SHELLS = ("bash", "sh", "shell", "console")
PLACEHOLDERS = {"RUN": "outputs/demo", "DIR": "/nowhere", "PATH": "/nowhere"}  # the reader's own
NOT_STARTED = {  # an override that keeps a command from being started here -> why
    "data=imagenet": "needs ImageNet",
    "data=ucf101": "needs UCF101",
    "data=video_folder": "needs videos; test_video_data.py runs it",
    "data=audio_video_folder": "needs videos; test_video_data.py runs it",
    "experiment=imagenet": "needs ImageNet and GPUs",
    "hydra/launcher=slurm": "needs a cluster",
    "trainer=ddp": "needs GPUs",
}
SMALL = [
    *("data.batch_size=16", "data.limit=32", "data.workers=0"),
    *("data.eval_decode.size=16", "data.eval_decode.resize=16", "data.size=16"),
    *("trainer=cpu", "trainer.precision=32-true", "trainer.max_steps=2"),
]
SHORT = {  # of an evaluation
    "linear": ["EVAL.epochs=1", "EVAL.stages=[final]"],
    "semisup": ["EVAL.epochs=1", "EVAL.batch_size=8"],
    "health": ["data.layout.test_share=0.5", "data.limit=16"],
    "retrieval": ["data.layout.test_share=0.5", "data.limit=16"],
}
TREE = ["data=folder", "data.root=photos", "data.layout.test_share=0.2"]
FLAGS_WITH_VALUE = {"--config-dir", "-cd", "--config-name", "-cn", "--cfg", "-c", "--package", "-p"}
# Words that may stand before a command: settings of the environment.
SETTING = re.compile(r"[A-Z_][A-Z0-9_]*=.*")


def commands(text: str) -> list[str]:
    """Lines of the fenced shell blocks, continued lines joined, comments and outputs left out."""
    found = []
    for language, block in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S):
        if language not in SHELLS:
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            rest = words
            while rest and (SETTING.fullmatch(rest[0]) or rest[0] == "export"):
                rest = rest[1:]
            for part in _split(rest):
                found.append(shlex.join(part))
    return found


def _split(words: list[str]) -> list[list[str]]:
    """The commands of a line with `&&`, `;` or `|`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", ";", "|", "||"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def wrong(command: str) -> list[str]:
    """What is wrong with a command, as far as that shows without running it."""
    words = shlex.split(command)
    program = words[0]
    name = Path(program).name
    if name == "unlabeled":
        return _wrong_overrides(words[1:])
    if name == "make":
        return _wrong_targets(words[1:])
    if re.fullmatch(r"python3?(\.\d+)?", name):
        return _wrong_python(words[1:])
    if name == "pip" and words[1] == "install":
        return _wrong_packages(words[2:])
    if name == "sbatch":
        return _wrong_job(words[1:])
    if name == "wandb" and words[1:2] == ["sweep"]:  # tests/test_wandb_sweeps.py reads the files
        return [] if (ROOT / words[2]).is_file() else [f"there is no {words[2]}"]
    if name in ("git", "cd", "tensorboard", "wandb", "apt", "apt-get", "sudo", "source", "pip"):
        return []  # not ours
    if program.startswith(".venv/bin/") or name in (
        "pytest",
        "pre-commit",
        "ruff",
        "activate",
        ".",
    ):
        return []
    return [f"a command that this test does not know: {command}"]


def _wrong_overrides(words: list[str]) -> list[str]:
    lines, sweep, skip = [], False, False
    for word in words:
        if skip:
            skip = False
        elif word in FLAGS_WITH_VALUE:
            skip = True
        elif word in ("-m", "--multirun"):
            sweep = True
        elif not word.startswith("-"):
            lines.append(word)
        elif word not in ("--help", "-h", "--resolve", "--hydra-help"):
            return [f"unlabeled knows no {word}"]
    lines = [_filled(line) for line in lines]
    cli._prefer(CONF)  # as the command line does
    return overrides.mistakes(CONF, "train", lines, sweep=sweep)


def _wrong_job(words: list[str]) -> list[str]:
    """A batch file of ours, with overrides behind it."""
    flags = [word for word in words if word.startswith("-")]
    file, *lines = [word for word in words if not word.startswith("-")]
    if not (ROOT / file).is_file():
        return [f"there is no {file}"]
    if odd := [flag for flag in flags if not re.fullmatch(r"--[a-z-]+=\S+", flag)]:
        return [f"sbatch options are --name=value here: {odd}"]
    return _wrong_overrides(lines)


def _filled(line: str) -> str:
    key, equals, value = line.partition("=")
    return f"{key}{equals}{PLACEHOLDERS.get(value, value)}"


def _wrong_targets(words: list[str]) -> list[str]:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.M))
    variables = set(re.findall(r"^([A-Z]+)\s*[?:]?=", text, re.M))
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name not in variables:
            found.append(f"the Makefile has no variable {name}")
        elif not equals and name not in targets:
            found.append(f"the Makefile has no target {name}")
        elif name == "ARGS" and "demo" in words:
            found += _wrong_overrides(shlex.split(value))
    return found


def _wrong_python(words: list[str]) -> list[str]:
    if words[:2] == ["-m", "unlabeled.train"]:
        return _wrong_overrides(words[2:])
    if words[:1] == ["-m"]:
        return [] if words[1] in ("venv", "pip", "pytest", "http.server") else [f"-m {words[1]}?"]
    if not words or words[0] == "-c":
        return []
    if words[0] == "src/unlabeled/train.py":
        return _wrong_overrides(words[1:])
    script = ROOT / words[0]
    if not script.is_file():
        return [f"there is no {words[0]}"]
    said = _helped(script)
    if said.returncode:
        return [f"{words[0]} --help ended with {said.returncode}: {said.stderr}"]
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", said.stdout))
    flags = [w.partition("=")[0] for w in words[1:] if w.startswith("-")]
    return [f"{words[0]} takes no {flag}" for flag in flags if flag not in known]


def _wrong_packages(words: list[str]) -> list[str]:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = set(extras["optional-dependencies"])
    found = []
    for word in words:
        if match := re.search(r"(?:^\.|unlabeled)\[(.*)\]", word):
            missing = set(match[1].split(",")) - known
            found += [f"there is no extra {name}" for name in sorted(missing)]
    return found


@functools.cache
def _helped(script: Path) -> subprocess.CompletedProcess[str]:
    return _ran([sys.executable, str(script), "--help"])


def _ran(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folders = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    return subprocess.run(
        words,
        cwd=ROOT,
        env={**environment, "PATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )


def spellings(text: str) -> list[str]:
    """Overrides that stand in the text or its tables, as commands."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    inline = [code.split() for code in re.findall(r"`([^`\n]+)`", text)]
    override = re.compile(r"[a-z][\w.@]*=[^…<]+")
    return [
        shlex.join(["unlabeled", *words])
        for words in inline
        if all(override.fullmatch(word) for word in words)
    ]


def made_small(command: str) -> list[str] | None:
    """Arguments of a run of seconds, or None for a command that is not to be started."""
    words = shlex.split(command)
    if words[0] != "unlabeled" or any(w.startswith(tuple(NOT_STARTED)) for w in words):
        return None
    if "-m" in words:  # two jobs
        swept = [w for w in words if re.fullmatch(r"[^\[(]+,.*", w)]
        for i, word in enumerate(swept):
            first = ",".join(word.split(",")[: 2 if i == 0 else 1])
            words[words.index(word)] = first
    small = list(SMALL)
    if not any(w.startswith(("data=", "experiment=")) for w in words):
        small += TREE
    sized = {**conftest.OWN, "ave_net": conftest.AVE_NET}
    names = [*RECORDINGS, "ave_net"]
    recorded = next((m for m in names if f"experiment=scenes/{m}" in words), None)
    if recorded is not None:
        small = [x for x in small if not x.startswith(("data.size", "data.eval_decode"))]
        small += with_tracks([*conftest.SHORT, *sized.get(recorded, [])])
    elif not any(w.startswith(("backbone=", "method=none")) for w in words):
        small.append("backbone.width=16")
    if not any(re.match("method=|experiment=", w) for w in words):
        small += ["method=simclr", "method.hidden=16"]
    if "hydra/sweeper=optuna" in words:
        small.append("hydra.sweeper.n_trials=2")
    if "method=clusterfit" in words:
        small.append("method.clusters=4")
    if not any(w.startswith("evals=") for w in words):
        small.append("evals=knn")
    else:
        (evals,) = [w.removeprefix("evals=").strip("[]").split(",") for w in words if "evals=" in w]
        for name in ("knn", "linear") if evals == ["standard"] else evals:
            key = f"evals.{name.replace('/', '_')}"
            small += [line.replace("EVAL", key) for line in SHORT.get(name.split("/")[0], [])]
    return [_filled(word) for word in words[1:]] + small


TEXT = README.read_text() if README.exists() else ""
FOUND = sorted(set(commands(TEXT)))


@pytest.mark.parametrize("command", sorted({*FOUND, *spellings(TEXT)}))
def test_a_command_of_the_readme_is_right(command):
    assert wrong(command) == []


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Where a reader might stand: photos, tiny data sets, and a demo that was run."""
    here = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)
    for folder, count in (("photos", 24), ("data/cifar10/train", 24), ("data/cifar10/test", 4)):
        for kind in ("cat", "dog"):
            (here / folder / kind).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(here / folder / kind / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        done = unlabeled(
            *SMALL,
            *TREE,
            "method=simclr",
            "backbone.width=16",
            "evals=none",
            "hydra.run.dir=outputs/demo",
        )
        assert done == (0, "")
    made = _ran([sys.executable, "scripts/make_shards.py", here / "photos", here / "shards"])
    assert made.returncode == 0, made.stderr
    shutil.copytree(here / "outputs/demo", here / "outputs/mine")
    for name in ("demo", "mine"):
        (here / f"outputs/{name}/scores.json").write_text('{"knn/k20_t0.07/top1": 0.5}')
    return here


@pytest.mark.parametrize("command", [c for c in FOUND if made_small(c)])
def test_a_command_of_the_readme_runs(command, reader, monkeypatch):
    monkeypatch.chdir(reader)
    monkeypatch.setenv("UNLABELED_DATA", "data")
    monkeypatch.setenv("WANDB_MODE", "offline")
    code, errors = unlabeled(*made_small(command))
    assert code == 0, errors


def test_commands_are_found():
    text = """
Text with `unlabeled nothing`.

```bash
# a comment
make demo   # and another
UNLABELED_DATA=/data unlabeled method=byol \\
    backbone=resnet50
cd x && make test
```

```yaml
unlabeled: no
```
"""
    assert commands(text) == [
        *("make demo", "unlabeled method=byol backbone=resnet50", "cd x", "make test")
    ]


def test_spellings_are_found():
    text = "| `evals=[knn,linear]` | `data.root=DIR`, `backbone=timm backbone.name=x` |\n`method=…`"
    assert [shlex.split(line)[1:] for line in spellings(text)] == [
        *(["evals=[knn,linear]"], ["data.root=DIR"], ["backbone=timm", "backbone.name=x"])
    ]


@pytest.mark.parametrize(
    "command",
    [
        "unlabeled method=byol backbone=resnet50 data=imagenet trainer=ddp evals=standard",
        "unlabeled method=none backbone=checkpoint backbone.path=RUN evals=standard",
        "unlabeled -m method=simclr,byol seed=0,1",
        "unlabeled data=folder data.root=DIR",
        "unlabeled augment@method.augment=mild optim@method.optim=adamw",
        "unlabeled backbone=timm backbone.name=resnet50",
        "make bench ARGS=--check",
        "make demo ARGS='trainer.max_steps=10 evals.linear.epochs=2'",
        "python scripts/export.py RUN --format timm",
        "python src/unlabeled/train.py method=byol",
        "pip install '.[bench]'",
        "sbatch --nodes=2 scripts/slurm/train.sbatch method=byol data=imagenet",
        "wandb sweep scripts/wandb/methods.yaml",
        "unlabeled -m hydra/launcher=slurm launcher.nodes=2 launcher.time=1-0 seed=0,1",
    ],
)
def test_right_commands_pass(command):
    assert wrong(command) == []


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("unlabeled method=simclr method.temprature=0.1", "did you mean `temperature`?"),
        ("unlabeled method=simclear", "did you mean `method=simclr`?"),
        ("unlabeled method=simclr,byol", "several values need -m"),
        ("unlabeled data=folder", "`data.root`: no value given"),
        ("unlabeled --frobnicate", "unlabeled knows no --frobnicate"),
        ("python -m unlabeled.train sed=0", "did you mean `seed`?"),
        ("python src/unlabeled/train.py sed=0", "did you mean `seed`?"),
        ("make everything", "the Makefile has no target everything"),
        ("make demo ARGS=trainer.max_step=3", "did you mean `max_steps`?"),
        ("make demo ARG=3", "the Makefile has no variable ARG"),
        ("python scripts/exprt.py RUN", "there is no scripts/exprt.py"),
        ("python scripts/export.py RUN --fromat timm", "takes no --fromat"),
        ("sbatch scripts/slurm/trian.sbatch method=byol", "there is no scripts/slurm/trian.sbatch"),
        ("sbatch scripts/slurm/train.sbatch method=boyl", "did you mean `method=byol`?"),
        ("wandb sweep scripts/wandb/temprature.yaml", "there is no scripts/wandb/temprature.yaml"),
        ("pip install '.[benhc]'", "there is no extra benhc"),
        ("unlabelled method=byol", "a command that this test does not know"),
    ],
)
def test_wrong_commands_are_caught(command, says):
    assert any(says in line for line in wrong(command)), wrong(command)
