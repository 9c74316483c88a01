"""How long one op takes on one device: a roofline of the device's figures.

A matrix product or convolution takes the longer of its operations at the achievable rate and its bytes at
the memory's rate. Other ops are bound by memory; compilers fuse chains of them, so that most intermediate
results never leave the chip: only a share of their bytes is counted. Left out: launch times, and how the
rate falls for small matrices.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from launcher.autopar.cluster import Device
from launcher.autopar.graph import Op
from launcher.autopar.work import op_flops, operand_bytes, result_bytes

# Share of the results of elementwise ops that reach memory: one in four, the length of a typical fused
# chain in a transformer block (cast, scale, add, activate).
_UNFUSED_FRACTION = 0.25
_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


@dataclass(frozen=True, slots=True)
class ComputeModel:
    """Prices ops on one kind of device."""

    device: Device

    @property
    def key(self) -> Hashable:
        """Equal for two models that price alike (a `Device` holds dicts, and has no hash)."""
        device = self.device
        peaks = tuple(sorted(device.peak_flops_per_s.items()))
        return (peaks, tuple(sorted(device.matmul_efficiency.items())), device.memory_bytes_per_s)

    def op_s(self, op: Op) -> float:
        """Seconds for the whole op on one device."""
        flops = op_flops(op)
        if flops == 0.0:
            fraction = 1.0 if str(op.primitive).startswith("reduce") else _UNFUSED_FRACTION
            return fraction * result_bytes(op) / self.device.memory_bytes_per_s
        moved = operand_bytes(op) + result_bytes(op)
        rate = self.flops_per_s(str(op.eqn.invars[0].aval.dtype) if op.eqn.invars else "float32")
        return max(flops / rate, moved / self.device.memory_bytes_per_s)

    def flops_per_s(self, dtype: str) -> float:
        """The achievable rate of matrix products; double precision runs at half of single by default."""
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
