"""What the command line costs before a run: whole processes, in CPU time."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_rows import Row, per_round, seconds

from unlabeled.cli import DONE, WRONG_INPUT, conf_dir

BARE = """\
import hydra

@hydra.main(version_base="1.3", config_path={conf!r}, config_name="train")
def main(cfg):
    pass

main()
"""
TORCH = """\
import sys
from unlabeled.train import main
sys.argv[1:] = {arguments!r}
try:
    main()
except SystemExit:
    pass
print(sum(name.partition(".")[0] == "torch" for name in sys.modules), file=sys.stderr)
"""
WRONG = ["method=simclr", "method.temprature=0.1"]
SHOWN = (["--help"], ["--cfg", "job"])
Command = tuple[list[str], int]  # and the code that it ends with


def rows(rounds: int = 9, error_rounds: int = 3) -> list[Row]:
    """`--help`, `--cfg job` and a config error, against what each needs at least.

    Args:
        rounds: turns of the commands that show something.
        error_rounds: turns of the config error, which imports everything.
    """
    unlabeled = [sys.executable, "-m", "unlabeled.train"]
    script = Path(sys.executable).with_name("unlabeled")
    if script.exists():
        unlabeled = [sys.executable, str(script)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE.format(conf=str(conf_dir())))
        for shown in SHOWN:
            text = " ".join(shown)
            commands = {
                "ours": ([*unlabeled, *shown], DONE),
                "bare": ([sys.executable, str(bare), *shown], DONE),
            }
            times = _times(commands, rounds, folder)
            found.append(
                _row(f"`unlabeled {text}` / a bare Hydra application's", 1.3, times, rounds)
            )
            count = [float(_torch_modules(shown, folder))]
            name = f"modules of torch that `unlabeled {text}` imports"
            found.append(Row(name, count, bar=0, better="low", unit=""))
        commands = {
            "ours": ([*unlabeled, *WRONG], WRONG_INPUT),
            "bare": ([sys.executable, "-c", _imports()], DONE),
        }
        times = _times(commands, error_rounds, folder)
        name = f"a config error (`{' '.join(WRONG)}`) / the imports it needs"
        found.append(_row(name, 1.5, times, error_rounds))
    return found


def _row(name: str, bar: float, times: Mapping[str, list[float]], rounds: int) -> Row:
    return Row(
        name,
        per_round(times["ours"], times["bare"]),
        bar=bar,
        better="low",
        ours=seconds(times["ours"]),
        other=seconds(times["bare"]),
        note=f"whole processes; median of {rounds} rounds of user + system time",
    )


def _times(commands: Mapping[str, Command], rounds: int, folder: str) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):  # the first fills the disk's cache
        for name, command in commands.items():
            spent = _cpu_time(command, folder)
            if turn:
                times[name].append(spent)
    return times


def _cpu_time(command: Command, folder: str) -> float:
    """User and system seconds of a process, and of those it waited for."""
    words, code = command
    null = subprocess.DEVNULL
    process = subprocess.Popen(words, cwd=folder, env=_environment(), stdout=null, stderr=null)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}, not {code}")
    return usage.ru_utime + usage.ru_stime


def _torch_modules(arguments: Sequence[str], folder: str) -> int:
    command = [sys.executable, "-c", TORCH.format(arguments=list(arguments))]
    done = subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, check=True
    )
    return int(done.stderr.split()[-1])


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _imports() -> str:
    """A program that imports Hydra and the module of every target of the config, and ends."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=WRONG[:1])
    modules = sorted({name.rpartition(".")[0] for name in _targets(cfg)})
    return "\n".join(f"import {name}" for name in ["hydra", *modules])


def _targets(node: Any) -> list[str]:
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(node, DictConfig):
        return []
    keys = [key for key in node if not OmegaConf.is_missing(node, key)]
    own = [str(node["_target_"])] if "_target_" in keys else []
    return own + [
        name
        for key in keys
        if not OmegaConf.is_interpolation(node, key)
        for name in _targets(node[key])
    ]
