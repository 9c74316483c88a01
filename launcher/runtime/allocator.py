"""How the C library hands out memory, where CPU devices compute.

XLA's CPU backend allocates what a program needs anew at every run. glibc takes blocks of more than 32 MiB
from the system each time, and gives back what is free at the end of its heap, so that a step of the tiny GPT
on one device begins with 13,000 page faults, a fifth of its time. Here it keeps what it has, up to a limit.

Left out: C libraries other than glibc, which stay as they are.
"""

import ctypes

_MIB = 1 << 20
# From malloc.h. Together: no blocks outside the heap; what is free at its end stays; it grows by steps.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 1024 * _MIB, _M_TOP_PAD: 8 * _MIB}


def keep_freed_memory() -> None:
    """Have this process keep memory that it has freed, as far as its C library can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (
        AttributeError,
        OSError,
        TypeError,
    ):  # no glibc; on Windows there is no such library at all
        return
    for parameter, value in _SETTINGS.items():
        mallopt(parameter, value)
