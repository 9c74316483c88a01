"""Logical meshes: the shape in which a stage sees its devices, and what communication costs on each axis.

A `CollectiveCosts` prices a collective from the devices along the axis, the α (per message) and β (per
byte) of the axis, and the bytes S per device before an all-reduce, reduce-scatter or all-to-all, or after
an all-gather. Two are here: ring algorithms, and Alpa's functions. Left out: tree algorithms, contention
between axes, and overlap with computation.
"""

import math
from dataclasses import dataclass, replace

from launcher.autopar.cluster import Cluster

DATA, TENSOR = "data", "tensor"


@dataclass(frozen=True, slots=True)
class RingCosts:
    """Ring algorithms: one message per hop costs α, every byte that leaves a device costs β."""

    def all_gather(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return (n - 1) * alpha + (n - 1) / n * num_bytes * beta

    def reduce_scatter(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return self.all_gather(n, alpha, beta, num_bytes)

    def all_reduce(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return 2 * self.all_gather(n, alpha, beta, num_bytes)

    def all_to_all(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return self.all_gather(n, alpha, beta, num_bytes)


@dataclass(frozen=True, slots=True)
class AlpaCosts:
    """Alpa's functions (`LogicalDeviceMesh` of its auto_sharding.py).

    One α per collective, small constants that break ties, and an all-to-all that is charged half of what
    an all-gather of the devices' shards would cost. Alpa passes an all-to-all the bytes of the n shards
    together, hence the factor n here. Its C++ rounds to integers; this does not.
    """

    def all_gather(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return alpha + beta * (n - 1) / n * num_bytes + 0.1

    def reduce_scatter(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return alpha + beta * (n - 1) / n * num_bytes + 0.001

    def all_reduce(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return alpha + beta * 2 * (n - 1) / n * num_bytes + 0.01

    def all_to_all(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return alpha + beta * (n - 1) / n / n * (n * num_bytes) * (n / 2) + 0.001


@dataclass(frozen=True, slots=True)
class TieBreaking:
    """Other costs, and a little more for every collective: of two equal plans, the one with fewer wins."""

    base: RingCosts | AlpaCosts
    per_collective: float

    def all_gather(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return self.base.all_gather(n, alpha, beta, num_bytes) + self.per_collective

    def reduce_scatter(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return self.base.reduce_scatter(n, alpha, beta, num_bytes) + self.per_collective

    def all_reduce(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return self.base.all_reduce(n, alpha, beta, num_bytes) + self.per_collective

    def all_to_all(self, n: int, alpha: float, beta: float, num_bytes: float) -> float:
        return self.base.all_to_all(n, alpha, beta, num_bytes) + self.per_collective


CollectiveCosts = RingCosts | AlpaCosts | TieBreaking


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalMesh:
    """A named shape of devices.

    `alpha` and `beta` are the cost per message and per byte along each axis, in any one unit (the
    planner's is the second). Device order is row-major: the last axis varies fastest. `forbidden` names
    kinds of collectives that may not be used, as `reshard.Kind` does.
    """

    shape: tuple[int, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    axis_names: tuple[str, ...] | None = None
    costs: CollectiveCosts = RingCosts()
    forbidden: frozenset[str] = frozenset()

    def __post_init__(self):
        if self.axis_names is None:
            object.__setattr__(self, "axis_names", _default_names(len(self.shape)))
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
        return self.costs.all_gather(*self._along(axis), gathered_bytes)

    def reduce_scatter(self, axis: int, summand_bytes: float) -> float:
        """Each device brings `summand_bytes` and keeps an n-th of the sum."""
        return self.costs.reduce_scatter(*self._along(axis), summand_bytes)

    def all_reduce(self, axis: int, summand_bytes: float) -> float:
        """Each device brings `summand_bytes` and gets the whole sum."""
        return self.costs.all_reduce(*self._along(axis), summand_bytes)

    def all_to_all(self, axis: int, held_bytes: float) -> float:
        """Each device holds `held_bytes` before and after."""
        return self.costs.all_to_all(*self._along(axis), held_bytes)

    def priced(self, costs: CollectiveCosts) -> "LogicalMesh":
        """The same mesh with other costs."""
        return replace(self, costs=costs)

    def _along(self, axis: int) -> tuple[int, float, float]:
        return self.shape[axis], self.alpha[axis], self.beta[axis]


def _default_names(num_axes: int) -> tuple[str, ...]:
    """The planner's names for two axes; `axis0`, `axis1`, ... for any other number."""
    return (DATA, TENSOR) if num_axes == 2 else tuple(f"axis{i}" for i in range(num_axes))


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
