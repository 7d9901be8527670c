"""How this process holds memory that it freed."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = (1 << 30, 32 << 20)  # bytes; releases of glibc before 2.35 take 32 MB at most


def reuse_freed_memory() -> bool:
    """Makes the C library keep freed tensors' memory for the next ones, and says whether it does.

    A step's buffers have the sizes of those of the step before. By itself glibc returns tensors of
    over 32 MB to the system when they are freed, and the system clears every page of the next one,
    which costs a CPU more than the arithmetic on it. What a user set by `MALLOC_*` or
    `GLIBC_TUNABLES` stays; other C libraries are left alone.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    large = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST)
    return bool(large and mallopt(M_TRIM_THRESHOLD, LARGEST[0]))
