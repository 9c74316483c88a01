"""What CPU programs allocate stays with the process, so that the next step finds it."""

import ctypes
import platform
import resource
import subprocess
import sys

import pytest

from launcher.runtime.allocator import keep_freed_memory

# Takes, writes and frees 64 MiB, as a program's run does; prints the page faults of the last time.
ROUNDS = """
import resource, sys
from launcher.runtime.allocator import keep_freed_memory
if sys.argv[1] == "keeping":
    keep_freed_memory()
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (64 << 20) // resource.getpagesize()


def faults(how: str) -> int:
    command = [sys.executable, "-c", ROUNDS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_that_was_freed_is_there_for_the_next_step():
    assert faults("keeping") < PAGES / 10
    assert faults("plain") > PAGES / 2


def test_other_c_libraries_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
