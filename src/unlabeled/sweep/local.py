"""Members in processes of their own on this machine, several at once.

A process each, not a pool of them: memory and devices are free again after every member, and one
that the system kills takes no other with it.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import cloudpickle
from hydra.core.singleton import Singleton

from unlabeled.sweep import command, members
from unlabeled.sweep.gpus import VISIBLE, share, visible
from unlabeled.sweep.launch import told
from unlabeled.sweep.members import Member
from unlabeled.sweep.run import threads
from unlabeled.sweep.settings import Settings

POLL_SECONDS = 0.1


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
                mine = {VISIBLE: ",".join(share(gpus, slot, per))} if gpus else {}
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


def run_aside(launcher: Any, sweep: Path, member: Member) -> Member:
    """Runs one member in a process of its own, which says what it says where this one does."""
    process = _start(launcher, sweep, member, {}, aloud=True)
    try:
        return _ended(sweep, member, process.wait())
    finally:
        if process.poll() is None:
            _stop(process)
            _ended(sweep, member, process.returncode, stopped=True)


def tail(path: Path) -> str:
    """The last thing a member said: why it is gone, if it could not say so itself."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:300] if said else ""


def _start(
    launcher: Any, sweep: Path, member: Member, more: dict[str, str], *, aloud: bool = False
) -> "subprocess.Popen[bytes]":
    what = {
        "context": launcher.hydra_context,
        "config": launcher.config,
        "task": launcher.task_function,
        "sweep": sweep,
        "number": member.number,
        "overrides": member.overrides,
        "program": command.program(),
    }
    log: IO[bytes] = members.log_path(sweep, member.number).open("ab")
    with log:
        process = subprocess.Popen(
            [sys.executable, "-m", "unlabeled.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=None if aloud else log,
            stderr=None if aloud else subprocess.STDOUT,
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
    """Ends a worker, and what it started: it does when its input ends."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
