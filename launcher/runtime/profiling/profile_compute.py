"""Measuring what devices compute: products, convolutions, other ops, memory, launches, and one another.

All but `concurrency` and the launch of a program are measured on one device while the others rest. What a
kernel takes beside its work is measured first, and taken off what small jobs took. Left out: dtypes that the
cluster gives no peak for, and products of other shapes than square ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.curves import Curve
from launcher.autopar.clusters.device import Device
from launcher.autopar.graphs.graph import CALLS, from_jaxpr
from launcher.autopar.graphs.work import op_flops
from launcher.runtime.profiling.profile_timing import Job, call_s, prepared, round_s

Progress = Callable[[str], None]
Points = tuple[tuple[float, float], ...]
"""(size, figure), sizes ascending."""

DTYPES = {"fp32": jnp.float32, "fp16": jnp.float16, "bf16": jnp.bfloat16}
_TINY = 8  # a product of this side takes no time but that of its kernel
_HEAD = 64  # what a head of attention sums over
_LAUNCHED_ARRAYS = (8, 128)
_LAUNCHES = 20
_STREAMS = 7  # arrays that an update reads and writes
_BLOCKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured: sides of products, channels of convolutions, elements of other ops."""

    sides: tuple[int, ...]
    lengths: tuple[int, ...]
    batch: int
    channels: tuple[int, ...]
    images: tuple[int, int]
    elements: int
    stream_bytes: int
    blocks: tuple[int, int, int]
    small_blocks: tuple[int, int, int]


ON_CPU = Sizes(
    sides=(16, 32, 64, 128, 256, 512), lengths=(8, 16, 32, 64, 128), batch=64,
    channels=(8, 16, 32, 64), images=(8, 8), elements=2**16, stream_bytes=2**22,
    blocks=(16, 64, 64), small_blocks=(1, 16, 16),
)  # fmt: skip
ON_GPU = Sizes(
    sides=(128, 256, 512, 1024, 2048, 4096, 8192), lengths=(64, 256, 1024, 2048), batch=64,
    channels=(32, 64, 128, 256, 512), images=(32, 56), elements=2**26, stream_bytes=2**28,
    blocks=(8, 1024, 2048), small_blocks=(1, 64, 256),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeFigures:
    """What was measured, in SI units; products by dtype, as (FLOPs, FLOP/s).

    Attributes:
        batched: of products with a batch, by the FLOPs of one of them.
        element_s: kind of op -> seconds per element inside a fused kernel.
        concurrency: (devices at once, how many times slower each of them is).
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
    figures = ComputeFigures(
        **found,
        element_s={},
        memory_bytes_per_s=_STREAMS * sizes.stream_bytes / stream_s,
        op_overhead_s=overhead_s,
        program_launch_s=_program_launch_s(grid.reshape(-1), sizes),
        array_launch_s=_array_launch_s(grid.reshape(-1)),
        concurrency=(),
    )
    progress("devices at once")
    alone_s, slower = _crowded(grid, sizes)
    figures = replace(figures, concurrency=slower)
    if device.accelerator:  # its arithmetic is free beside its memory
        return figures
    progress("other ops")
    alone = {
        kind: _without(overhead_s, round_s(job, one)) / sizes.elements / ops
        for kind, (job, ops) in _element_jobs(sizes, device).items()
    }
    return replace(figures, element_s=_in_a_program(alone, alone_s, figures, sizes))


def _without(overhead_s: float, seconds: float) -> float:
    """What is left for the work; at least half, since kernels overlap their beginnings with it."""
    return max(seconds - overhead_s, seconds / 2)


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
    return _convolved(images, kernel), kernel


def _kernel_gradient(held):
    images, kernel = held
    _, gradients = jax.vjp(lambda kernel: _convolved(images, kernel), kernel)
    [gradient] = gradients(images)
    # Or all rounds would be alike, and XLA would do one.
    return images * (1.0 + 0.001 * gradient[0, 0, 0, 0]).astype(images.dtype), gradient


def _convolved(images: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=numbers)


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


def _crowded(grid: np.ndarray, sizes: Sizes) -> tuple[float, Points]:
    """How long some blocks take on one device, and how many times longer on 1, 2, 4, ... at once.

    Devices are taken from one host after the other.
    """
    devices, job = grid.reshape(-1), _blocks_job(sizes)
    alone_s = slowest_s = round_s(job, devices[:1])
    points = []
    for count in sorted({*(2**k for k in range(devices.size.bit_length())), devices.size}):
        if 1 < count <= devices.size:
            # More devices are never faster; where it looks so, it is noise.
            slowest_s = max(slowest_s, round_s(job, devices[:count]))
        points.append((float(count), slowest_s / alone_s))
    return alone_s, tuple(points)


def _blocks_job(sizes: Sizes) -> Job:
    count, length, width = sizes.blocks
    shapes = (count, length, width), (width, 4 * width), (width, 4 * width), (4 * width, width)
    return Job(body=_blocks, shapes=shapes, guess_s=1.0, value=1 / width)


def _blocks(held):
    """The gradients of a few blocks of attention and perceptron: a training step on one device."""

    def loss(stream, project, widen, narrow):
        for _ in range(_BLOCKS):
            stream = stream + _attention(_normal(stream) @ project)
            stream = stream + jax.nn.gelu(_normal(stream) @ widen) @ narrow
        return (stream * stream).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3))(*held)


def _normal(x: jax.Array) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-6)


def _attention(projected: jax.Array) -> jax.Array:
    """Of four heads; the last quarter of what was projected is added, in place of a product."""
    count, length, width = projected.shape
    heads = projected.reshape(count, length, 4, 4, width // 16)
    queries, keys, values, rest = jnp.moveaxis(heads, 2, 0)
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", queries, keys))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, values) + rest
    return mixed.reshape(count, length, width // 4)


def _in_a_program(
    alone: Mapping[str, float], measured_s: float, figures: ComputeFigures, sizes: Sizes
) -> dict[str, float]:
    """What elements cost in a program of many kernels, whose arrays no cache holds and whose memory is new.

    All kinds by the factor by which the blocks took longer than their products and `alone` add up to.
    """
    device = Device(
        kind="", memory_bytes=0, peak_flops_per_s={"fp32": 1.0}, matmul_efficiency={"fp32": 1.0},
        memory_bytes_per_s=figures.memory_bytes_per_s, has_bf16=False, accelerator=False,
        matmul_curve={"fp32": Curve(figures.products["fp32"])}, element_s=alone,
        op_overhead_s=figures.op_overhead_s,
    )  # fmt: skip
    compute = ComputeModel(device)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in _blocks_job(sizes).shapes]
    ops = from_jaxpr(jax.make_jaxpr(_blocks)(shapes), inline=CALLS).ops
    products_s = sum(compute.op_s(op) for op in ops if op_flops(op))
    others_s = sum(compute.op_s(op) for op in ops if not op_flops(op))
    factor = max(measured_s - products_s, others_s / 2) / others_s
    return {kind: factor * seconds for kind, seconds in alone.items()}


def _array_launch_s(devices: np.ndarray) -> float:
    """What each array adds to starting a program, on all devices."""
    few, many = _LAUNCHED_ARRAYS
    few_s, many_s = (_idle_launch_s(devices, count) for count in _LAUNCHED_ARRAYS)
    return max(0.0, many_s - few_s) / 2 / (many - few)  # each is taken, and one like it is made


def _idle_launch_s(devices: np.ndarray, num_arrays: int) -> float:
    """A program that has hardly any work, again and again."""
    whole = NamedSharding(Mesh(devices, ("each",)), PartitionSpec())
    arrays = [jax.device_put(np.ones(1, np.float32), whole) for _ in range(num_arrays)]
    program = jax.jit(lambda held: [x + 1.0 for x in held]).lower(arrays).compile()

    def calls() -> None:
        held: Sequence[jax.Array] = arrays
        for _ in range(_LAUNCHES):
            held = program(held)
        jax.block_until_ready(held)

    return call_s(calls) / _LAUNCHES


def _program_launch_s(devices: np.ndarray, sizes: Sizes) -> float:
    """What starting a program takes beside its work, while other devices compute.

    Two halves of the devices run a program so many times each, side by side as stages do, and all of them
    run one program with so many rounds: the difference. It has little work, so that its arrays come out of
    memory that the process has at hand. Where devices compute on the cores that start programs, starting
    them takes longer than on idle ones.
    """
    job = _blocks_job(replace(sizes, blocks=sizes.small_blocks))
    half = max(1, devices.size // 2)
    halves = [part for part in (devices[:half], devices[half:]) if part.size]
    chains = [prepared(job, part, ("each",), rounds=1) for part in halves]
    at_once, arrays = prepared(job, devices, ("each",), rounds=_LAUNCHES)

    def one_by_one() -> None:
        held = [arrays for _, arrays in chains]
        for _ in range(_LAUNCHES):
            held = [program(*given) for (program, _), given in zip(chains, held, strict=True)]
        jax.block_until_ready(held)

    whole_s = call_s(lambda: jax.block_until_ready(at_once(*arrays)))
    return max(0.0, call_s(one_by_one) - whole_s) / _LAUNCHES
