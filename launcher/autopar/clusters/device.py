"""One device and one link as numbers in SI units, and how cluster files describe them.

Files (docs/clusters.md) say GiB, TFLOP/s and Gb/s in their key names; here they are bytes, FLOP/s and
bytes/s. Left out: how many there are, and how they are wired to a `cluster`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from launcher.autopar.clusters.curves import Curves, read_curve, read_curves
from launcher.autopar.clusters.device_kinds import is_nvidia
from launcher.autopar.graphs.work import KINDS, WORK
from launcher.autopar.text.strict_reader import Node

DTYPES = ("fp64", "fp32", "fp16", "bf16")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
GIB, GIGA = 2**30, 1e9
_TERA, _MEGA = 1e12, 1e6
_MICRO, _NANO = 1e-6, 1e-9
_CURVES = ("matmul_curve", "convolution_curve", "kernel_gradient_curve", "batched_matmul_curve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device.

    Attributes:
        reserved_bytes: Of its memory, what the driver and communication libraries take.
        peak_flops_per_s: dtype (fp32, bf16, ...) -> dense peak rate.
        matmul_efficiency: dtype -> the share of the peak that large matrix products reach.
        accelerator: Whether it is one; a slice of a CPU is not.
        matmul_curve: dtype -> the share of the peak by the FLOPs of one product on one device; where it
            is missing, all products reach `matmul_efficiency`.
        convolution_curve: The same for convolutions; where it is missing, they are as products.
        kernel_gradient_curve: The same for convolutions that are the gradient of a kernel; where it is
            missing, they are as others.
        batched_matmul_curve: The same for products with a batch, by the FLOPs of one of them.
        element_s: Kind of op (`work.KINDS`) -> seconds per element, for devices on which other ops are
            bound by arithmetic; where it is empty, memory binds them.
        op_overhead_s: What each kernel takes beside its work.
        program_launch_s: What starting each program of a step takes.
        array_launch_s: What each array adds to it that the program takes or makes.
        overlaps_collectives: Whether a collective runs beside computation that does not wait for it.
        concurrency: (devices of a machine that compute at once, how many times slower each of them is).
        crowding: Class of work (`work.WORK`) -> how many times slower than `concurrency` says it is while
            all devices of a machine compute; 1 for classes that are left out.
    """

    kind: str
    memory_bytes: int
    peak_flops_per_s: Mapping[str, float]
    matmul_efficiency: Mapping[str, float]
    memory_bytes_per_s: float
    has_bf16: bool
    accelerator: bool
    reserved_bytes: int = 0
    matmul_curve: Curves = field(default_factory=dict)
    convolution_curve: Curves = field(default_factory=dict)
    kernel_gradient_curve: Curves = field(default_factory=dict)
    batched_matmul_curve: Curves = field(default_factory=dict)
    element_s: Mapping[str, float] = field(default_factory=dict)
    op_overhead_s: float = 0.0
    program_launch_s: float = 0.0
    array_launch_s: float = 0.0
    overlaps_collectives: bool = False
    concurrency: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    crowding: Mapping[str, float] = field(default_factory=dict)

    @property
    def usable_bytes(self) -> int:
        """Return the memory that a plan may fill."""
        return self.memory_bytes - self.reserved_bytes

    @property
    def has_cudnn_attention(self) -> bool:
        """Return whether cuDNN's fused attention runs on it.

        It needs compute capability 8.0, and those are NVIDIA's GPUs with bf16.
        """
        return self.accelerator and self.has_bf16 and is_nvidia(self.kind)

    @property
    def starts_programs_for_free(self) -> bool:
        """Return whether starting a program takes no time."""
        return not (self.program_launch_s or self.array_launch_s)

    @property
    def slows_others(self) -> bool:
        """Return whether devices of a machine that compute at once slow one another down."""
        return max(factor for _, factor in self.concurrency) != 1.0

    def slowdown(self, at_once: int | None, work: str | None = None) -> float:
        """Return how many times slower it is while so many devices of its machine compute.

        Args:
            at_once: None stands for all of them: the last point of `concurrency`.
            work: Of which class; None for the mean of all.
        """
        counts, factors = zip(*self.concurrency, strict=True)
        slower = float(np.interp(counts[-1] if at_once is None else at_once, counts, factors))
        if work not in self.crowding or factors[-1] == 1.0:
            return slower
        full = (slower - 1.0) / (factors[-1] - 1.0)
        return max(1.0, slower * self.crowding[work] ** full)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a message costs: `latency_s`, and its bytes over `bytes_per_s`, one direction.

    Attributes:
        curves: collective, or "send" -> bytes per second by the bytes that each device sends, as measured
            with all that they take: where there is one, nothing else is charged.
    """

    bytes_per_s: float
    latency_s: float
    curves: Curves = field(default_factory=dict)

    def send_s(self, num_bytes: float) -> float:
        """Return how long a message takes."""
        if "send" in self.curves:
            return float(self.curves["send"].seconds(num_bytes))
        return self.latency_s + num_bytes / self.bytes_per_s


def read_device(node: Node) -> Device:
    """Return the device that a file describes."""
    fields = node.fields(
        (
            "kind", "memory_gib", "peak_tflops", "memory_gb_per_s", "matmul_efficiency", "has_bf16",
            "accelerator",
        ),
        (
            "reserved_gib", "matmul_curve", "convolution_curve", "kernel_gradient_curve",
            "batched_matmul_curve", "element_ns", "op_overhead_us",
            "program_launch_us", "array_launch_us", "overlaps_collectives", "concurrency", "crowding",
        ),
    )  # fmt: skip
    peaks = fields["peak_tflops"].fields(("fp32",), [name for name in DTYPES if name != "fp32"])
    known = {dtype: peak for dtype, peak in peaks.items() if not peak.is_null}
    efficiency = fields["matmul_efficiency"].fields(tuple(known))
    memory_gib = fields["memory_gib"].positive()
    accelerator, overlaps = fields["accelerator"].boolean(), fields["overlaps_collectives"]
    curves = {
        name: read_curves(fields[name], known, size_unit=GIGA, rate_unit=1.0, maximum=1.0)
        for name in _CURVES
    }
    return Device(
        kind=fields["kind"].text(),
        memory_bytes=int(memory_gib * GIB),
        reserved_bytes=int(_or_zero(fields["reserved_gib"], maximum=memory_gib) * GIB),
        peak_flops_per_s={dtype: peak.positive() * _TERA for dtype, peak in known.items()},
        matmul_efficiency={
            dtype: share.positive(maximum=1.0) for dtype, share in efficiency.items()
        },
        memory_bytes_per_s=fields["memory_gb_per_s"].positive() * GIGA,
        has_bf16=fields["has_bf16"].boolean(),
        accelerator=accelerator,
        op_overhead_s=_or_zero(fields["op_overhead_us"]) * _MICRO,
        program_launch_s=_or_zero(fields["program_launch_us"]) * _MICRO,
        array_launch_s=_or_zero(fields["array_launch_us"]) * _MICRO,
        overlaps_collectives=accelerator if overlaps.is_null else overlaps.boolean(),
        concurrency=_read_concurrency(fields["concurrency"]),
        crowding=_read_crowding(fields["crowding"]),
        element_s=_read_elements(fields["element_ns"]),
        **curves,
    )


def _read_elements(node: Node) -> dict[str, float]:
    """All kinds of ops or none, or some would be free."""
    kinds = {} if node.is_null or not node.entries() else node.fields(KINDS)
    return {kind: value.positive() * _NANO for kind, value in kinds.items()}


def _or_zero(node: Node, **limits: float) -> float:
    return 0.0 if node.is_null else node.number(**limits)


def _read_concurrency(node: Node) -> tuple[tuple[float, float], ...]:
    """Points (devices at once, slowdown); a list that is left out or empty slows nothing down."""
    if node.is_null or not node.items():
        return ((1.0, 1.0),)
    return read_curve(node, size_unit=1.0, rate_unit=1.0).points


def _read_crowding(node: Node) -> dict[str, float]:
    """Any of the classes of work."""
    classes = {} if node.is_null or not node.entries() else node.fields((), WORK)
    return {work: value.positive() for work, value in classes.items() if not value.is_null}


def read_link(bytes_per_s: float, fields: Mapping[str, Node]) -> Link:
    """Return the link of such a rate whose latency and curves the fields say."""
    return Link(
        bytes_per_s=bytes_per_s,
        latency_s=fields["latency_us"].number() * _MICRO,
        curves=read_curves(
            fields["collective_curve"], COLLECTIVES, size_unit=_MEGA, rate_unit=GIGA
        ),
    )
