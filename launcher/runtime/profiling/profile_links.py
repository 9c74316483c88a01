"""Measuring links: collectives inside a host and between hosts, and messages from device to device.

All hosts, and all rings that lie side by side, are at it at once, as they are in a training step. Figures
are by the bytes that one device sends, as the cost model counts them. Left out: hosts that this process does
not reach.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from launcher.runtime.profiling.profile_timing import Job, call_s, round_s

Progress = Callable[[str], None]
Points = tuple[tuple[float, float], ...]

_KIB, _MIB = 2**10, 2**20
ON_CPU_BYTES = (4 * _KIB, 64 * _KIB, 512 * _KIB, 4 * _MIB)
ON_GPU_BYTES = (64 * _KIB, _MIB, 16 * _MIB, 128 * _MIB)
_GUESS_S = {False: 5e-4, True: 5e-5}  # of a collective, by whether the devices are accelerators
_HOST, _DEVICE = "host", "device"
_PING_PONGS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """Of one kind of link.

    Attributes:
        curves: collective, or "send" -> (bytes that a device sends, bytes per second).
    """

    curves: Mapping[str, Points]

    @property
    def latency_s(self) -> float:
        """What a short message takes."""
        num_bytes, bytes_per_s = self.curves["send"][0]
        return num_bytes / bytes_per_s

    @property
    def bytes_per_s(self) -> float:
        """What long messages reach."""
        return max(rate for _, rate in self.curves["send"])


def measure_links(
    grid: np.ndarray, *, accelerators: bool, progress: Progress
) -> tuple[LinkFigures | None, LinkFigures | None]:
    """The links inside a host and between hosts; None where there are none.

    Args:
        grid: hosts by devices per host.
    """
    hosts, per_host = grid.shape
    inside = between = None
    sizes = ON_GPU_BYTES if accelerators else ON_CPU_BYTES
    guess_s = _GUESS_S[accelerators]
    if per_host > 1:
        curves = dict(_collectives(grid, _DEVICE, 1, sizes, guess_s, progress))
        curves["send"] = _sends(grid[0, 0], grid[0, 1], sizes)
        inside = LinkFigures(curves=curves)
    if hosts > 1:
        curves = dict(_collectives(grid, _HOST, per_host, sizes, guess_s, progress))
        curves["send"] = _sends(grid[0, 0], grid[1, 0], sizes)
        between = LinkFigures(curves=curves)
    return inside, between


def _collectives(
    grid: np.ndarray, axis: str, side_by_side: int, sizes, guess_s: float, progress: Progress
):
    """(kind, curve) of every collective along an axis, of which several share a link."""
    count = grid.shape[0] if axis == _HOST else grid.shape[1]
    for kind, body in _bodies(axis, count).items():
        progress(f"{kind.replace('_', '-')} along the {axis}s")
        points = []
        for num_bytes in sizes:
            rows = max(1, num_bytes // 4 // 64 // count) * count
            job = Job(body=body, shapes=((rows, 64),), guess_s=guess_s, value=0.0)
            seconds = round_s(job, grid, (_HOST, _DEVICE))
            sent = (2 if kind == "all_reduce" else 1) * (count - 1) / count * rows * 64 * 4
            points.append((sent, side_by_side * sent / seconds))
        yield kind, tuple(points)


def _bodies(axis: str, count: int) -> Mapping[str, Callable]:
    """Each collective between arrays of one shape; what makes up for its own change of shape is cheap."""

    def all_reduce(held):
        return (lax.psum(held[0], axis),)

    def all_gather(held):
        part = lax.slice_in_dim(held[0], 0, held[0].shape[0] // count)
        return (lax.all_gather(part, axis, axis=0, tiled=True),)

    def reduce_scatter(held):
        part = lax.psum_scatter(held[0], axis, scatter_dimension=0, tiled=True)
        return (lax.dynamic_update_slice_in_dim(held[0], part, 0, axis=0),)

    def all_to_all(held):
        return (lax.all_to_all(held[0], axis, split_axis=0, concat_axis=0, tiled=True),)

    return {
        "all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter,
        "all_to_all": all_to_all,
    }  # fmt: skip


def _sends(here: jax.Device, there: jax.Device, sizes) -> Points:
    """A value that goes to and fro, each time when it has come."""
    points = []
    for num_bytes in sizes:
        value = jax.device_put(jnp.zeros(num_bytes // 4, jnp.float32), here)

        def rally(value=value) -> None:
            held = value
            for _ in range(_PING_PONGS):
                held = jax.device_put(jax.device_put(held, there), here)
            jax.block_until_ready(held)

        points.append((float(num_bytes), num_bytes / (call_s(rally) / 2 / _PING_PONGS)))
    return tuple(points)
