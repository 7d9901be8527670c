"""Files that are there whole or not at all."""

import os
from pathlib import Path


def replace(path: Path, text: str) -> None:
    """Writes a file, or its new contents, in one piece.

    Args:
        path: in a folder that exists, or whose own folder does.
        text: what it is to hold.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
