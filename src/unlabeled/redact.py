"""Keeps keys and passwords out of what a run writes down."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

NAMES = re.compile(r"(api_?key|passw|secret|token|credential)", re.IGNORECASE)
SHORTEST = 8  # characters of a value of the environment that is looked for in texts
HIDDEN = "(hidden)"
GIVEN = re.compile(  # WANDB_API_KEY=..., logger.wandb.api_key=..., also among other words
    r"([\w.]*(?:api_?key|passw\w*|secret|access_token|auth_token)\w*\s*[=:]\s*['\"]?)"
    r"(?!null\b)[^\s,\]}'\"]+",
    re.IGNORECASE,
)
T = TypeVar("T")


def hidden(content: T) -> T:
    """The same text, list or mapping without the secrets of the environment, or named as such.

    Secrets are the values of environment variables whose name says so (WANDB_API_KEY,
    HF_TOKEN, ...), and in texts what follows such a name and an equals sign.
    """
    values = [
        value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST
    ]
    return _without(content, sorted(values, key=len, reverse=True))


@contextmanager
def hidden_command() -> Iterator[None]:
    """For libraries that write the command line down: they find it without secrets.

    W&B does, when a run starts, and has no setting for it.
    """
    given, sys.argv = sys.argv, hidden(sys.argv)
    try:
        yield
    finally:
        sys.argv = given


def hide_in_logs() -> None:
    """Has what this process logs from now on, and its workers, go without secrets."""
    logging.setLogRecordFactory(_Record)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return hidden(super().getMessage())


def _without(content: Any, values: list[str]) -> Any:
    if isinstance(content, dict):
        return {_without(k, values): _without(v, values) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [_without(item, values) for item in content]
    if not isinstance(content, str):
        return content
    for value in values:
        content = content.replace(value, HIDDEN)
    return GIVEN.sub(rf"\g<1>{HIDDEN}", content)
