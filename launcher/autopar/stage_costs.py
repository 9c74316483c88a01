"""Every way to run a range of layers on a submesh, priced: what the inter-operator DP chooses from.

For each logical view of the submesh the intra-operator ILP is solved; ZeRO stages and recomputation are
then priced on top of its solution. Ranges that consist of the same classes of layers, connected in the same
way, differ only in how often each class occurs. For a given choice of strategies the cost is linear in
those counts, so the optimum is concave in them: a choice that is optimal at both ends of a family of
ranges is optimal in between. So each family is solved at its smallest and its largest member, and for the
others the better of the two is taken. Where a model repeats little and has too many families, one solution
for the whole model on a mesh serves all its ranges.

Left out: tensor axes that leave a host, and choosing strategies anew for ZeRO-1 and -2 or recomputation.
"""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from launcher.autopar.cluster import Cluster
from launcher.autopar.compute import ComputeModel
from launcher.autopar.inter_op import StageOption
from launcher.autopar.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.memory import class_memories, stage_memory
from launcher.autopar.mesh import LogicalMesh, logical_mesh
from launcher.autopar.restrictions import Experts, Restrictions
from launcher.autopar.stage_problem import StageSettings


_MOST_FAMILIES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the search may choose from; a forced choice is a set of one."""

    zero: tuple[int, ...] = (0, 2, 3)
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
        cuts: where stages may begin and end; decides the members of each family of ranges.
        optimizer_ratio: bytes of optimizer state per byte of parameters.
    """

    def __init__(
        self, planner: IntraOpPlanner, cluster: Cluster, submeshes: Sequence[tuple[int, int]], *,
        cuts: Sequence[int], num_microbatches: int, choices: Choices, optimizer_ratio: float,
        microbatch_size: int,
    ):  # fmt: skip
        self.planner, self.cluster, self.submeshes = planner, cluster, submeshes
        self.num_microbatches, self.choices = num_microbatches, choices
        self.optimizer_ratio, self.microbatch_size = optimizer_ratio, microbatch_size
        self.compute = ComputeModel(cluster.device)
        self._ideal_s = self._ideal_microbatch_s()
        self._families = _families(planner, cuts)
        self._whole = ((cuts[0], cuts[-1]),) if len(self._families) > _MOST_FAMILIES else None
        self._solved: dict[tuple, list] = {}
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
        solved = self._solved_family(wiring.family, settings)
        sharding, memories = min(
            ((s.for_counts(counts, settings), memories) for s, memories in solved),
            key=lambda pair: pair[0].microbatch_s,
        )
        for recompute in self.choices.recompute:
            again = replace(settings, recompute=recompute != "none")
            priced = replace(sharding, settings=again)
            memory = stage_memory(memories, wiring, recompute)
            floor = max(memory.workspace_bytes, memory.gradient_bytes - memory.stash_bytes)
            yield StageOption(
                seconds=priced.forward_s + priced.backward_s,
                once_s=priced.once_s,
                fixed_bytes=memory.state_bytes + floor,
                stash_bytes=memory.stash_bytes,
                tag=StagePick(settings.mesh, settings.zero, recompute, priced),
            )

    def _settings(self, mesh: LogicalMesh, zero: int, weight: float) -> StageSettings:
        held = frozenset({0}) if mesh.shape[0] > 1 else frozenset()
        return StageSettings(
            mesh=mesh,
            compute=self.compute,
            restrictions=Restrictions(held, self.choices.experts),
            num_microbatches=self.num_microbatches,
            zero=zero,
            memory_s_per_byte=weight * self._ideal_s / self.cluster.device.memory_bytes,
        )

    def _solved_family(self, family: Hashable, settings: StageSettings):
        """The strategies found for the smallest and the largest range of a family, with their memory.

        ZeRO-1 and -2 take the strategies of no ZeRO.
        """
        members = self._whole or tuple(dict.fromkeys(self._families[family]))
        key = (members, settings.mesh, settings.zero, settings.memory_s_per_byte)
        if key not in self._solved:
            self._solved[key] = [self._price_member(*member, settings) for member in members]
        return self._solved[key]

    def _price_member(self, first: int, last: int, settings: StageSettings):
        plain = replace(settings, zero=3 if settings.zero == 3 else 0)
        key = (first, last, plain.mesh, plain.zero, plain.memory_s_per_byte)
        if key not in self._strategies:
            self._strategies[key] = self.planner.solve(first, last, plain)
        solved = self._strategies[key]
        self.largest_gap_fraction = max(self.largest_gap_fraction, solved.gap_fraction)
        sharding = self.planner.reprice(first, last, settings, solved.picks)
        wiring = self.planner.wiring(first, last)
        return sharding, class_memories(self.planner, sharding, wiring, self.optimizer_ratio)


def _families(planner: IntraOpPlanner, cuts: Sequence[int]) -> dict[Hashable, tuple]:
    """Family -> its smallest and its largest range."""
    members: dict[Hashable, list[tuple[int, int]]] = {}
    for i, first in enumerate(cuts):
        for last in cuts[i + 1 :]:
            members.setdefault(planner.wiring(first, last).family, []).append((first, last))
    return {
        family: (
            min(ranges, key=lambda r: r[1] - r[0]),
            max(ranges, key=lambda r: r[1] - r[0]),
        )
        for family, ranges in members.items()
    }
