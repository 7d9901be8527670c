"""Freed memory: a step's tensors get the pages of the step before."""

import os
import subprocess
import sys

import pytest

from unlabeled.memory import reuse_freed_memory

COUNT = """
import resource, torch
from unlabeled.memory import reuse_freed_memory
def taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(48 << 18)  # 48 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
taken()
print(taken(), reuse_freed_memory(), taken() and taken())
"""


def counted(environment):
    done = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, env=environment
    )
    assert not done.returncode, done.stderr
    before, known, after = done.stdout.split()
    return int(before), known == "True", int(after)


@pytest.fixture
def plain(monkeypatch):
    names = [n for n in os.environ if n.startswith("MALLOC_") or n == "GLIBC_TUNABLES"]
    for name in names:
        monkeypatch.delenv(name)
    return dict(os.environ)


def test_large_tensors_get_pages_that_were_cleared_before(plain):
    before, known, after = counted(plain)
    if not known:
        pytest.skip("this C library has no mallopt")
    assert after < before / 8


def test_what_the_user_set_stays(plain):
    assert not counted({**plain, "MALLOC_MMAP_THRESHOLD_": "1048576"})[1]
    assert not counted({**plain, "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"})[1]


def test_other_systems_are_left_alone(plain, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not reuse_freed_memory()
