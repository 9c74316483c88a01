"""What work costs in whole programs, beside what it costs in a loop of its own.

A loop over one kernel finds its arrays in a cache, and its memory at hand. In a training step neither is so,
nor are all products square. So a few programs such as people train, dense blocks, blocks of experts and
residual convolutions, forward alone and with their gradients, are measured as wholes, on one device and more.
Each class of work gets the factor by which it costs more or less in them: the factors, near one, with which
the classes add up to what the programs took. On several devices the programs meet between blocks, so that
the time counts that devices wait for those that are late. Left out: what depends on a program's shapes.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.graphs.graph import CALLS, evaluate, from_jaxpr
from launcher.autopar.graphs.turned import turn_products
from launcher.autopar.graphs.work import work_class
from launcher.runtime.profiling.profile_timing import EACH, Job, round_s

CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")
DEPTH = 4  # blocks of a program
_LITTLE = 1e-9  # so that what is added changes nothing
_WIDENING = 4  # of a perceptron's middle
_STIFFNESS = 0.1  # how much a factor of e weighs, beside a program that is off by a factor of e
_NEAR = 0.1  # what a program is off by, in logarithms, from where on it weighs less
_ROUNDS, _STEP = 100, 0.2  # of the fit, and the most that a factor changes in one, in logarithms
KERNELS = "kernels"  # a class of work: what they take beside it
Between = Callable[[jax.Array], jax.Array]
Program = tuple[Callable | tuple[int, ...], ...]
"""A function of arrays, and their shapes, of which the first is that of its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSizes:
    """What programs are measured with.

    Attributes:
        dense: (sequences, length, width) of each.
        experts: (groups, length, width, experts) of each.
        residual: (images, side, channels) of each.
    """

    dense: tuple[tuple[int, int, int], ...]
    experts: tuple[tuple[int, int, int, int], ...]
    residual: tuple[tuple[int, int, int], ...]


def alone(stream: jax.Array) -> jax.Array:
    return stream


def meeting(stream: jax.Array) -> jax.Array:
    """As between the layers of a step, no device goes on before all are there."""
    return stream + _LITTLE * lax.pmean(stream.reshape(-1)[0], EACH)


def meeting_s(devices: np.ndarray) -> float:
    """What a meeting takes where nobody is late."""
    return round_s(
        Job(body=lambda held: (meeting(held[0]),), shapes=((8,),), guess_s=1e-4), devices
    )


def program_jobs(sizes: ProgramSizes, between: Between = alone) -> list[Job]:
    """All programs, each of one round: forward alone, as what is recomputed, and with the gradients.

    Args:
        between: what happens to the stream between blocks: `alone`, or `meeting`.
    """
    return [
        make(*program)
        for programs, of in (
            (_dense, sizes.dense),
            (_experts, sizes.experts),
            (_residual, sizes.residual),
        )
        for program in itertools.starmap(partial(programs, between), of)
        for make in (_forward, _gradients)
    ]


def dense_job(count: int, length: int, width: int) -> Job:
    """The gradients of a few blocks of attention and perceptron."""
    return _gradients(*_dense(alone, count, length, width))


def _dense(between: Between, count: int, length: int, width: int) -> Program:
    """A few blocks of attention and perceptron."""

    def blocks(stream, project, widen, narrow):
        for _ in range(DEPTH):
            stream = stream + _attention(_normal(stream) @ project)
            stream = between(stream + jax.nn.gelu(_normal(stream) @ widen) @ narrow)
        return stream

    middle = _WIDENING * width
    return blocks, (count, length, width), (width, middle), (width, middle), (middle, width)


def _experts(between: Between, groups: int, length: int, width: int, experts: int) -> Program:
    """A few blocks of experts, each token going to one of them."""

    def blocks(stream, gate, widen, narrow):
        for _ in range(DEPTH):
            normal = _normal(stream)
            chosen = _dispatch(jax.nn.softmax(normal @ gate))
            given = jnp.einsum("gsec,gsm->egcm", chosen, normal)
            hidden = jax.nn.gelu(jnp.einsum("egcm,emh->egch", given, widen))
            made = jnp.einsum("egch,ehm->egcm", hidden, narrow)
            stream = between(stream + jnp.einsum("gsec,egcm->gsm", chosen, made))
        return stream

    middle = _WIDENING * width
    wide, narrow = (experts, width, middle), (experts, middle, width)
    return blocks, (groups, length, width), (width, experts), wide, narrow


def _residual(between: Between, count: int, side: int, channels: int) -> Program:
    """A few residual blocks: a convolution of a window, and one of single points."""

    def blocks(images, windowed, pointwise):
        for _ in range(DEPTH):
            hidden = jax.nn.relu(_over_the_batch(convolved(images, windowed)))
            images = between(images + _over_the_batch(convolved(hidden, pointwise)))
        return images

    kernels = (3, 3, channels, channels), (1, 1, channels, channels)
    return blocks, (count, side, side, channels), *kernels


def in_programs(
    jobs: Sequence[Job], measured_s: Sequence[float], compute: ComputeModel, *,
    kernels_apart: bool = False,
) -> dict[str, float]:  # fmt: skip
    """The factor of each class of work that the programs have.

    Args:
        kernels_apart: whether what kernels take beside their work is a class of its own, `KERNELS`.
    """
    working = _without_overhead(compute) if kernels_apart else compute
    rows = [seconds_by_class(job, compute, working) for job in jobs]
    classes = sorted({name for row in rows for name in row if row[name]})
    table = np.array([[row.get(name, 0.0) for name in classes] for row in rows])
    factors = fit_factors(table, np.array(measured_s))
    return dict(zip(classes, map(float, factors), strict=True))


def fit_factors(table: np.ndarray, measured_s: np.ndarray) -> np.ndarray:
    """Factors f, near one, with which `table @ f` comes near what was measured.

    Minimises the sum of the squares of `_STIFFNESS` log(f) and of Huber's loss of log(table @ f / measured),
    a square up to `_NEAR` and linear from there on, so that a program unlike the others does not bend them;
    by Gauss-Newton in log(f) with weights, in steps of at most `_STEP`.
    """
    logs = np.zeros(table.shape[1])
    stiff = _STIFFNESS * np.eye(logs.size)
    for _ in range(_ROUNDS):
        parts = table * np.exp(logs)
        wholes = parts.sum(axis=1)
        slopes = np.vstack((parts / wholes[:, None], stiff))
        off = np.log(wholes / measured_s)
        misses = np.concatenate((off, _STIFFNESS * logs))
        near = np.sqrt(_NEAR / np.maximum(_NEAR, abs(off)))
        weights = np.concatenate((near, np.ones(logs.size)))
        step = np.linalg.lstsq(weights[:, None] * slopes, weights * misses)[0]
        logs = logs - np.clip(step, -_STEP, _STEP)
    return np.exp(logs)


def _without_overhead(compute: ComputeModel) -> ComputeModel:
    return replace(compute, device=replace(compute.device, op_overhead_s=0.0))


def seconds_by_class(job: Job, compute: ComputeModel, working: ComputeModel) -> Mapping[str, float]:
    """Seconds of each class of work of a program, by what was measured of each alone.

    What `compute` prices ops higher than `working` is of the class `KERNELS`.
    """
    shapes = [jax.ShapeDtypeStruct(shape, job.dtype) for shape in job.shapes]
    found: Counter[str] = Counter()
    for op in from_jaxpr(jax.make_jaxpr(job.body)(shapes), inline=CALLS).ops:
        work = work_class(op)
        if work is not None:
            work_s = float(working.op_s(op))
            found[work] += work_s
            found[KERNELS] += float(compute.op_s(op)) - work_s
    return found


def _forward(blocks: Callable, *shapes: tuple[int, ...]) -> Job:
    def body(held):
        return blocks(*held), *held[1:]

    return Job(body=body, shapes=shapes, guess_s=1.0, value=1 / shapes[0][-1])


def _gradients(blocks: Callable, *shapes: tuple[int, ...]) -> Job:
    def gradients(*held):
        every = tuple(range(len(shapes)))
        return jax.grad(lambda *held: (blocks(*held) ** 2).sum(), argnums=every)(*held)

    def body(held):  # with products as they are in a stage's programs
        graph = turn_products(from_jaxpr(jax.make_jaxpr(gradients)(*held), inline=CALLS))
        return evaluate(graph, (*held, *graph.constants.values()))

    return Job(body=body, shapes=shapes, guess_s=1.0, value=1 / shapes[0][-1])


def _normal(x: jax.Array) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-6)


def _over_the_batch(images: jax.Array) -> jax.Array:
    """Each channel normalised over all images."""
    over = (0, 1, 2)
    centred = images - images.mean(axis=over, keepdims=True)
    return centred * lax.rsqrt((centred * centred).mean(axis=over, keepdims=True) + 1e-6)


def convolved(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Images by a kernel, in the order of dims that the CPU backend has fast code for."""
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=CHANNELS_LAST)


def _attention(projected: jax.Array) -> jax.Array:
    """Of four heads; the last quarter of what was projected is added, in place of a product."""
    count, length, width = projected.shape
    heads = projected.reshape(count, length, 4, 4, width // 16)
    queries, keys, values, rest = jnp.moveaxis(heads, 2, 0)
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", queries, keys))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, values) + rest
    return mixed.reshape(count, length, width // 4)


def _dispatch(gates: jax.Array) -> jax.Array:
    """Which token goes where in which expert, and its weight there (Lepikhin et al. 2020, GShard)."""
    _, length, experts = gates.shape
    places = max(1, 2 * length // experts)
    chosen = jax.nn.one_hot(gates.argmax(axis=-1), experts)
    place = (jnp.cumsum(chosen, axis=1) * chosen).sum(axis=-1, keepdims=True) - 1.0
    where = jax.nn.one_hot(place.astype(jnp.int32), places)
    return (gates * chosen)[..., None] * where
