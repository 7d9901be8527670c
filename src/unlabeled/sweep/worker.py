"""The process of one member, started by `unlabeled.sweep.local`; it ends with its launcher."""

import os
import pickle
import sys
import threading


def main() -> None:
    """Runs the member that standard input describes, written by the launcher alone."""
    given = sys.stdin.buffer
    size = int.from_bytes(given.read(8), "big")
    state, what = pickle.loads(given.read(size))
    threading.Thread(target=_watch, args=(given,), daemon=True).start()
    from hydra.core.singleton import Singleton
    from hydra.core.utils import setup_globals

    from unlabeled.sweep.run import run

    Singleton.set_state(state)
    setup_globals()
    member = run(**what)
    if member.state != "finished":
        print(f"unlabeled: {member.reason}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(0 if member.state == "finished" else member.code or 1)


def _watch(given: object) -> None:
    given.read()  # type: ignore[attr-defined]  (nothing comes but the end)
    if command := sys.modules.get("unlabeled.sweep.command"):
        command.stop()
    os._exit(1)


if __name__ == "__main__":
    main()
