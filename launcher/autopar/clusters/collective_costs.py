"""What a collective costs on one axis of a mesh, by its algorithm.

The bytes S are those per device before an all-reduce, reduce-scatter or all-to-all, or after an all-gather.
`RingCosts` and `AlpaCosts` know the devices n along the axis, and its α (per message) and β (per byte).
`WiredCosts` knows how hosts and devices are linked, and takes the fastest algorithm, as NCCL does. Left
out: contention between axes, and overlap with computation.
"""

import math
from dataclasses import dataclass, field, replace

from launcher.autopar.clusters.curves import Curves


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
class Wire:
    """The link between neighbours of an axis.

    Attributes:
        shared_by: how many rings go over it side by side.
        curves: what whole collectives took, where that was measured; then α and β are not asked.
    """

    alpha: float
    beta: float
    shared_by: int = 1
    curves: Curves = field(default_factory=dict, hash=False)

    def steps(self, kind: str, number: int) -> float:
        """What so many messages cost before their first byte."""
        return 0.0 if kind in self.curves else number * self.alpha

    def sent(self, kind: str, num_bytes: float) -> float:
        """What the bytes cost that one device sends."""
        if kind in self.curves:
            return self.shared_by * float(self.curves[kind].seconds(num_bytes))
        return self.shared_by * self.beta * num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class WiredCosts:
    """The fastest algorithm on an axis that has `per_host` devices in each of its hosts.

        ring           n - 1 messages of S / n, at the pace of the slower link; twice for an all-reduce
        tree           all-reduce over two binary trees of hosts, each for half of the bytes, with a chain
                       through the devices of a host: 2 S, in few steps (Sanders, Speck and Träff,
                       Two-tree algorithms, 2009, as NCCL has it)
        hierarchical   inside the hosts, then each device with its peers on other hosts for its part of
                       the bytes, and for an all-reduce inside the hosts again, one after the other

    All devices of a host that send to other hosts at once share its link. A rank sends an all-to-all's
    pieces to every other one directly.
    """

    per_host: int
    inside: Wire
    between: Wire

    def all_gather(self, n: int, num_bytes: float) -> float:
        return self._gathered("all_gather", n, num_bytes)

    def reduce_scatter(self, n: int, num_bytes: float) -> float:
        return self._gathered("reduce_scatter", n, num_bytes)

    def all_reduce(self, n: int, num_bytes: float) -> float:
        ring = self.ring("all_reduce", n, num_bytes, rounds=2)
        if n == self.per_host:
            return ring
        return min(ring, self.tree(n, num_bytes), self.hierarchical("all_reduce", n, num_bytes))

    def all_to_all(self, n: int, num_bytes: float) -> float:
        kind, near, far = "all_to_all", self.per_host - 1, n - self.per_host
        steps = self.inside.steps(kind, near) + self.between.steps(kind, far)
        return steps + max(
            self.inside.sent(kind, near / n * num_bytes) if near else 0.0,
            self.per_host * self.between.sent(kind, far / n * num_bytes) if far else 0.0,
        )

    def ring(self, kind: str, n: int, num_bytes: float, *, rounds: int = 1) -> float:
        """One ring through all devices; an all-reduce goes round twice."""
        hosts, sent = n // self.per_host, rounds * (n - 1) / n * num_bytes
        return self._steps(kind, rounds * (n - hosts), rounds * (hosts - 1)) + self._sent(
            kind, n, sent
        )

    def tree(self, n: int, num_bytes: float) -> float:
        """Up the trees and down again."""
        kind, depth = "all_reduce", math.ceil(math.log2(n // self.per_host))
        steps = self._steps(kind, 2 * (self.per_host - 1), 2 * depth)
        return steps + self._sent(kind, n, 2 * num_bytes)

    def hierarchical(self, kind: str, n: int, num_bytes: float) -> float:
        """Level by level; an all-reduce is a reduce-scatter and an all-gather around its own kind."""
        hosts = n // self.per_host
        side_by_side = replace(self.between, shared_by=self.per_host * self.between.shared_by)
        peers = replace(self, per_host=1, between=side_by_side)
        part = num_bytes / self.per_host
        if kind == "all_reduce":
            inside = self.reduce_scatter(self.per_host, num_bytes)
            inside += self.all_gather(self.per_host, num_bytes)
            across = min(peers.ring(kind, hosts, part, rounds=2), peers.tree(hosts, part))
        else:
            inside = self.ring(kind, self.per_host, num_bytes)
            across = peers.ring(kind, hosts, part)
        return inside + across

    def _gathered(self, kind: str, n: int, num_bytes: float) -> float:
        ring = self.ring(kind, n, num_bytes)
        return ring if n == self.per_host else min(ring, self.hierarchical(kind, n, num_bytes))

    def _steps(self, kind: str, inside: int, between: int) -> float:
        return self.inside.steps(kind, inside) + self.between.steps(kind, between)

    def _sent(self, kind: str, n: int, num_bytes: float) -> float:
        """Bytes that pass every link of the ring or tree: the slower one sets the pace."""
        return max(
            self.inside.sent(kind, num_bytes) if self.per_host > 1 else 0.0,
            self.between.sent(kind, num_bytes) if n > self.per_host else 0.0,
        )
