"""The GPUs of this machine, shared out among members that run at once."""

import os
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get(VISIBLE)) is not None:
        return [name for name in named.split(",") if name]
    found = (p.name.removeprefix("nvidia") for p in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((n for n in found if n.isdecimal()), key=int)


def share(gpus: list[str], slot: int, per: int) -> list[str]:
    """The GPUs of a slot: `per` neighbours; slots share where there are more of them than GPUs."""
    return [gpus[(slot * per + i) % len(gpus)] for i in range(min(per, len(gpus)))]
