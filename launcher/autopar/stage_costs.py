"""Every way to run a range of layers on a submesh, priced: what the inter-operator DP chooses from.

For each logical view of the submesh the intra-operator problem is solved; ZeRO stages and recomputation are
then priced on top of its solution. For given strategies the cost of a range is linear in how often each
class of layers occurs in it, so one solution, for the whole model on a mesh, prices all its ranges.

Left out: tensor axes that leave a host; choosing strategies anew for each range, for ZeRO-1 and -2, and for
recomputation.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from launcher.autopar.cluster import Cluster
from launcher.autopar.compute import ComputeModel
from launcher.autopar.inter_op import StageOption
from launcher.autopar.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.memory import class_memories, stage_memory, unread_memory
from launcher.autopar.mesh import LogicalMesh, logical_mesh
from launcher.autopar.optimizer_state import OptimizerFootprint
from launcher.autopar.restrictions import Experts, Restrictions
from launcher.autopar.stage_problem import StageSettings
from launcher.autopar.wiring import StageWiring
from launcher.autopar.work import aval_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the search may choose from; a forced choice is a set of one."""

    zero: tuple[int, ...] = (0, 2)
    recompute: tuple[str, ...] = ("none", "layer")
    tensor: int | None = None  # forced degree of the tensor axis
    data: int | None = None
    experts: Experts = Experts.FREE
    # How dear memory is to the solver: 1 makes a full device cost as much as the ideal microbatch time.
    memory_weights: tuple[float, ...] = (0.0, 3.0)


@dataclass(frozen=True, slots=True, eq=False)
class StagePick:
    """What a stage option stands for."""

    mesh: LogicalMesh
    zero: int
    recompute: str
    sharding: StageSharding


class StageCosts:
    """Prices ranges of layers on submeshes, on demand.

    Args:
        optimizer: decides how much state a parameter has, and what updating it takes.
    """

    def __init__(
        self, planner: IntraOpPlanner, cluster: Cluster, submeshes: Sequence[tuple[int, int]], *,
        num_microbatches: int, choices: Choices, optimizer: OptimizerFootprint,
        microbatch_size: int,
    ):  # fmt: skip
        self.planner, self.cluster, self.submeshes = planner, cluster, submeshes
        self.num_microbatches, self.choices = num_microbatches, choices
        self.optimizer, self.microbatch_size = optimizer, microbatch_size
        self.compute = ComputeModel(cluster.device)
        self._ideal_s = self._ideal_microbatch_s()
        self._whole = (0, len(planner.model.layers))
        self._priced: dict[tuple, tuple] = {}
        self._strategies: dict[tuple, StageSharding] = {}
        self._options: dict[tuple[int, int, int], tuple[StageOption, ...]] = {}
        self.largest_gap_fraction = 0.0

    def _ideal_microbatch_s(self) -> float:
        """A microbatch's operations spread evenly over the cluster."""
        ops = [op for layer in self.planner.model.layers for op in layer.cls.joint.ops]
        return sum(self.compute.op_s(op) for op in ops) / self.cluster.num_devices

    def options(self, first: int, last: int, submesh: int) -> tuple[StageOption, ...]:
        """All priced ways to run layers [first, last) on a submesh shape."""
        key = (first, last, submesh)
        if key not in self._options:
            self._options[key] = tuple(self._price(first, last, submesh))
        return self._options[key]

    def _meshes(self, submesh: int) -> Iterable[LogicalMesh]:
        """The logical views: every tensor degree that divides the devices of a host."""
        hosts, devices = self.submeshes[submesh]
        for tensor in range(1, devices + 1):
            data = hosts * devices // tensor
            if devices % tensor or self.microbatch_size % data:
                continue
            if self.choices.tensor in (None, tensor) and self.choices.data in (None, data):
                yield logical_mesh(self.cluster, hosts=hosts, devices=devices, data=data)

    def _price(self, first: int, last: int, submesh: int) -> Iterable[StageOption]:
        for mesh in self._meshes(submesh):
            for zero, weight in itertools.product(self.choices.zero, self._weights(mesh)):
                if zero and mesh.shape[0] == 1 and 0 in self.choices.zero:
                    continue  # nothing to shard over
                yield from self._price_mesh(first, last, self._settings(mesh, zero, weight))

    def _weights(self, mesh: LogicalMesh) -> tuple[float, ...]:
        """Memory prices worth trying; without a tensor axis there is nothing to choose."""
        return self.choices.memory_weights if mesh.shape[1] > 1 else self.choices.memory_weights[:1]

    def _price_mesh(self, first: int, last: int, settings: StageSettings):
        wiring = self.planner.wiring(first, last)
        counts = wiring.counts
        whole, memories, unread = self._solved(settings)
        if not wiring.unread:
            unread = []
        borrowed_s = self._borrowed_s(wiring)
        sharding = whole.for_counts(counts, settings)
        for recompute in self.choices.recompute:
            again = replace(settings, recompute=recompute != "none")
            priced = replace(sharding, settings=again)
            memory = stage_memory(memories, wiring, recompute, unread)
            floor = max(memory.workspace_bytes, memory.gradient_bytes - memory.stash_bytes)
            yield StageOption(
                seconds=priced.forward_s + priced.backward_s,
                once_s=priced.once_s + borrowed_s,
                fixed_bytes=memory.state_bytes + floor,
                stash_bytes=memory.stash_bytes,
                tag=StagePick(settings.mesh, settings.zero, recompute, priced),
            )

    def _borrowed_s(self, wiring: StageWiring) -> float:
        """Once a step, gradients go to the stage that updates a parameter, and it comes back."""
        between = self.cluster.inter_host if self.cluster.num_hosts > 1 else self.cluster.intra_host
        avals = self.planner.model.traced.graph.avals
        num_bytes = sum(aval_bytes(avals[value]) for value in wiring.borrowed)
        return 2 * (between.latency_s + num_bytes / between.bytes_per_s) if num_bytes else 0.0

    def _settings(self, mesh: LogicalMesh, zero: int, weight: float) -> StageSettings:
        held = frozenset({0}) if mesh.shape[0] > 1 else frozenset()
        return StageSettings(
            mesh=mesh,
            compute=self.compute,
            restrictions=Restrictions(held, self.choices.experts),
            num_microbatches=self.num_microbatches,
            zero=zero,
            optimizer=self.optimizer,
            memory_s_per_byte=weight * self._ideal_s / self.cluster.device.usable_bytes,
        )

    def _solved(self, settings: StageSettings):
        """The whole model on a mesh: its strategies, and the memory of a layer of each class and of the
        parameters that no layer reads.

        ZeRO-1 and -2 take the strategies of no ZeRO.
        """
        key = (settings.mesh, settings.zero, settings.memory_s_per_byte)
        if key not in self._priced:
            plain = replace(settings, zero=3 if settings.zero == 3 else 0)
            solved_key = (plain.mesh, plain.zero, plain.memory_s_per_byte)
            if solved_key not in self._strategies:
                self._strategies[solved_key] = self.planner.solve(*self._whole, plain)
            solved = self._strategies[solved_key]
            self.largest_gap_fraction = max(self.largest_gap_fraction, solved.gap_fraction)
            sharding = self.planner.reprice(*self._whole, settings, solved.picks)
            wiring = self.planner.wiring(*self._whole)
            memories = class_memories(self.planner, sharding, wiring)
            unread = unread_memory(self.planner, settings)
            self._priced[key] = sharding, memories, unread
        return self._priced[key]
