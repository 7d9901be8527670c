"""What a user can cause and mend, and how much is told of an error."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

FULL = "HYDRA_FULL_ERROR"  # 1: Hydra raises its errors; who sets it by hand wants tracebacks
OURS = "UNLABELED_RAISES"  # stands beside it where nobody did, also in processes started from here


class InputError(ValueError):
    """Wrong config or input. The process ends with code 2."""


def tracebacks_wanted() -> bool:
    """Whether the environment asks for tracebacks, as Hydra's users are used to."""
    return os.environ.get(FULL) == "1" and OURS not in os.environ


@contextmanager
def raised_errors() -> Iterator[None]:
    """Has Hydra raise its errors instead of printing them and ending the process."""
    set_here = {} if os.environ.get(FULL) == "1" else {FULL: "1", OURS: "1"}
    os.environ.update(set_here)
    try:
        yield
    finally:
        for name in set_here:
            del os.environ[name]
