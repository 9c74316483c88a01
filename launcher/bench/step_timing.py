"""How long a step takes where steps are started ahead of the device: groups of them, with one wait each."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

Started = TypeVar("Started")

_WARM_UP = 3
_GROUPS = 5


def median_step_s(
    start: Callable[[], Started], wait: Callable[[Started], object], steps: int
) -> float:
    """The median over groups of steps, of about a fifth of them each, after a few that warm up.

    Args:
        start: Starts a step, and returns what `wait` is to wait for.
    """
    for _ in range(_WARM_UP):
        wait(start())
    size = max(1, steps // _GROUPS)
    return statistics.median(_group_s(start, wait, size) / size for _ in range(steps // size))


def _group_s(start: Callable[[], Started], wait: Callable[[Started], object], size: int) -> float:
    began_s = time.perf_counter()
    for _ in range(size):
        last = start()
    wait(last)
    return time.perf_counter() - began_s
