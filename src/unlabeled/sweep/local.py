"""Members in processes of their own on this machine, several at once.

A process each, not a pool of them: memory and devices are free again after every member, and one
that the system kills takes no other with it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import cloudpickle
from hydra.core.singleton import Singleton

from unlabeled.sweep import members
from unlabeled.sweep.launch import told
from unlabeled.sweep.members import Member
from unlabeled.sweep.run import threads
from unlabeled.sweep.settings import Settings

POLL_SECONDS = 0.1
CONTINUES = "CUDA_VISIBLE_DEVICES"


def run_local(launcher: Any, sweep: Path, todo: list[Member], settings: Settings) -> None:
    """Runs members of a Hydra launcher, `settings.jobs` at once, by default one for each GPU."""
    per, gpus = settings.gpus_per_node or 1, visible()
    slots = settings.jobs or max(1, len(gpus) // per)
    free, running = list(range(min(slots, len(todo)))), {}
    waiting, left = list(todo), len(todo)
    extra = threads(slots)
    try:
        while waiting or running:
            while waiting and free:
                slot, member = free.pop(0), waiting.pop(0)
                mine = {CONTINUES: ",".join(share(gpus, slot, per))} if gpus else {}
                running[slot] = member, _start(launcher, sweep, member, {**extra, **mine})
            for slot, (member, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                free.append(slot)
                left -= 1
                told(sweep, _ended(sweep, member, process.returncode), left)
            time.sleep(POLL_SECONDS)
    finally:
        for member, process in running.values():
            _stop(process)
            _ended(sweep, member, process.returncode, stopped=True)


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get(CONTINUES)) is not None:
        return [name for name in named.split(",") if name]
    found = (p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((n for n in found if n.isdecimal()), key=int)


def share(gpus: list[str], slot: int, per: int) -> list[str]:
    """The GPUs of a slot: `per` neighbours; slots share where there are more of them than GPUs."""
    return [gpus[(slot * per + i) % len(gpus)] for i in range(min(per, len(gpus)))]


def tail(path: Path) -> str:
    """The last thing a member said: why it is gone, if it could not say so itself."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else ""


def _start(
    launcher: Any, sweep: Path, member: Member, more: dict[str, str]
) -> "subprocess.Popen[bytes]":
    what = {
        "context": launcher.hydra_context,
        "config": launcher.config,
        "task": launcher.task_function,
        "sweep": sweep,
        "number": member.number,
    }
    log: IO[bytes] = members.log_path(sweep, member.number).open("ab")
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "unlabeled.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **more},
        )
    # The pipe stays open: its end tells the worker that this process is gone.
    assert process.stdin is not None
    text = cloudpickle.dumps((Singleton.get_state(), what))
    try:
        process.stdin.write(len(text).to_bytes(8, "big") + text)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it ended at once; its log says why
    return process


def _ended(sweep: Path, member: Member, code: int | None, *, stopped: bool = False) -> Member:
    """A member's record, and what is missing in it where its process could not write it."""
    found = members.load(sweep, member.number)
    if found.state in members.ENDED:
        return found
    if stopped:
        return members.ended(sweep, member.number, "interrupted", "the sweep was interrupted")
    died = f"killed by signal {-code}" if code and code < 0 else f"ended with code {code}"
    said = tail(members.log_path(sweep, member.number))
    return members.ended(sweep, member.number, "failed", f"{died}: {said}" if said else died)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
