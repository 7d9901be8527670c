"""Files of features: reserved whole, written in rows by several processes, read memory-mapped."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unlabeled import dist

try:
    import fcntl
except ImportError:  # not on Windows, where nothing keeps two runs from the same work
    fcntl = None

# What a file says it holds. numpy has no bfloat16: its bits are kept as integers.
KEPT = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}
WAIT = 1.0  # seconds between two looks at a lock that another run holds


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of features of a shape, without the hundred of a file's header."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(KEPT[dtype]).itemsize


def reserve(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Makes a file of zeros, with its place on the disk where the system gives such promises.

    Raises:
        OSError: there is no room.
    """
    with path.open("wb") as file:
        header = {"descr": KEPT[dtype], "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        whole = file.tell() + size(dtype, shape)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, whole)
        else:
            os.ftruncate(file.fileno(), whole)


class Writer:
    """Writes rows of a reserved file, from one row on.

    By plain writing: a full disk is an error then, where a memory map would end the process,
    and what was written counts as nobody's memory.
    """

    def __init__(self, path: Path, dtype: str, row: int) -> None:
        self.name, self.dtype = path.name.partition(".")[0], getattr(torch, dtype)
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            start = file.tell() + row * size(dtype, shape[1:])
        self.file = path.open("r+b")
        self.file.seek(start)

    def write(self, rows: Tensor) -> None:
        """The next rows (B, ...), on any device.

        Raises:
            FloatingPointError: one is not finite in the file's type.
        """
        values = rows.to(self.dtype).cpu()
        if not values.isfinite().all():
            raise FloatingPointError(f"the features {self.name} are not finite")
        bits = values.view(torch.int16) if self.dtype == torch.bfloat16 else values
        self.file.write(bits.contiguous().numpy().data)

    def close(self) -> None:
        """All of it on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def read(path: Path, dtype: str, rows: int) -> Tensor:
    """The features of a whole file, memory-mapped.

    Raises:
        ValueError: the file is cut short, or of another number of rows.
    """
    try:
        # Copy on write: torch wants writable memory, and the file stays as it is.
        values = np.load(path, mmap_mode="c")
        if len(values) != rows or values.dtype.str != KEPT[dtype]:
            raise ValueError(f"it holds {len(values)} rows of {values.dtype}, not {rows}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"the features in {path} are damaged ({error}): delete it") from error
    found = torch.from_numpy(values)
    return found.view(torch.bfloat16) if dtype == "bfloat16" else found


@contextlib.contextmanager
def held(folder: Path, device: torch.device | str, waiting: Callable[[], None]) -> Iterator[None]:
    """A folder for this run's processes alone; another run's is waited for.

    The system takes a lock from a process that was killed. Where the file system has no locks,
    two runs may do the same work.

    Args:
        folder: made if it is not there.
        device: of what processes tell each other.
        waiting: called once if another run holds the folder.
    """
    with contextlib.ExitStack() as stack:
        lock = None
        with together(device):
            if dist.rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((folder / "lock").open("a"))
        told = False
        # Every look is told to all: nobody waits for longer than processes may for each other.
        while not dist.broadcast(torch.tensor([_locked(lock)], device=device).int()).item():
            if not told:
                waiting()
            told = True
            time.sleep(WAIT)
        yield


def _locked(lock: object) -> bool:
    """Whether the lock is ours now."""
    if lock is None or fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@contextlib.contextmanager
def together(device: torch.device | str) -> Iterator[None]:
    """All processes leave at once, and with an error in one of them all have one.

    Else the others would wait for it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = dist.reduce_sum(torch.tensor([float(error is not None)], device=device))
    if error is not None:
        raise error
    if failed.item():
        raise RuntimeError("another process could not extract its features: see its error")
