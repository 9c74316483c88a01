"""Every way to run a range of layers on a submesh, priced: what the inter-operator DP chooses from.

For each logical view of the submesh the intra-operator problem is solved (`strategies`); ZeRO stages and
recomputation are then priced on top of its solution. For given strategies the cost of a range is linear in
how often each class of layers occurs in it, so one solution, for the whole model on a mesh, prices all its
ranges. Of the options of a range those are kept that no other one beats in time and memory alike.

Overlap of synchronisation with the last backward pass is offered to the stage of the first layer, where it
saves enough: of any other one, cotangents go on that would have to wait for what is left of it.

Left out: choosing strategies anew for each range, for ZeRO-1 and -2, recomputation and overlap; a price on
memory under ZeRO-3, which leaves little of it to save; overlap where the backward pass is split. Not tried
unless they are asked for: ZeRO-1, which sends more than ZeRO-2 and keeps more; ZeRO-3 with gradients summed
whole, which needs the memory of ZeRO-2 with whole weights and scattered gradients, and sends more. Not worth
it: what keeps a stage busy for as long as the best step that is known.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial

import numpy as np

from launcher.autopar.clusters.compute import ComputeModel
from launcher.autopar.clusters.device import Device
from launcher.autopar.clusters.hosts import AnyCluster
from launcher.autopar.clusters.mesh import LogicalMesh, logical_mesh
from launcher.autopar.graphs.layers import LayeredModel
from launcher.autopar.graphs.optimizer_state import OptimizerFootprint
from launcher.autopar.graphs.trace import Role
from launcher.autopar.graphs.work import aval_bytes
from launcher.autopar.inter_op.program_starts import ProgramStarts
from launcher.autopar.inter_op.stage_table import StageOption, unbeaten
from launcher.autopar.inter_op.strategies import Known, Strategies
from launcher.autopar.intra_op.intra_op import IntraOpPlanner, StageSharding
from launcher.autopar.intra_op.memory import (
    ClassMemory,
    ParamMemory,
    class_memories,
    range_memory,
    unread_memory,
)
from launcher.autopar.intra_op.overlapped import saved_s as saved_s_by_last
from launcher.autopar.intra_op.stage_problem import Group, StageSettings
from launcher.autopar.intra_op.stage_seconds import Seconds
from launcher.autopar.intra_op.wiring import StageWiring
from launcher.autopar.intra_op.wiring_table import WiringTable
from launcher.autopar.sharding.restrictions import Experts, Restrictions

_ROOMY = 0.25  # of a device's memory
LEAST_SAVING = 0.01  # of a step: overlapping takes longer to compile
_FIELDS = (
    "forward_s", "backward_s", "weight_s", "once_s",
    "fixed_bytes", "stash_bytes", "weight_stash_bytes", "workspace_bytes", "gradient_bytes",
)  # fmt: skip
_BUSY = slice(0, 2)  # of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the search may choose from; a forced choice is a set of one."""

    zero: tuple[int, ...] = (0, 2, 3)
    recompute: tuple[str, ...] = ("none", "layer", "full")
    tensor: int | None = None  # forced degree of the tensor axis
    data: int | None = None
    experts: Experts = Experts.FREE
    # How dear memory is to the solver: 1 makes a full device cost as much as the ideal microbatch time.
    memory_weights: tuple[float, ...] = (0.0, 3.0)
    scatter: tuple[bool, ...] = (False, True)  # with ZeRO-2 and 3


@dataclass(frozen=True, slots=True, eq=False)
class _Solved:
    """The whole model on a mesh: what its strategies cost by group, and a layer of each class in memory."""

    sharding: StageSharding
    seconds: np.ndarray  # (groups, fields of `Seconds`)
    memories: Mapping[str, ClassMemory]
    unread: Sequence[ParamMemory]


@dataclass(frozen=True, slots=True)
class _Variant:
    """What strategies of the whole model are priced for.

    Attributes:
        weight: Of the price on memory, as in `Choices`.
    """

    mesh: LogicalMesh
    weight: float
    zero: int
    scatter: bool


@dataclass(frozen=True, slots=True, eq=False)
class StagePick:
    """What a stage option stands for.

    Attributes:
        weight: Of the price on memory, as in `Choices`.
        sharding: Of the whole model, without recomputation.
    """

    mesh: LogicalMesh
    weight: float
    zero: int
    scatter: bool
    recompute: str
    sharding: StageSharding
    overlap: bool = False

    @property
    def decisions(self) -> tuple:
        """What tells it from others that differ in the sharding of ops alone."""
        return self.mesh.shape, self.recompute, self.zero, self.scatter, self.overlap


class StageCosts:
    """Prices ranges of layers on submeshes of a kind of hosts, on demand.

    Args:
        kind: of the cluster's hosts, by its number.
        optimizer: decides how much state a parameter has, and what updating it takes.
        known: strategies to price instead of solving; those that are solved are added.
        ranges: of layers, that will be asked for; by default all.
        worth_s: of a step; options that keep a stage busy for as long are left out.
        at_once: as in `ComputeModel`.
    """

    def __init__(
        self, planner: IntraOpPlanner, cluster: AnyCluster, submeshes: Sequence[tuple[int, int]], *,
        num_microbatches: int, choices: Choices, optimizer: OptimizerFootprint,
        microbatch_size: int, known: Known | None = None,
        ranges: Iterable[tuple[int, int]] | None = None, kind: int = 0, worth_s: float = math.inf,
        at_once: int | None = None,
    ):  # fmt: skip
        self.planner, self.cluster, self.submeshes = planner, cluster.kinds[kind], submeshes
        self.num_microbatches, self.choices = num_microbatches, choices
        self.optimizer, self.microbatch_size = optimizer, microbatch_size
        self.compute = ComputeModel(self.cluster.device, at_once)
        self._stage_link = cluster.stage_link
        self._ideal_s = self._ideal_microbatch_s(cluster)
        self._whole = (0, len(planner.model.layers))
        self._priced: dict[_Variant, _Solved] = {}
        self._strategies = Strategies(planner, num_microbatches, {} if known is None else known)
        self._options: dict[int, list[tuple[StageOption, ...]]] = {}
        self._wiring = planner.wiring(*self._whole)
        self._groups: tuple[Group, ...] = ()  # of costs: the same on every mesh
        self._counted: np.ndarray | None = None
        if ranges is None:
            ranges = itertools.combinations(range(self._whole[1] + 1), 2)
        self._row = {ends: row for row, ends in enumerate(dict.fromkeys(ranges))}
        self._wirings = [planner.wiring(*ends) for ends in self._row]
        self._table = WiringTable.of(self._wirings)
        self._borrowed = np.array([self._borrowed_s(wiring) for wiring in self._wirings])
        self.largest_gap_fraction = 0.0
        self._worth_s, self.has_left_out = worth_s, False
        self._starts = ProgramStarts(planner, self.cluster.device, optimizer)
        self._started: dict[tuple, tuple[StageOption, ...]] = {}

    def _ideal_microbatch_s(self, cluster: AnyCluster) -> float:
        """A microbatch's operations spread over the cluster so that all devices take equally long."""
        ops = [op for layer in self.planner.model.layers for op in layer.cls.joint.ops]

        def alone_s(compute: ComputeModel) -> float:
            return sum(compute.op_s(op) for op in ops)

        own_s = alone_s(self.compute)
        others = [kind for kind in cluster.kinds if kind is not self.cluster]
        # Of devices like ours, so many do what all of another kind do.
        worth = sum(k.num_devices * own_s / alone_s(ComputeModel(k.device)) for k in others)
        return own_s / (self.cluster.num_devices + worth)

    def options(self, first: int, last: int, submesh: int) -> tuple[StageOption, ...]:
        """The ways to run layers [first, last) on a submesh shape that are not worse than others."""
        if (first, last) not in self._row:
            raise ValueError(f"layers [{first}, {last}) are not among the given ranges")
        if submesh not in self._options:
            self._options[submesh] = self._price(submesh)
        return self._options[submesh][self._row[first, last]]

    def options_under(
        self, schedule: str, first: int, last: int, submesh: int
    ) -> Sequence[StageOption]:
        """The same under a schedule, with what starting their programs takes."""
        options, splits = self.options(first, last, submesh), schedule == "zb_h1"
        if splits:
            options = tuple(option for option in options if not option.tag.overlap)
        if self._starts.are_free:
            return options
        asked = splits, first, last, submesh
        if asked not in self._started:
            add = partial(self._starts.with_starts, first=first, last=last, splits_backward=splits)
            self._started[asked] = tuple(map(add, options))
        return self._started[asked]

    def _meshes(self, submesh: int) -> Iterable[LogicalMesh]:
        """The logical views: every tensor degree that divides the devices of a host."""
        hosts, devices = self.submeshes[submesh]
        for tensor in range(1, devices + 1):
            data = hosts * devices // tensor
            if devices % tensor or self.microbatch_size % data:
                continue
            if self.choices.tensor in (None, tensor) and self.choices.data in (None, data):
                yield logical_mesh(self.cluster, hosts=hosts, devices=devices, data=data)

    def _price(self, submesh: int) -> list[tuple[StageOption, ...]]:
        """The options of every range."""
        picks, costs = [], []
        for variant in itertools.chain(*map(self._variants_on, self._meshes(submesh))):
            solved = self._solved(variant)
            if solved is None:
                continue
            for recompute in self.choices.recompute:
                pick = StagePick(
                    variant.mesh, variant.weight, variant.zero, variant.scatter, recompute,
                    solved.sharding,
                )  # fmt: skip
                plain = self._costs(solved, recompute)
                picks.append(pick)
                costs.append(plain)
                if not variant.scatter:  # which leaves little to bring together at the end
                    picks.append(replace(pick, overlap=True))
                    costs.append(self._overlapping(solved, recompute, plain))
        if not picks:
            return [()] * len(self._row)
        by_range = np.stack(costs, axis=1)  # (ranges, options, fields)
        there = np.isfinite(by_range).all(axis=2)
        is_slow = self.num_microbatches * by_range[:, :, _BUSY].sum(axis=2) >= self._worth_s
        self.has_left_out |= bool((there & is_slow).any())
        return [
            tuple(
                StageOption(
                    **dict(zip(_FIELDS, costs[option].tolist(), strict=True)), tag=picks[option]
                )
                for option in _undominated(costs, np.flatnonzero(live))
            )
            for costs, live in zip(by_range, there & ~is_slow, strict=True)
        ]

    def _variants_on(self, mesh: LogicalMesh) -> Iterable[_Variant]:
        """What is worth trying on a mesh."""
        choices, weights = self.choices, self._weights(mesh)
        for zero, weight, scatter in itertools.product(choices.zero, weights, choices.scatter):
            if zero and mesh.shape[0] == 1 and 0 in choices.zero:
                continue  # nothing to shard over
            if zero == 3 and weight and 0.0 in choices.memory_weights:
                continue  # its shards leave little to save
            if scatter and (mesh.shape[0] == 1 or zero < 2):
                continue  # nowhere to scatter to
            if scatter and zero < 3 and weight < weights[-1]:
                continue  # it is for memory: with strategies that save some
            if zero == 3 and not scatter and 2 in choices.zero and True in choices.scatter:
                continue  # whole sums need the memory that whole weights do, and these send less
            yield _Variant(mesh, weight, zero, scatter)

    def _weights(self, mesh: LogicalMesh) -> tuple[float, ...]:
        """Prices on memory worth trying: one, where there is nothing to choose or nothing to save."""
        weights = self.choices.memory_weights
        if mesh.shape[1] == 1:
            return weights[:1]
        if weights[0] or len(weights) == 1 or min(self.choices.zero) == 3:
            return weights
        dear = self._settings(_Variant(mesh, weights[-1], 0, scatter=False))
        return weights[:1] if self._strategies.is_lean(dear) else weights

    def _costs(self, solved: _Solved, recompute: str) -> np.ndarray:
        """What every range costs with the strategies of the whole model: (ranges, fields)."""
        seconds = Seconds(*(self._counts() @ solved.seconds).T)
        memory = range_memory(solved.memories, self._table, recompute, solved.unread)
        halves = seconds.halves(recompute)
        fields = {
            "forward_s": seconds.forward,
            "backward_s": sum(halves),
            "weight_s": halves[1],
            "once_s": seconds.synchronize + seconds.update + self._borrowed,
            "fixed_bytes": memory.state_bytes,
            "stash_bytes": memory.stash_bytes,
            "weight_stash_bytes": memory.weight_stash_bytes,
            "workspace_bytes": memory.workspace_bytes,
            "gradient_bytes": memory.gradient_bytes,
        }
        return np.stack([fields[name] for name in _FIELDS], axis=1)

    def _overlapping(self, solved: _Solved, recompute: str, plain: np.ndarray) -> np.ndarray:
        """The same with overlap, where that saves enough; infinite where it does not."""
        saved_s = saved_s_by_last(self.planner, solved.sharding, self._whole, recompute)
        costs, field = np.full_like(plain, np.inf), dict(zip(_FIELDS, plain.T, strict=True))
        own_s = self.num_microbatches * (field["forward_s"] + field["backward_s"]) + field["once_s"]
        params = [solved.memories[name].params[slot] for name, slot in self._table.places]
        sums = self._table.owned @ np.array([param.accumulator_bytes for param in params], float)
        # Gradients are there beside the last microbatch. A stage that is alone has both in one program,
        # where they come as what the microbatch keeps goes.
        more_bytes = field["stash_bytes"] + np.maximum(field["workspace_bytes"], sums)
        for (first, last), row in self._row.items():
            if first == 0 and saved_s[last - 1] > LEAST_SAVING * own_s[row]:
                costs[row] = plain[row]
                costs[row, _FIELDS.index("once_s")] -= saved_s[last - 1]
                is_alone = last == self._whole[1]
                costs[row, _FIELDS.index("gradient_bytes")] += 0.0 if is_alone else more_bytes[row]
        return costs

    def _counts(self) -> np.ndarray:
        """How often each group of costs occurs in each range."""
        if self._counted is None:
            rows = (wiring.counts for wiring in self._wirings)
            counts = [[row.get(group, 0) for group in self._groups] for row in rows]
            self._counted = np.array(counts, float)
        return self._counted

    def _borrowed_s(self, wiring: StageWiring) -> float:
        """Once a step, gradients go to the stage that updates a parameter, and it comes back."""
        between = self._stage_link
        avals = self.planner.model.traced.graph.avals
        num_bytes = sum(aval_bytes(avals[value]) for value in wiring.borrowed)
        return 2 * (between.latency_s + num_bytes / between.bytes_per_s) if num_bytes else 0.0

    def _settings(self, variant: _Variant) -> StageSettings:
        held = frozenset({0}) if variant.mesh.shape[0] > 1 else frozenset()
        return StageSettings(
            mesh=variant.mesh,
            compute=self.compute,
            restrictions=Restrictions(held, self.choices.experts),
            num_microbatches=self.num_microbatches,
            zero=variant.zero,
            scatter=variant.scatter,
            optimizer=self.optimizer,
            memory_s_per_byte=variant.weight * self._ideal_s / self.cluster.device.usable_bytes,
        )

    def _solved(self, variant: _Variant) -> _Solved | None:
        """The whole model on a mesh; None where its strategies leave gradients nowhere to scatter from."""
        if variant not in self._priced:
            settings = self._settings(variant)
            sharding = self._strategies.of(settings, variant.weight)
            if sharding is None:
                return None
            self.largest_gap_fraction = max(self.largest_gap_fraction, sharding.gap_fraction)
            known = sharding.group_seconds
            self._groups = self._groups or tuple(known)
            self._priced[variant] = _Solved(
                sharding=sharding,
                seconds=np.array([astuple(known.get(group, Seconds())) for group in self._groups]),
                memories=class_memories(self.planner, sharding, self._wiring),
                unread=unread_memory(self.planner, settings),
            )
        return self._priced[variant]


def _undominated(costs: np.ndarray, live: np.ndarray) -> np.ndarray:
    """The numbers of those that none of the others beats, or equals and comes before, in all that counts.

    Args:
        costs: one row per option, as `_FIELDS` says.
        live: the numbers of the options that there are.
    """
    costs = costs[live]
    field = dict(zip(_FIELDS, costs.T, strict=True))
    seconds, weight_s = field["forward_s"] + field["backward_s"], field["weight_s"]
    # A half of a backward pass may be waited for, or fill a gap: more of it is not simply worse.
    costs = np.column_stack([costs, seconds, seconds - weight_s, seconds - 2 * weight_s])
    return live[unbeaten(costs)]


def worthwhile(
    choices: Choices, model: LayeredModel, optimizer: OptimizerFootprint, device: Device
) -> Choices:
    """Without what only saves memory, where one such device could hold the state of the whole model.

    ZeRO-3 sends all that ZeRO-2 sends, and more; so does who scatters gradients behind every microbatch; and
    a price on memory buys slower strategies.
    """
    inputs, avals = model.traced.inputs, model.traced.graph.avals
    params = [avals[value] for value, source in inputs.items() if source.role is Role.PARAM]
    kept = [optimizer.kept(aval) for aval in params]
    state_bytes = sum(state.alike_bytes + state.whole_bytes for state in kept)
    state_bytes += 2 * sum(map(aval_bytes, params))  # weights and accumulators
    if state_bytes > _ROOMY * device.usable_bytes:
        return choices
    zero = tuple(stage for stage in choices.zero if stage < 3) or choices.zero
    return replace(
        choices, zero=zero, memory_weights=choices.memory_weights[:1], scatter=choices.scatter[:1]
    )
