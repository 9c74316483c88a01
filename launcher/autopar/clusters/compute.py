"""How long one op takes on one device: a roofline of the device's figures.

A matrix product or convolution takes the longer of its operations at the rate that its size reaches and its
bytes at the memory's rate. Other ops are bound by memory; compilers fuse chains of them, so that most
intermediate results never leave the chip: only a share of their bytes is counted, and of their kernels. Where
the device has figures for them (a CPU, on which arithmetic is dearer than memory), they cost by element.
Left out: which products a backend computes well besides by their size (shapes, layouts, tile quantisation).
"""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from jax.extend.core import primitives as prim

from launcher.autopar.clusters.device import Device
from launcher.autopar.graphs.graph import Op
from launcher.autopar.graphs.work import (
    is_kernel_gradient,
    num_batches,
    num_elements,
    op_flops,
    op_kind,
    operand_bytes,
    result_bytes,
    work_class,
)

# Share of elementwise ops that end a kernel, whose results reach memory: one in four, the length of a
# typical fused chain in a transformer block (cast, scale, add, activate).
_UNFUSED_FRACTION = 0.25
_WRITTEN_AND_READ = 2
# What never becomes a kernel of its own.
_VIRTUAL = frozenset({prim.broadcast_in_dim_p, prim.iota_p, prim.reshape_p, prim.squeeze_p})
_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True, slots=True)
class ComputeModel:
    """Prices ops on one kind of device.

    Attributes:
        at_once: how many devices of the machine compute at the same time; None: all of them.
    """

    device: Device
    at_once: int | None = None

    @property
    def key(self) -> Hashable:
        """Equal for two models that price alike (a `Device` holds dicts, and has no hash)."""
        device = self.device
        tables = (
            device.peak_flops_per_s, device.matmul_efficiency, device.matmul_curve,
            device.convolution_curve, device.kernel_gradient_curve, device.batched_matmul_curve,
            device.element_s, device.crowding,
        )  # fmt: skip
        return (
            tuple(tuple(sorted(table.items(), key=lambda item: item[0])) for table in tables),
            device.memory_bytes_per_s, device.op_overhead_s, device.slowdown(self.at_once),
        )  # fmt: skip

    @property
    def memory_bytes_per_s(self) -> float:
        """What a device gets of its memory's rate while the others compute."""
        return self.device.memory_bytes_per_s / self.device.slowdown(self.at_once)

    def op_s(self, op: Op, shards: float | np.ndarray = 1):
        """Seconds of the op on one of the devices that share it evenly; an array for an array of shards."""
        device, flops = self.device, op_flops(op)
        if op.primitive in _VIRTUAL:
            return 0.0 * shards
        if flops == 0.0:
            return self._slowed(op, self._other_s(op, shards))
        moved_s = (operand_bytes(op) + result_bytes(op)) / device.memory_bytes_per_s / shards
        dtype = str(op.eqn.invars[0].aval.dtype) if op.eqn.invars else "float32"
        product_s = self._product_s(op, flops / shards, dtype)
        return self._slowed(op, np.maximum(product_s, moved_s) + device.op_overhead_s)

    def _slowed(self, op: Op, seconds):
        work = work_class(op) if self.device.crowding else None
        return seconds * self.device.slowdown(self.at_once, work)

    def _other_s(self, op: Op, shards):
        """Seconds of an op that is neither product nor convolution, most likely inside a fused kernel."""
        device, kind = self.device, op_kind(op)
        if kind in device.element_s:
            work_s = num_elements(op) * device.element_s[kind] / shards
            return work_s + _UNFUSED_FRACTION * device.op_overhead_s
        if device.element_s:  # moves nothing, or is computed where it is read
            return 0.0 * shards
        fraction = 1.0 if str(op.primitive).startswith("reduce") else _UNFUSED_FRACTION
        moved_s = _WRITTEN_AND_READ * result_bytes(op) / device.memory_bytes_per_s / shards
        return fraction * (moved_s + device.op_overhead_s)

    def _product_s(self, op: Op, flops, dtype: str):
        """Seconds that so many operations of a product take on one device."""
        device, name = self.device, _DTYPE_NAMES.get(dtype, "fp32")
        batches, curve = 1.0, device.matmul_curve.get(name)
        if op.primitive is prim.conv_general_dilated_p:
            curve = device.convolution_curve.get(name, curve)
            if is_kernel_gradient(op):
                curve = device.kernel_gradient_curve.get(name, curve)
        elif num_batches(op) > 1 and name in device.batched_matmul_curve:
            # Devices most likely share the batch, so that each product stays as it is.
            curve, one = device.batched_matmul_curve[name], op_flops(op) / num_batches(op)
            batches, flops = flops / one, one
        if curve is None or name not in device.peak_flops_per_s:
            return batches * flops / self.flops_per_s(dtype)
        return batches * curve.seconds(flops) / device.peak_flops_per_s[name]

    def flops_per_s(self, dtype: str) -> float:
        """The rate of large matrix products; double precision runs at half of single by default."""
        name = _DTYPE_NAMES.get(dtype, "fp32")
        peaks, efficiency = self.device.peak_flops_per_s, self.device.matmul_efficiency
        if name not in peaks:
            return self._fallback_rate(name)
        return peaks[name] * efficiency.get(name, min(efficiency.values(), default=0.5))

    def _fallback_rate(self, name: str) -> float:
        """A dtype that the device has no figure for runs as fp32, or at half of it if it is wider."""
        base = self.device.peak_flops_per_s.get("fp32", 1e11)
        efficiency = self.device.matmul_efficiency.get("fp32", 0.5)
        return base * efficiency * (0.5 if name == "fp64" else 1.0)
