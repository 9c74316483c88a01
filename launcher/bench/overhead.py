"""`python -m launcher.bench overhead`: what the executor costs beyond what it executes.

Four parts, each a ratio or a time taken in one run, as medians of alternating steps:

    one        a plan of one stage and one microbatch, beside a plain `jax.jit` train step of the same model
    data       data parallel with 8 microbatches, beside a hand-written `lax.scan` accumulation in one jit
    waiting    pipelines whose instructions wait a known time instead of computing, beside the simulator's
               timeline: emulated devices share the cores, so real work could not show it
    host       the executor's own time per instruction, with the executables and copies taken out

    parts   which, as in one,host; default: all
    steps   how many are measured; default: 15
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

from launcher.bench import plain_steps, waiting
from launcher.bench.settings import check_keys, chosen, whole_number
from launcher.runtime import devices

_BARS = {"one": 1.03, "data": 1.05, "waiting": 1.05, "host": 30.0}
_DEVICES = 4


def run(settings: Mapping[str, str]) -> int:
    """Print a row per measurement; status 1 if one misses its bar."""
    check_keys("overhead", settings, ["parts", "steps"])
    parts, steps = chosen(settings, "parts", _BARS), whole_number(settings, "steps", 15)
    # Waiting occupies a thread per device, however few cores there are.
    os.environ.setdefault("NPROC", str(8 * _DEVICES))
    devices.emulate(_DEVICES)
    missed = 0
    for part in parts:
        for title, measured, unit in _PARTS[part](steps):
            missed += measured > _BARS[part]
            sys.stdout.write(f"{title:64}  {measured:7.3f}{unit}  (bar {_BARS[part]:g})\n")
            sys.stdout.flush()
    return 1 if missed else 0


def _one(steps: int):
    yield _beside("1 stage, 1 microbatch, 1 device / plain jit", steps, num_devices=1, count=1)
    yield _beside("1 stage, 1 microbatch, 4 devices / plain jit", steps, num_devices=4, count=1)


def _data(steps: int):
    yield _beside(
        "data parallel 4, 8 microbatches / lax.scan in a jit", steps, num_devices=4, count=8
    )


def _beside(title: str, steps: int, *, num_devices: int, count: int) -> tuple[str, float, str]:
    ours, peer = plain_steps.pair(num_devices=num_devices, num_microbatches=count)
    return title, _ratio(ours, peer, steps), " x"


def _ratio(ours: Callable[[], None], peer: Callable[[], None], steps: int) -> float:
    """The median over pairs of steps, one of each, after two pairs that warm up."""
    ratios = []
    for number in range(steps + 2):
        taken = [_seconds(step) for step in (ours, peer)]
        if number >= 2:
            ratios.append(taken[0] / taken[1])
    return statistics.median(ratios)


def _seconds(step: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    step()
    return time.perf_counter() - start_s


def _waiting(steps: int):
    for schedule, virtual_stages in waiting.SCHEDULES:
        pipeline = waiting.WaitingPipeline(schedule, virtual_stages)
        taken_s = statistics.median(pipeline.step_s() for _ in range(steps))
        name = (
            f"{schedule}, 4 submeshes, 8 microbatches / its timeline ({pipeline.timeline_s:.2f} s)"
        )
        yield name, taken_s / pipeline.timeline_s, " x"


def _host(steps: int):
    for schedule, virtual_stages in waiting.SCHEDULES:
        pipeline = waiting.WaitingPipeline(schedule, virtual_stages, instant=True)
        taken_s = statistics.median(pipeline.dispatch_s() for _ in range(max(20, steps)))
        name = f"{schedule}: host time per instruction, of {pipeline.num_instructions}"
        yield name, taken_s / pipeline.num_instructions * 1e6, " us"


_PARTS = {"one": _one, "data": _data, "waiting": _waiting, "host": _host}
