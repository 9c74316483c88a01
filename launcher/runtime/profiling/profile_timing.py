"""Timing small jobs on devices: loops long enough to be timed, repeated, and their median.

A job is repeated inside one program, a `lax.scan` that feeds each round's results to the next, so that what
is timed is the devices' work and not the host's. The same program runs on one device or on several at once,
each on its own values.

Of the times of several calls the lower quartile is taken, the median of the faster half: what else a machine
does makes calls slower and never faster.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_REPEATS, _LEAST_REPEATS = 15, 5  # the fewer where they take long
_ENOUGH_S = 1.0
_CALL_S = 0.004  # about how long a call is to take: shorter than a scheduler lets anybody else run
_MOST_ROUNDS = 512
EACH = "each"  # the axis of all devices
Body = Callable[[tuple[jax.Array, ...]], tuple[jax.Array, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is timed.

    Attributes:
        body: one round: arrays in, arrays of the same shapes out.
        shapes: of the arrays on one device.
        guess_s: about how long a round takes; decides how many there are.
        value: of all elements at the beginning; a body should keep it from running off.
    """

    body: Body
    shapes: tuple[tuple[int, ...], ...]
    guess_s: float
    dtype: jnp.dtype = jnp.float32
    value: float = 0.5


def round_s(job: Job, devices: np.ndarray, axes: Sequence[str] = (EACH,)) -> float:
    """Seconds of a round, with all the devices at it at once; `devices` has the shape of the mesh."""
    rounds = int(min(_MOST_ROUNDS, max(1, _CALL_S / job.guess_s)))
    program, arrays = prepared(job, devices, axes, rounds)
    return call_s(lambda: jax.block_until_ready(program(*arrays))) / rounds


def with_arrays(job: Job, number: int) -> Job:
    """The same job, which takes and makes so many arrays of one element beside."""

    def body(held):
        own, others = held[: len(job.shapes)], held[len(job.shapes) :]
        return *job.body(own), *(other + 1.0 for other in others)

    return replace(job, body=body, shapes=(*job.shapes, *[(1,)] * number))


def prepared(
    job: Job, devices: np.ndarray, axes: Sequence[str], rounds: int
) -> tuple[Callable, list[jax.Array]]:
    """The program of so many rounds on all the devices, and its arguments."""
    mesh, spec = Mesh(devices, axes), PartitionSpec(tuple(axes))

    def local(*arrays):
        if rounds == 1:  # in no loop, where XLA has slower code for convolutions
            return job.body(arrays)
        return lax.scan(lambda held, _: (job.body(held), None), arrays, length=rounds)[0]

    program = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    arrays = [
        jax.device_put(
            np.full((devices.size * rows, *rest), job.value, job.dtype), NamedSharding(mesh, spec)
        )
        for rows, *rest in job.shapes
    ]
    return program, arrays


def call_s(call: Callable[[], object]) -> float:
    """The lower quartile of the times of a call, after one that warms up."""
    took: list[float] = []
    call()
    while len(took) < (_LEAST_REPEATS if sum(took) > _ENOUGH_S else _REPEATS):
        began_s = time.perf_counter()
        call()
        took.append(time.perf_counter() - began_s)
    return lower_quartile(took)


def lower_quartile(times: Sequence[float]) -> float:
    """The median of the faster half."""
    return statistics.median(sorted(times)[: (len(times) + 1) // 2])
