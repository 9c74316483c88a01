"""Measuring what starting a program takes the thread that starts it, beside the program's work.

Two halves of the devices run a program again and again, side by side as stages do; and all of them run one
program with as many rounds: the difference is what starting took. The programs have a little work, so that
they are started while devices compute: where those compute on the cores that start programs, that takes
longer than on idle ones, above all with many arrays.
"""

import statistics
from collections.abc import Sequence

import jax
import numpy as np

from launcher.runtime.profiling.profile_timing import EACH, Job, call_s, prepared, with_arrays

_ARRAYS = (8, 128)  # that are taken and made beside those of the work
_LAUNCHES, _TRIES = 20, 3


def launch_s(devices: np.ndarray, job: Job) -> tuple[float, float]:
    """What starting a program takes, and what each array adds that it takes or makes."""
    few, many = (_start_s(devices, with_arrays(job, count)) for count in _ARRAYS)
    array_s = max(0.0, many - few) / 2 / (_ARRAYS[1] - _ARRAYS[0])
    return max(0.0, few - 2 * array_s * (_ARRAYS[0] + len(job.shapes))), array_s


def _start_s(devices: np.ndarray, job: Job) -> float:
    half = max(1, devices.size // 2)
    halves = [part for part in (devices[:half], devices[half:]) if part.size]
    chains = [prepared(job, part, (EACH,), rounds=1) for part in halves]
    at_once, arrays = prepared(job, devices, (EACH,), rounds=_LAUNCHES)

    def one_by_one() -> None:
        held: Sequence = [arrays for _, arrays in chains]
        for _ in range(_LAUNCHES):
            held = [program(*given) for (program, _), given in zip(chains, held, strict=True)]
        jax.block_until_ready(held)

    def whole() -> None:
        jax.block_until_ready(at_once(*arrays))

    # A difference of two times: what else the machine does during one of them counts twenty times.
    tries = [call_s(one_by_one) - call_s(whole) for _ in range(_TRIES)]
    return statistics.median(tries) / _LAUNCHES / len(chains)
