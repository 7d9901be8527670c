"""A member of several processes, as a command of its own.

Lightning starts the others by running this process's command line again. In a sweep that would be
the sweep, so such a member needs a process whose command line is the member's alone.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

import __main__
from unlabeled.sweep.gpus import visible

SWEEPS = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper", "hydra.sweep")
SWEEPS += ("hydra.mode", "hydra.run.dir")
PATIENCE = 5  # seconds between the wish to end and the end
POLL_SECONDS = 0.1
SAYS = "unlabeled: "  # before the reason that a command ends with
KEPT = 1 << 16  # bytes of what a member said last

_running: set["subprocess.Popen[bytes]"] = set()


def several(config: DictConfig) -> bool:
    """Whether the trainer of a run's config is to start further processes."""
    trainer = OmegaConf.select(config, "trainer")
    if trainer is None:
        return False
    if trainer.get("num_nodes") not in (None, 1):
        return True
    devices = trainer.get("devices")
    if devices in (None, "auto", -1, "-1"):
        return trainer.get("accelerator") != "cpu" and len(visible()) > 1
    if isinstance(devices, str) and not devices.isdecimal():
        devices = [part for part in devices.split(",") if part.strip()]
    return (int(devices) if isinstance(devices, int | str) else len(devices)) > 1


def program() -> list[str]:
    """How this process was started, without overrides: a member is started likewise."""
    spec = __main__.__spec__
    named = [os.path.abspath(sys.argv[0])] if spec is None else ["-m", spec.name]
    given = get_args_parser().parse_known_args(sys.argv[1:])[0]
    flags = {name: getattr(given, name) for name in ("config_path", "config_name", "config_dir")}
    told = [f"--{k.replace('_', '-')}={value}" for k, value in flags.items() if value]
    return [sys.executable, *named, *told]


def line(
    program: Sequence[str],
    config: DictConfig,
    overrides: Sequence[str],
    *,
    sweep: Path,
    folder: str,
    number: int,
) -> list[str]:
    """The command of one member.

    Args:
        program: what stands before the overrides.
        config: the sweep's, with Hydra's part.
        overrides: the member's.
        sweep: the sweep's folder.
        folder: the member's, in the sweep's.
        number: the member's.
    """
    kept = [text for text in config.hydra.overrides.hydra if not _of_sweeps(text)]
    own = {"run.dir": sweep / folder, "sweep.dir": sweep, "sweep.subdir": folder, "job.id": number}
    given = [f"hydra.{key}={_quoted(str(value))}" for key, value in own.items()]
    return [*program, *overrides, *kept, *given, f"hydra.job.num={number}"]


def call(command: Sequence[str]) -> tuple[int, str]:
    """Runs a command to its end; its code, and what it said last, which is also said here.

    All processes that it started end with it.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group, to end all of it
    )
    _running.add(process)
    said = b""
    try:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        over, more = False, None
        while not over and more != b"":
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
            over = process.poll() is not None  # before reading: what others hold open is not read
            while more := process.stdout.read(KEPT):
                sys.stdout.buffer.write(more)
                sys.stdout.buffer.flush()
                said = (said + more)[-KEPT:]
        return process.wait(), said.decode(errors="replace")
    finally:
        _end(process)
        _running.discard(process)


def stop() -> None:
    """Ends the commands that run in this process's name."""
    for process in list(_running):
        _end(process)


def why(code: int, said: str) -> str:
    """Why a command ended with a code, in one line, from what it said."""
    lines = [text.strip() for text in said.splitlines() if text.strip()]
    first = next((i for i, text in enumerate(lines) if text.startswith(SAYS)), None)
    if first is not None and code > 0:
        lines = [text for text in lines[first : first + 4] if not text.startswith("(debug=true")]
        told = lines if code == 2 else lines[:1]
        return "; ".join(told).removeprefix(SAYS)
    ended = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"{ended}: {lines[-1][:300]}" if lines else ended


def _of_sweeps(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0].partition("@")[0]
    return any(key == name or key.startswith(f"{name}.") for name in SWEEPS)


def _quoted(text: str) -> str:
    """As Hydra reads it back whatever is in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _end(process: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGINT, signal.SIGKILL):  # the first as by Ctrl-C: the run notes it
        if number == signal.SIGINT and process.poll() is not None:
            continue
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
