"""Measuring what devices compute: products, convolutions, other ops, memory, launches, and one another.

All but `concurrency`, `crowding` and the launch of a program are measured on one device while the others
rest. What a kernel takes beside its work is measured first, and taken off what small jobs took. Left out:
dtypes that the cluster gives no peak for, and products of other shapes than square ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.curves import Curve
from launcher.autopar.clusters.device import Device
from launcher.autopar.graphs.work import BATCHED_PRODUCT, CONVOLUTION, PRODUCT
from launcher.runtime.profiling.profile_launches import launch_s
from launcher.runtime.profiling.profile_programs import (
    CHANNELS_LAST,
    DEPTH,
    KERNELS,
    ProgramSizes,
    convolved,
    dense_job,
    in_programs,
    meeting,
    meeting_s,
    program_jobs,
)
from launcher.runtime.profiling.profile_timing import Job, round_s

Progress = Callable[[str], None]
Points = tuple[tuple[float, float], ...]
"""(size, figure), sizes ascending."""

DTYPES = {"fp32": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}
_TINY = 8  # a product of this side takes no time but that of its kernel
_HEAD = 64  # what a head of attention sums over
_STREAMS = 7  # arrays that an update reads and writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured: sides of products, channels of convolutions, elements of other ops, programs."""

    sides: tuple[int, ...]
    lengths: tuple[int, ...]
    batch: int
    channels: tuple[int, ...]
    images: tuple[int, int]
    elements: int
    stream_bytes: int
    blocks: tuple[int, int, int]
    small_blocks: tuple[int, int, int]
    programs: ProgramSizes


ON_CPU = Sizes(
    sides=(16, 32, 64, 128, 256, 512), lengths=(8, 16, 32, 64, 128), batch=64,
    channels=(8, 16, 32, 64), images=(8, 8), elements=2**16, stream_bytes=2**22,
    blocks=(16, 64, 64), small_blocks=(1, 32, 32),
    programs=ProgramSizes(
        dense=((4, 128, 64), (16, 64, 64), (2, 128, 256), (2, 64, 64), (1, 32, 32)),
        experts=((4, 128, 64, 4), (1, 128, 128, 8), (2, 32, 64, 4)),
        residual=((16, 8, 32), (4, 16, 16), (16, 4, 64), (2, 8, 16)),
    ),
)  # fmt: skip
ON_GPU = Sizes(
    sides=(128, 256, 512, 1024, 2048, 4096, 8192), lengths=(64, 256, 1024, 2048), batch=64,
    channels=(32, 64, 128, 256, 512), images=(32, 56), elements=2**26, stream_bytes=2**28,
    blocks=(8, 1024, 2048), small_blocks=(1, 64, 256),
    programs=ProgramSizes(dense=(), experts=(), residual=()),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeFigures:
    """What was measured, in SI units; products by dtype, as (FLOPs, FLOP/s).

    Attributes:
        batched: of products with a batch, by the FLOPs of one of them.
        element_s: kind of op -> seconds per element inside a fused kernel.
        concurrency: (devices at once, how many times slower each of them is).
        crowding: class of work -> how many times slower than that it is with all devices at once.
    """

    products: Mapping[str, Points]
    batched: Mapping[str, Points]
    convolutions: Mapping[str, Points]
    kernel_gradients: Mapping[str, Points]
    element_s: Mapping[str, float]
    memory_bytes_per_s: float
    op_overhead_s: float
    program_launch_s: float
    array_launch_s: float
    concurrency: Points
    crowding: Mapping[str, float]


def measure_compute(grid: np.ndarray, device: Device, progress: Progress) -> ComputeFigures:
    """Measure everything that needs no link.

    Args:
        grid: hosts by devices per host.
        device: the figures known so far; only guide how often things are repeated.
    """
    sizes = ON_GPU if device.accelerator else ON_CPU
    one = grid[0, :1]
    known = [name for name in DTYPES if name in device.peak_flops_per_s]
    progress("kernels")
    overhead_s = round_s(_product(_TINY, jnp.float32, 1e-6), one)
    found: dict[str, dict[str, Points]] = {
        kind: {} for kind in ("products", "batched", "convolutions", "kernel_gradients")
    }
    for dtype in known:
        guess = device.peak_flops_per_s[dtype] / 2
        for kind, jobs in _flops_jobs(sizes, DTYPES[dtype], guess).items():
            progress(f"{kind.replace('_', ' ')} in {dtype}")
            found[kind][dtype] = tuple(
                (flops / each, flops / _without(overhead_s, round_s(job, one)))
                for flops, each, job in jobs
            )
    progress("memory")
    stream_s = _without(overhead_s, round_s(_update_job(sizes, device), one))
    progress("launches")
    program_s, array_s = launch_s(grid.reshape(-1), dense_job(*sizes.small_blocks))
    figures = ComputeFigures(
        **found,
        element_s={},
        memory_bytes_per_s=_STREAMS * sizes.stream_bytes / stream_s,
        op_overhead_s=overhead_s,
        program_launch_s=program_s,
        array_launch_s=array_s,
        concurrency=((1.0, 1.0),),
        crowding={},
    )
    if device.accelerator:  # its arithmetic is free beside its memory
        progress("devices at once")
        took = _took_s([dense_job(*sizes.blocks)], grid)
        return replace(figures, concurrency=_slower(took))
    progress("other ops")
    each_s = {
        kind: _without(overhead_s, round_s(job, one)) / sizes.elements / ops
        for kind, (job, ops) in _element_jobs(sizes, device).items()
    }
    progress("whole programs, on 1 to all devices at once")
    return _in_programs(replace(figures, element_s=each_s), sizes.programs, grid)


def _without(overhead_s: float | np.ndarray, seconds: float | np.ndarray):
    """What is left for the work; at least half, since what is beside it begins while others end."""
    return np.maximum(seconds - overhead_s, seconds / 2)


def _flops_jobs(
    sizes: Sizes, dtype: jnp.dtype, flops_per_s: float
) -> Mapping[str, list[tuple[float, int, Job]]]:
    """Kind -> (FLOPs, products in a batch, job), by rising size."""
    products = [(2 * n**3, 1, _product(n, dtype, 2 * n**3 / flops_per_s)) for n in sizes.sides]
    batched, convolutions, kernel_gradients = [], [], []
    for length in sizes.lengths:
        flops = 2 * 2 * length**2 * _HEAD * sizes.batch
        shape = (sizes.batch, length, _HEAD)
        job = Job(body=_attend, shapes=(shape, shape), guess_s=flops / flops_per_s, dtype=dtype,
                  value=1 / 64)  # fmt: skip
        batched.append((flops, 2 * sizes.batch, job))
    count, side = sizes.images
    for channels in sizes.channels:
        flops = 2 * 9 * channels**2 * count * side**2
        shapes = (count, side, side, channels), (3, 3, channels, channels)
        for body, jobs in ((_convolve, convolutions), (_kernel_gradient, kernel_gradients)):
            job = Job(body=body, shapes=shapes, guess_s=flops / flops_per_s, dtype=dtype,
                      value=1 / (9 * channels))  # fmt: skip
            jobs.append((flops, 1, job))
    return {
        "products": products, "batched": batched, "convolutions": convolutions,
        "kernel_gradients": kernel_gradients,
    }  # fmt: skip


def _product(side: int, dtype: jnp.dtype, guess_s: float) -> Job:
    shapes = ((side, side), (side, side))
    return Job(body=_multiply, shapes=shapes, guess_s=guess_s, dtype=dtype, value=1 / side)


def _multiply(held):
    left, right = held
    return left @ right, right


def _attend(held):
    """Scores, and what they weigh: two products, of which the first sums over a head."""
    queries, keys = held
    scores = jnp.einsum("bqd,bkd->bqk", queries, keys)
    return jnp.einsum("bqk,bkd->bqd", scores, keys), keys


def _convolve(held):
    images, kernel = held
    return convolved(images, kernel), kernel


def _kernel_gradient(held):
    images, kernel = held
    gradient = gradient_of_kernel(images, images)
    # Or all rounds would be alike, and XLA would do one.
    return images * (1.0 + 0.001 * gradient[0, 0, 0, 0]).astype(images.dtype), gradient


def gradient_of_kernel(images: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Of a window of three, as the emitter has it (`rules/convolution.py`)."""
    return lax.platform_dependent(
        images, cotangent, cpu=_channels_last_gradient, default=_gradient_by_jax
    )


def _gradient_by_jax(images: jax.Array, cotangent: jax.Array) -> jax.Array:
    channels = images.shape[-1]
    kernel = jnp.zeros((3, 3, channels, channels), images.dtype)
    _, back = jax.vjp(lambda kernel: convolved(images, kernel), kernel)
    (gradient,) = back(cotangent)
    return gradient


def _channels_last_gradient(images: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The images' channels are the batch, and what is summed over, the images, comes last."""
    gradient = lax.conv_general_dilated(
        images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=CHANNELS_LAST,
    )  # fmt: skip
    return gradient.transpose(1, 2, 0, 3)


def _element_jobs(sizes: Sizes, device: Device) -> Mapping[str, tuple[Job, int]]:
    """Kind of op -> a job, and how many ops of that kind it has per element."""
    shape = (sizes.elements // 256, 256)
    guess_s = 4 * sizes.elements / device.memory_bytes_per_s

    def job(body: Callable[[jax.Array], jax.Array]) -> Job:
        return Job(body=lambda held: (body(held[0]),), shapes=(shape,), guess_s=guess_s)

    return {
        "arithmetic": (job(lambda x: (x * 0.5 + 0.1) * 0.7 + 0.2), 4),
        "division": (job(lambda x: 1.0 / (1.0 + x)), 1),
        "transcendental": (job(lambda x: jnp.exp(-x)), 1),
        "reduction": (job(lambda x: x * 0.5 + x.sum(axis=1, keepdims=True)), 1),
        "transposition": (job(_turn), 1),
    }


def _turn(x: jax.Array) -> jax.Array:
    """Swap dims, and keep the result from being a mere view."""
    return lax.optimization_barrier(x.T).reshape(x.shape)


def _update_job(sizes: Sizes, device: Device) -> Job:
    """What AdamW does: it reads four arrays and writes three of them anew."""

    def update(held):
        weight, mean, square, gradient = held
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient * gradient
        return weight - 1e-3 * mean / (jnp.sqrt(square) + 1e-8), mean, square, gradient

    shape = (sizes.stream_bytes // 4 // 256, 256)
    guess_s = _STREAMS * sizes.stream_bytes / device.memory_bytes_per_s
    return Job(body=update, shapes=(shape,) * 4, guess_s=guess_s)


def _took_s(jobs: Sequence[Job], grid: np.ndarray) -> dict[int, np.ndarray]:
    """Devices at once, 1, 2, 4, ... and all -> what each job takes; from one host after the other."""
    devices = grid.reshape(-1)
    counts = sorted({*(2**k for k in range(devices.size.bit_length())), devices.size})
    return {count: np.array([round_s(job, devices[:count]) for job in jobs]) for count in counts}


def _slower(took_s: Mapping[int, np.ndarray]) -> Points:
    """How many times slower than alone jobs are, in the geometric mean, by devices at once."""
    ratios = [np.exp(np.log(seconds / took_s[1]).mean()) for seconds in took_s.values()]
    # More devices are never faster; where it looks so, it is noise.
    return tuple(zip(map(float, took_s), map(float, np.maximum.accumulate(ratios)), strict=True))


def _in_programs(figures: ComputeFigures, sizes: ProgramSizes, grid: np.ndarray) -> ComputeFigures:
    """The figures, each by the factor by which its class of work costs more or less in whole programs.

    Programs on several devices meet between their blocks, as they do in a training step. Waiting for those
    that are late is part of what they take, a meeting itself is not: collectives have their own price.
    """
    jobs, devices = program_jobs(sizes), grid.reshape(-1)
    meetings = np.tile((DEPTH, 2 * DEPTH), len(jobs) // 2)  # forward alone, and with the gradients
    took_s = {
        count: _without(meetings * meeting_s(devices[:count]), seconds)
        for count, seconds in _took_s(program_jobs(sizes, meeting), grid).items()
    }
    factors = in_programs(jobs, took_s[1], compute_model(figures), kernels_apart=True)
    alone = replace(_by_factors(figures, factors), concurrency=_slower(took_s))
    crowding = in_programs(jobs, took_s[max(took_s)], compute_model(alone))
    return replace(alone, crowding=crowding)


def _by_factors(figures: ComputeFigures, factors: Mapping[str, float]) -> ComputeFigures:
    def slower(curves: Mapping[str, Points], work: str) -> dict[str, Points]:
        return {
            dtype: tuple((size, rate / factors.get(work, 1.0)) for size, rate in points)
            for dtype, points in curves.items()
        }

    return replace(
        figures,
        products=slower(figures.products, PRODUCT),
        batched=slower(figures.batched, BATCHED_PRODUCT),
        convolutions=slower(figures.convolutions, CONVOLUTION),
        kernel_gradients=slower(figures.kernel_gradients, CONVOLUTION),
        op_overhead_s=factors.get(KERNELS, 1.0) * figures.op_overhead_s,
        element_s={k: factors.get(k, 1.0) * each_s for k, each_s in figures.element_s.items()},
    )


def compute_model(figures: ComputeFigures) -> ComputeModel:
    """What prices ops by the figures, with as many devices at once as there are."""

    def rates(curves: Mapping[str, Points]) -> dict[str, Curve]:
        return {dtype: Curve(points) for dtype, points in curves.items()}

    known = dict.fromkeys(figures.products, 1.0)  # so that shares of the peak are rates
    device = Device(
        kind="", memory_bytes=0, peak_flops_per_s=known, matmul_efficiency=known,
        memory_bytes_per_s=figures.memory_bytes_per_s, has_bf16=False, accelerator=False,
        matmul_curve=rates(figures.products), batched_matmul_curve=rates(figures.batched),
        convolution_curve=rates(figures.convolutions), element_s=figures.element_s,
        kernel_gradient_curve=rates(figures.kernel_gradients), op_overhead_s=figures.op_overhead_s,
        concurrency=figures.concurrency,
    )  # fmt: skip
    return ComputeModel(device)
