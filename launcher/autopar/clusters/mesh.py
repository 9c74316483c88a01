"""Logical meshes: the shape in which a stage sees its devices, and what communication costs on each axis.

What a collective costs by which algorithm is in `collective_costs`.
"""

import math
from dataclasses import dataclass, replace

from launcher.autopar.clusters.collective_costs import CollectiveCosts, RingCosts, Wire, WiredCosts
from launcher.autopar.clusters.hosts import Cluster

DATA, TENSOR = "data", "tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalMesh:
    """A named shape of devices.

    `alpha` and `beta` are the cost per message and per byte along each axis, in any one unit (the
    planner's is the second). Device order is row-major: the last axis varies fastest. `forbidden` names
    kinds of collectives that may not be used, as `reshard.Kind` does. Where the links of every axis are
    known, `wired` prices in place of `costs`.
    """

    shape: tuple[int, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    axis_names: tuple[str, ...] | None = None
    costs: CollectiveCosts = RingCosts()
    forbidden: frozenset[str] = frozenset()
    wired: tuple[WiredCosts, ...] | None = None

    def __post_init__(self):
        if self.axis_names is None:
            object.__setattr__(self, "axis_names", _default_names(len(self.shape)))
        lengths = {len(self.shape), len(self.alpha), len(self.beta), len(self.axis_names)}
        if len(lengths) != 1:
            raise ValueError(
                f"shape {self.shape}, alpha {self.alpha}, beta {self.beta} and axis_names "
                f"{self.axis_names} must have one entry per axis"
            )

    def __hash__(self):
        """Of a part of the fields: meshes are keys of nearly all that planning remembers."""
        return hash((self.shape, self.alpha, self.beta))

    @property
    def num_axes(self) -> int:
        return len(self.shape)

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    def all_gather(self, axis: int, gathered_bytes: float) -> float:
        """Each device ends up with `gathered_bytes`, having held an n-th of them."""
        if self.wired:
            return self.wired[axis].all_gather(self.shape[axis], gathered_bytes)
        return self.costs.all_gather(*self._along(axis), gathered_bytes)

    def reduce_scatter(self, axis: int, summand_bytes: float) -> float:
        """Each device brings `summand_bytes` and keeps an n-th of the sum."""
        if self.wired:
            return self.wired[axis].reduce_scatter(self.shape[axis], summand_bytes)
        return self.costs.reduce_scatter(*self._along(axis), summand_bytes)

    def all_reduce(self, axis: int, summand_bytes: float) -> float:
        """Each device brings `summand_bytes` and gets the whole sum."""
        if self.wired:
            return self.wired[axis].all_reduce(self.shape[axis], summand_bytes)
        return self.costs.all_reduce(*self._along(axis), summand_bytes)

    def all_to_all(self, axis: int, held_bytes: float) -> float:
        """Each device holds `held_bytes` before and after."""
        if self.wired:
            return self.wired[axis].all_to_all(self.shape[axis], held_bytes)
        return self.costs.all_to_all(*self._along(axis), held_bytes)

    def priced(self, costs: CollectiveCosts) -> "LogicalMesh":
        """The same mesh with other costs, from its α and β alone."""
        return replace(self, costs=costs, wired=None)

    def _along(self, axis: int) -> tuple[int, float, float]:
        return self.shape[axis], self.alpha[axis], self.beta[axis]


def _default_names(num_axes: int) -> tuple[str, ...]:
    """The planner's names for two axes; `axis0`, `axis1`, ... for any other number."""
    return (DATA, TENSOR) if num_axes == 2 else tuple(f"axis{i}" for i in range(num_axes))


def logical_mesh(cluster: Cluster, *, hosts: int, devices: int, data: int) -> LogicalMesh:
    """View a submesh of `hosts` x `devices` as (data, tensor).

    Devices are ordered row-major, so a host holds whole rows of the tensor axis, or a part of one. An axis
    that leaves the host shares the host's link with its neighbours in the other axis. α and β are those of
    a ring.
    """
    tensor = hosts * devices // data
    inside, between = cluster.intra_host, cluster.inter_host
    near = Wire(alpha=inside.latency_s, beta=1 / inside.bytes_per_s, curves=inside.curves)
    alpha, beta, wired = [], [], []
    for size, per_host in ((data, max(1, devices // tensor)), (tensor, min(tensor, devices))):
        far = Wire(
            alpha=between.latency_s,
            beta=1 / between.bytes_per_s,
            shared_by=devices // per_host,
            curves=between.curves,
        )
        crosses = size > per_host
        alpha.append(far.alpha if crosses else near.alpha)
        beta.append(far.shared_by * far.beta if crosses else near.beta)
        wired.append(WiredCosts(per_host=min(size, per_host), inside=near, between=far))
    return LogicalMesh(
        shape=(data, tensor), alpha=tuple(alpha), beta=tuple(beta), wired=tuple(wired)
    )
