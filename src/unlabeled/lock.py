"""A file that one process holds, and nobody once that process is dead."""

import errno
import fcntl
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class HeldError(Exception):
    """Another process holds the lock."""


class Lock:
    """A record lock: the kernel drops it with its process, however that ends.

    Processes it forks do not share it, so that the workers of a killed run hold up nobody.
    """

    def __init__(self) -> None:
        self.file: int | None = None

    def take(self, path: Path) -> None:
        """Takes it, for this process.

        Raises:
            HeldError: another process has it.
            OSError: the file cannot be made.
        """
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise HeldError(str(path)) from error
            log.warning("no locks on the disk of %s (%s): start one run at a time", path, error)

    def release(self) -> None:
        """Gives it back, if it was taken."""
        if self.file is not None:
            os.close(self.file)
            self.file = None
