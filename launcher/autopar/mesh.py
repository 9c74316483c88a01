"""Logical meshes: the shape in which a stage sees its devices, and what communication costs on each axis.

Collectives are priced by the α-β model of ring algorithms (one message per hop costs α, every byte that
leaves a device costs β): with n devices along the axis and S bytes per device before an all-reduce or
after an all-gather,

    all-gather, reduce-scatter   (n-1)·α + (n-1)/n·S·β
    all-reduce                 2·(n-1)·α + 2·(n-1)/n·S·β
    all-to-all                   (n-1)·α + (n-1)/n·S·β     with S the bytes that a device holds

Left out: tree algorithms, contention between axes, and overlap with computation.
"""

import math
from dataclasses import dataclass

from launcher.autopar.cluster import Cluster

DATA, TENSOR = "data", "tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalMesh:
    """A named shape of devices.

    `alpha` and `beta` are the cost per message and per byte along each axis, in any one unit (the
    planner's is the second). Device order is row-major: the last axis varies fastest.
    """

    shape: tuple[int, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    axis_names: tuple[str, ...] = (DATA, TENSOR)

    def __post_init__(self):
        lengths = {len(self.shape), len(self.alpha), len(self.beta), len(self.axis_names)}
        if len(lengths) != 1:
            raise ValueError(
                f"shape {self.shape}, alpha {self.alpha}, beta {self.beta} and axis_names "
                f"{self.axis_names} must have one entry per axis"
            )

    @property
    def num_axes(self) -> int:
        return len(self.shape)

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    def all_gather(self, axis: int, gathered_bytes: float) -> float:
        """Each device ends up with `gathered_bytes`, having held an n-th of them."""
        n = self.shape[axis]
        return (n - 1) * self.alpha[axis] + (n - 1) / n * gathered_bytes * self.beta[axis]

    def reduce_scatter(self, axis: int, summand_bytes: float) -> float:
        """Each device brings `summand_bytes` and keeps an n-th of the sum."""
        return self.all_gather(axis, summand_bytes)

    def all_reduce(self, axis: int, summand_bytes: float) -> float:
        """Each device brings `summand_bytes` and gets the whole sum."""
        return 2 * self.all_gather(axis, summand_bytes)

    def all_to_all(self, axis: int, held_bytes: float) -> float:
        """Each device holds `held_bytes` before and after."""
        return self.all_gather(axis, held_bytes)


def logical_mesh(cluster: Cluster, *, hosts: int, devices: int, data: int) -> LogicalMesh:
    """View a submesh of `hosts` x `devices` as (data, tensor), the tensor axis inside a host.

    An axis that leaves the host shares the host's link among the rings that cross it side by side: with
    devices ordered row-major, as many as the tensor axis is long.
    """
    tensor = hosts * devices // data
    data_crosses = hosts > 1
    tensor_crosses = tensor > devices
    inside, between = cluster.intra_host, cluster.inter_host
    rings = devices if tensor_crosses else tensor
    alpha_data, beta_data = (
        (between.latency_s, rings / between.bytes_per_s)
        if data_crosses
        else (inside.latency_s, 1 / inside.bytes_per_s)
    )
    alpha_tensor, beta_tensor = (
        (between.latency_s, 1 / between.bytes_per_s)
        if tensor_crosses
        else (inside.latency_s, 1 / inside.bytes_per_s)
    )
    return LogicalMesh(
        shape=(data, tensor), alpha=(alpha_data, alpha_tensor), beta=(beta_data, beta_tensor)
    )
